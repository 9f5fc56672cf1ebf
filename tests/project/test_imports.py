"""Who may import whom (`import_rules.toml`), and what the package needs in order to be imported at all."""

import ast
import shutil
import subprocess
import sys
from functools import cache

import pytest
from repository import ROOT

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings tomli
    import tomli as tomllib

ROOMS = ("zinit_kernels", "model", "evaluate", "bench", "examples")
EVERYWHERE = set(sys.stdlib_module_names) | {"torch", "__future__"}
RULES = tomllib.loads((ROOT / "tests" / "import_rules.toml").read_text())
ONLY = RULES.pop("only")
# module (or folder/*) -> what it may import
ROWS = {
    f"{folder}/{name}": [
        f"{folder}/{target[2:]}" if target.startswith("./") else target for target in targets
    ]
    for folder, rows in RULES.items()
    for name, targets in rows.items()
}


@cache
def sources() -> list[str]:
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return [path.relative_to(ROOT).with_suffix("").as_posix() for path in files]


@cache
def imports(module: str) -> dict[str, set[str]]:
    """module or package path -> the names taken from it ({} for a plain import), lazy imports included."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.setdefault(alias.name.replace(".", "/"), set())
        elif isinstance(node, ast.ImportFrom):
            package = module.split("/")[: -node.level] if node.level else []
            base = "/".join([*package, *(node.module or "").split(".")]).strip("/")
            for alias in node.names:
                target = ROOT / base / alias.name
                if target.with_suffix(".py").is_file() or target.is_dir():  # from . import reference
                    found.setdefault(f"{base}/{alias.name}", set())
                else:
                    found.setdefault(base, set()).add(alias.name)
    return found


def allowed(module: str) -> list[str]:
    folder = f"{module.rpartition('/')[0]}/*"
    if module not in ROWS and module.endswith("/__init__"):
        return []
    assert module in ROWS or folder in ROWS, f"{module}.py has no row in tests/import_rules.toml"
    return ROWS.get(module, ROWS.get(folder))


def lies_in(module: str, folder: str) -> bool:
    return module == folder or module.startswith(f"{folder}/")


@pytest.mark.parametrize("module", sources())
def test_imports_what_its_row_allows(module):
    permitted = allowed(module)
    for target in imports(module):
        top = target.split("/")[0]
        if top in EVERYWHERE:
            continue
        name = target if top in ROOMS else top
        assert name in permitted, f"{module}.py imports {target}; tests/import_rules.toml allows {permitted}"
        for restricted, importers in ONLY.items():
            if lies_in(target, restricted):
                assert any(lies_in(module, importer) for importer in importers), (
                    f"{module}.py imports {target}; tests/import_rules.toml keeps {restricted} to {importers}"
                )


@pytest.mark.parametrize("row", ROWS)
def test_no_row_allows_more_than_is_used(row):
    folder, name = row.rsplit("/", 1)
    modules = [module for module in sources() if row == module or (name == "*" and lies_in(module, folder))]
    assert modules, f"tests/import_rules.toml has a row for {row}, which does not exist"
    used = {target for module in modules for target in imports(module)}
    unused = set(ROWS[row]) - used - {target.split("/")[0] for target in used}
    assert not unused, f"{row} does not import {sorted(unused)}: take it out of tests/import_rules.toml"


@pytest.mark.parametrize("module", [name for name in sources() if name.split("/")[0] != "zinit_kernels"])
def test_public_names_only(module):
    import zinit_kernels

    private = imports(module).get("zinit_kernels", set()) - set(zinit_kernels.__all__)
    assert not private, f"{module}.py takes {sorted(private)}, which zinit_kernels does not export"


def test_imports_have_no_circle():
    ours = set(sources())
    graph = {module: set(imports(module)) & ours for module in ours}
    while graph:
        leaves = {module for module, targets in graph.items() if not targets & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {module: targets for module, targets in graph.items() if module not in leaves}


BARE = """
import sys, warnings

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError("blocked: " + name, name=name)

sys.meta_path.insert(0, Blocked())
import torch, zinit_kernels

assert zinit_kernels.__file__.startswith({folder!r}), zinit_kernels.__file__
query, key, value = torch.randn(3, 2, 4, 5, 8, requires_grad=True).unbind()
prompt_key, prompt_value = torch.randn(2, 1, 4, 3, 8).unbind()
arguments = (query, key, value, prompt_key, prompt_value, torch.tensor([0.5]))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        out = zinit_kernels.zero_init_attention(*arguments, is_causal=True)
(warning,) = caught  # once a process, from the caller's line, with the command that helps
assert warning.category is RuntimeWarning and warning.filename == __file__, warning
assert "pip install --force-reinstall --no-cache-dir --no-deps" in str(warning.message), warning
out.sum().backward()
reference = zinit_kernels.zero_init_attention(*arguments, is_causal=True, backend="reference")
torch.testing.assert_close(out, reference)
reasons = zinit_kernels.explain(*arguments, is_causal=True)
assert "_C_cpu.so was not built" in reasons["cpu"], reasons
assert reasons["triton"].startswith("triton is not installed"), reasons
print("ran", reasons.selected)
"""


def test_runs_without_compiler_triton_or_model_packages(tmp_path):
    blocked = {"triton", "numpy", "safetensors", "ninja"}
    blocked |= {"tokenizers", "sentencepiece", "rich", "matplotlib", "transformers", "peft"}
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "zinit_kernels", tmp_path / "zinit_kernels", ignore=ignore)
    program = tmp_path / "program.py"
    program.write_text(BARE.format(blocked=blocked, folder=str(tmp_path)))
    result = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, cwd=tmp_path, env={"PATH": ""}
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "ran composed\n"
