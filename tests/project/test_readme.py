"""README.md and docs/: their Python examples run, their links, files, commands and make targets are there."""

import importlib
import importlib.util
import re
import shlex

import pytest
import torch
from benchmark_folders import scienceqa
from repository import ROOT
from tiny_runs import make_folder

import zinit_kernels
from zinit_kernels import cli

GENERATED = ("benchmarks.md", "results.md")  # written by the commands named report, and tested there
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in GENERATED),
]
PROSE = [
    *PAGES,
    *(ROOT / f"{name}.md" for name in ("DESIGN", "CONTRIBUTING", "CHANGELOG", "csrc/cuda/README")),
]
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL), 1)
]


def tiny(name: str):
    """A model in the place of one that an example downloads."""
    import transformers

    kind, layers = {"huggyllama/llama-7b": ("Llama", 30), "Qwen/Qwen3-0.6B": ("Qwen3", 3)}[name]
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=128,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.mark.parametrize("code", EXAMPLES)
def test_python_example_runs(code, monkeypatch):
    for package in ("transformers", "peft", "litgpt"):
        if f"from {package}" in code:
            pytest.importorskip(package)
    if "AutoModelForCausalLM" in code:
        import transformers

        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", staticmethod(tiny))
    torch.manual_seed(0)
    names: dict = {}
    exec(code, names)
    if "answers" in names:
        check_answers(names)
    if ".backward()" in code:
        gates = [names["gate"]] if "gate" in names else named_gates(names.get("model", names.get("layer")))
        assert gates and all(gate.grad.isfinite().all() and gate.grad.abs().sum() > 0 for gate in gates)


def check_answers(names):
    """Those of the same requests, one at a time."""
    found = [(answer.prompt_ids, answer.generated_tokens) for answer in names["answers"].values()]
    for request in names["requests"]:
        tokens = names["model"].generate(torch.tensor([request]), names["generation"])[0].tolist()
        assert (request, tokens[len(request) :]) in found
    assert len(found) == len(names["requests"])


def named_gates(model):
    gates = [p for name, p in model.named_parameters() if name.endswith(("gate", "gating_factor"))]
    return [gate for gate in gates if gate.requires_grad]


def test_the_readmes_programs_run_one_after_the_other(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text().split("## Train and generate")[1].split("\n## ")[0]
    commands = [
        shlex.split(line, comments=True) for line in re.findall(r"^    (zinit .*)", text, re.MULTILINE)
    ]
    assert [command[1] for command in commands] == ["train", "generate", "serve", "evaluate", "convert"]
    pytest.importorskip("fastapi")
    served = []
    server = importlib.import_module(f"{cli._package('model')}.serving.server")  # installed or not
    monkeypatch.setattr(server, "serve", lambda _, service, *__: served.append(service.models))
    folder = make_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    scienceqa(tmp_path / "ScienceQA", images=False)
    there = {"DIR": str(folder / "base"), "records.jsonl": str(folder / "data.jsonl")}
    for _, *arguments in commands:
        with pytest.raises(SystemExit) as exit:
            cli.main([there.get(word, word) for word in arguments])
        assert exit.value.code == 0, arguments
    assert len(served) == 1 and "colours" in served[0]


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"https?:", target):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_files_and_commands_that_are_named_exist(page):
    text = page.read_text()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^ +)make ([a-z-]+)", text, re.MULTILINE)) <= set(targets)
    for module in set(re.findall(r"python -m ([a-z_.]+)", text)) & {
        "model",
        "bench",
        "evaluate",
        "zinit_kernels",
    }:
        assert importlib.util.find_spec(module) is not None, module
    for path in re.findall(
        r"`((?:bench|csrc|docs|evaluate|examples|model|scripts|tests|zinit_kernels)/[\w./]+)`", text
    ):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`(\w+\.py)`", text) if page.name == "examples.md" else ():
        assert (ROOT / "examples" / path).exists(), path
    programs = re.findall(r"^ {4}zinit (\w+)|`zinit (\w+)", text, re.MULTILINE)
    assert {a or b for a, b in programs} <= {*cli.OWN, *cli.MODEL, *cli.EVALUATE}


def test_the_readme_is_short():
    """A newcomer reads it whole; the rest belongs into docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_public_names_are_documented():
    guide = (ROOT / "docs" / "op.md").read_text()
    api = (ROOT / "docs" / "api.md").read_text()
    for name in zinit_kernels.__all__:
        assert f"`{name}" in guide, f"{name} is exported but not in docs/op.md"
        assert f"::: zinit_kernels.{name}\n" in api, f"{name} is exported but not in docs/api.md"
        assert getattr(zinit_kernels, name).__doc__


def test_the_environment_variables_are_documented():
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "environment.md").read_text()))
    sources = [*ROOT.glob("zinit_kernels/**/*.py"), *ROOT.glob("build_backend/*.py"), ROOT / "setup.py"]
    read = {
        name
        for source in [*sources, *ROOT.glob("bench/**/*.py"), ROOT / "tests" / "conftest.py"]
        for name in re.findall(
            r"environ(?:\.get\(|\[)\s*[\"']((?:ZINIT|TRITON|TORCH|CUDA)_\w+)", source.read_text()
        )
    }
    assert read and read <= documented, read - documented


def test_the_extras_are_documented():
    install = (ROOT / "docs" / "install.md").read_text()
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    extras = re.findall(r"^([\w-]+) = \[", section.split("\n[")[0], re.MULTILINE)
    for extra in extras:
        assert extra == "dev" or f"'.[{extra}]'" in install, extra
