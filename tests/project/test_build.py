"""The build: what it finds, what it leaves out and says so, and what lies in the result."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from repository import ROOT

from zinit_kernels.backends import extension

OBJECTS = sorted((ROOT / "build" / "native" / "csrc" / "cpu").glob("isa_*.o"))
LIBRARY = ROOT / "zinit_kernels" / "_C_cpu.so"


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    spec = importlib.util.spec_from_file_location("zinit_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def setup(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run setup.py in `folder`; importing torch there is an error."""
    blocked = (
        "import sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; exec(open('setup.py').read())"
    )
    return subprocess.run(
        [sys.executable, "-c", f"__file__ = 'setup.py'; {blocked}", "setup.py", *command],
        cwd=folder,
        env={**os.environ, "ZINIT_TORCH_DIR": str(Path(torch.__file__).parent), **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def small_tree(build, tmp_path):
    """The project with a one-line function in place of each C++ source."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "build_backend", tmp_path / "build_backend")
    shutil.copytree(ROOT / "zinit_kernels", tmp_path / "zinit_kernels", ignore=shutil.ignore_patterns("*.so"))
    for source in build.cpu_objects(["g++"]):
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / source).write_text(f"int {Path(source).stem}() {{ return 0; }}\n")
    return tmp_path


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here")


@needs_compiler
def test_builds_incrementally_without_importing_torch(small_tree):
    first = setup(small_tree, "build_ext", "--inplace", ZINIT_BUILD="1")
    assert first.returncode == 0, first.stderr
    assert (small_tree / "zinit_kernels" / "_C_cpu.so").is_file()
    assert "no work to do" in setup(small_tree, "build_ext", "--inplace", ZINIT_BUILD="1").stdout


@pytest.mark.parametrize("command", [("build_ext", "--inplace"), ("editable_wheel", "--dist-dir", "out")])
def test_building_in_place_removes_the_parts_that_it_leaves_out(small_tree, command):
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    parts = [small_tree / "zinit_kernels" / name for name in ("_C_cpu.so", "_C_cuda.so", f"_C_host{suffix}")]
    for part in parts:
        part.write_bytes(b"of an earlier build")
    result = setup(small_tree, "--version", ZINIT_BUILD="1", ZINIT_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert all(part.exists() for part in parts)  # no other command touches them
    result = setup(small_tree, *command, ZINIT_BUILD="0")
    assert result.returncode == 0, result.stderr
    assert not any(part.exists() for part in parts)


@needs_compiler
def test_a_wheel_holds_nothing_of_an_earlier_build(small_tree):
    environment = {"ZINIT_BUILD": "1", "ZINIT_CUDA": "0"}
    assert setup(small_tree, "build", **environment).returncode == 0
    (built,) = (small_tree / "build").glob("lib*/zinit_kernels")
    for name in ("_C_cuda.so", "renamed_since.py"):
        (built / name).write_text("of an earlier build")
    result = setup(small_tree, "bdist_wheel", "--dist-dir", "out", **environment)
    assert result.returncode == 0, result.stderr
    (wheel,) = (small_tree / "out").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "zinit_kernels/_C_cpu.so" in names
    assert not {"zinit_kernels/_C_cuda.so", "zinit_kernels/renamed_since.py"} & set(names)


@needs_compiler
def test_a_compile_error_is_an_error(small_tree):
    (small_tree / "csrc" / "cpu" / "isa_generic.cpp").write_text("this is not C++\n")
    result = setup(small_tree, "build_ext", "--inplace", ZINIT_BUILD="1")
    assert result.returncode != 0
    assert "did not compile" in result.stderr
    assert not (small_tree / "zinit_kernels" / "_C_cpu.so").exists()


def test_without_native_kernels_the_wheel_is_pure_python(small_tree):
    environment = {"ZINIT_BUILD": "0", "CXX": "/nowhere/c++"}
    result = setup(small_tree, "bdist_wheel", "--dist-dir", "out", **environment)
    assert result.returncode == 0, result.stderr
    assert "installing without native kernels: ZINIT_BUILD=0" in result.stderr
    assert "zinit build" not in setup(small_tree, "egg_info", **environment).stderr  # nothing is built
    (wheel,) = (small_tree / "out").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


@pytest.mark.parametrize("command", ["bdist_wheel", "editable_wheel", "build_ext --inplace"])
def test_without_a_compiler_nothing_is_built_and_the_way_out_is_named(small_tree, command):
    """pip hides what a successful build prints, so a slow package nobody asked for would come without a word."""
    missing = {"ZINIT_BUILD": "1", "CXX": "/nowhere/c++"}
    result = setup(small_tree, *command.split(), **missing)
    assert result.returncode != 0
    assert "no C++ compiler was found (looked for /nowhere/c++)" in result.stderr
    assert "Install g++ 11 or later" in result.stderr and "ZINIT_BUILD=0 pip install ." in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(small_tree.rglob("*.whl"))
    for harmless in ("egg_info", "sdist"):  # they compile nothing
        assert setup(small_tree, harmless, **missing).returncode == 0


def test_an_old_compiler_is_named(build, tmp_path, monkeypatch):
    old = tmp_path / "g++-9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    assert build.find_compiler() == (None, f"{old} does not know C++20")


def test_zinit_build_is_0_or_1(build, monkeypatch):
    monkeypatch.setenv("ZINIT_BUILD", "false")
    with pytest.raises(SystemExit, match="ZINIT_BUILD must be 0 or 1, got 'false'"):
        build.why_pure_python()


def test_the_wheel_holds_one_package_and_serves_every_python(tmp_path):
    if not OBJECTS:
        pytest.skip("nothing compiled here: make build")
    output = ("build", "--build-base", str(tmp_path), "egg_info", "--egg-base", str(tmp_path))
    result = setup(ROOT, *output, "bdist_wheel", "--dist-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"zinit_kernels"}
    assert {"zinit_kernels/_C_cpu.so", "zinit_kernels/py.typed"} <= set(names)
    assert {"zinit_kernels/model/train.py", "zinit_kernels/evaluate/scorers/mme.py"} <= set(names)
    assert not [name for name in names if name.endswith((".cpp", ".h", ".o", ".jsonl"))]


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    return [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]


@needs_compiler
def test_the_sdist_is_the_whole_checkout_and_the_wheel_is_built_from_it(build, tmp_path):
    if not tracked():
        pytest.skip("this is no git checkout")
    checkout = tmp_path / "checkout"
    for name in tracked():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    result = setup(checkout, "sdist", "--dist-dir", str(tmp_path), ZINIT_BUILD="1")
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("zinit_kernels-*.tar.gz")
    with tarfile.open(archive) as sdist:
        sdist.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    lost = [name for name in tracked() if not (unpacked / name).is_file()]
    assert not lost

    for source in build.cpu_objects(["g++"]):  # one line each: the kernels themselves take minutes
        (unpacked / source).write_text(f"int {Path(source).stem}() {{ return 0; }}\n")
    result = setup(unpacked, "bdist_wheel", "--dist-dir", str(tmp_path), ZINIT_BUILD="1", ZINIT_CUDA="0")
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        name if name.startswith("zinit_kernels/") else f"zinit_kernels/{name}"
        for name in tracked()
        if name.endswith(".py") and name.split("/")[0] in ("zinit_kernels", "model", "evaluate")
    }
    assert modules <= names, modules - names
    assert "zinit_kernels/_C_cpu.so" in names


def test_other_processors_get_the_generic_kernels_alone(build, monkeypatch):
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    isas = [source for source in build.cpu_objects(["g++"]) if "isa_" in source]
    assert isas == ["csrc/cpu/isa_generic.cpp"]


def test_an_old_compiler_leaves_out_what_it_does_not_know(build, monkeypatch, capsys):
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build, "accepts", lambda compiler, flags: "-mavx512bf16" not in flags)
    objects = build.cpu_objects(["g++"])
    assert "csrc/cpu/isa_avx512.cpp" in objects and "csrc/cpu/isa_avx512_bf16.cpp" not in objects
    assert "-DZINIT_HAVE_AVX512_BF16" not in objects["csrc/cpu/dispatch.cpp"]
    assert "left out isa_avx512_bf16.cpp: g++ does not know -mavx512bf16" in capsys.readouterr().err


def test_torch_is_found_without_the_path_of_this_process(build, monkeypatch):
    """As in pip's isolated build: torch cannot be imported, but sys.prefix is the environment."""
    if Path(torch.__file__).parent.parent != Path(sysconfig.get_path("purelib")):
        pytest.skip("torch lies outside this environment")
    monkeypatch.delenv("ZINIT_TORCH_DIR", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert build.find_torch().version == torch.__version__
    monkeypatch.setenv("ZINIT_TORCH_DIR", "/nowhere")
    assert build.find_torch() is None


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
def test_a_folder_that_is_not_this_projects_is_neither_filled_nor_removed(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("the only copy")

    def make(target: str, folder: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["make", target, f"VENV={folder}", f"PY={sys.executable}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    result = make("build", "mine")
    assert result.returncode != 0 and "VENV=mine is not empty, and no environment of this" in result.stderr
    for folder in ("mine", "."):
        result = make("clean", folder)
        assert f"VENV={folder} is no environment of this project: left as it is" in result.stdout
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    for marker in (".ready", ".zinit_kernels"):
        (tmp_path / "ours").mkdir()
        (tmp_path / "ours" / marker).touch()
        assert make("clean", "ours").returncode == 0 and not (tmp_path / "ours").exists()


def nm(*arguments: str) -> str:
    tool = shutil.which("nm") or pytest.skip("nm (binutils) is not here")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.stem)
def test_an_instruction_set_leaks_into_no_other(path):
    """The linker keeps one copy of a weak symbol: the generic path could end in AVX-512 code."""
    symbols = nm("--demangle", str(path))
    assert not re.findall(r"^\w* [VvWwu] .*", symbols, re.MULTILINE)
    undefined = re.findall(r"^ +U (.*)", symbols, re.MULTILINE)
    assert not [name for name in undefined if "::" in name or "(" in name], undefined
    defined = re.findall(r"^\w+ [A-TX-Z] (.*)", symbols, re.MULTILINE)
    assert len(defined) == 1, f"only the kernel table may be visible, got {defined}"


def test_the_library_stays_inside_the_stable_abi():
    if not LIBRARY.exists():
        pytest.skip(extension.why_unavailable("cpu"))
    undefined = nm("-D", "--demangle", "--undefined-only", str(LIBRARY))
    assert not re.findall(r" (?:c10|at|torch|caffe2)::.*|\bPy[A-Z_]\w+", undefined)


def test_a_library_of_older_sources_is_not_used(monkeypatch):
    """It lacks the operators that came since; what calls them would end in a page of torch's words."""
    if not extension.available("cpu"):
        pytest.skip(extension.why_unavailable("cpu"))
    extension._load.cache_clear()
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: name != "zinit::decode_cpu"
    )
    try:
        reason = extension.why_unavailable("cpu")
        assert "was built from older sources: it has no zinit::decode_cpu. To build it again: " in reason
    finally:
        extension._load.cache_clear()


def test_a_library_that_does_not_load_keeps_its_reason(tmp_path, monkeypatch):
    (tmp_path / "_C_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(extension, "PACKAGE", tmp_path)
    extension._load.cache_clear()
    try:
        assert not extension.available("cpu")
        reason = extension.why_unavailable("cpu")
        assert (
            "did not load into torch" in reason and "pip install --force-reinstall --no-cache-dir" in reason
        )
        assert extension.describe().startswith("cpu: ")
    finally:
        extension._load.cache_clear()
    with pytest.raises(ValueError, match=r"name must be one of \['cpu', 'cuda'\], got 'tpu'"):
        extension.why_unavailable("tpu")


@pytest.mark.parametrize(
    "origin, source",
    [
        (None, "--editable {checkout}"),
        ({"url": "file:///home/x/my%20zinit", "dir_info": {}}, "'/home/x/my zinit'"),
        ({"url": "file:///tmp/zinit_kernels-0.1.0.tar.gz", "archive_info": {}}, "/tmp/zinit_kernels-0.1.0.tar.gz"),
        ({"url": "https://h/z.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "git+https://h/z.git@abc"),
        ({"url": "file:///tmp/zinit_kernels-0.1.0-py3-none-any.whl"}, "--no-binary zinit-kernels zinit-kernels"),
        ({}, "--no-binary zinit-kernels zinit-kernels"),  # from an index
    ],
)  # fmt: skip
def test_the_command_that_builds_what_is_missing(tmp_path, monkeypatch, origin, source):
    """pip keeps wheels: without --no-cache-dir it would install the one without kernels again."""
    monkeypatch.setattr(extension, "PACKAGE", tmp_path / "zinit_kernels")
    monkeypatch.setenv("ZINIT_BUILD", "1")
    if origin is None:
        (tmp_path / "setup.py").touch()
    else:
        (tmp_path / "zinit_kernels-0.1.0.dist-info").mkdir()
        (tmp_path / "zinit_kernels-0.1.0.dist-info" / "METADATA").write_text(
            "Name: zinit-kernels\nVersion: 0.1.0\n"
        )
        (tmp_path / "zinit_kernels-0.1.0.dist-info" / "direct_url.json").write_text(json.dumps(origin))
        monkeypatch.syspath_prepend(str(tmp_path))
    command = f"{sys.executable} -m pip install --force-reinstall --no-cache-dir --no-deps " + source.format(
        checkout=tmp_path
    )
    assert extension.build_command("cpu") == command
    assert extension.build_command("cuda") == f"ZINIT_CUDA=1 {command}"
    monkeypatch.setenv("ZINIT_BUILD", "0")
    assert extension.build_command("cpu") == f"ZINIT_BUILD=1 {command}"


def test_the_library_names_no_folder_of_the_machine_that_built_it():
    if not LIBRARY.exists():
        pytest.skip(extension.why_unavailable("cpu"))
    content = LIBRARY.read_bytes()
    for folder in (ROOT, Path(torch.__file__).parent):
        assert str(folder).encode() not in content


@pytest.fixture
def toolkit(build, tmp_path):
    """A CUDA toolkit that knows 8.0 to 9.0."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nprintf 'compute_80\\ncompute_86\\ncompute_89\\ncompute_90\\n'\n")
    nvcc.chmod(0o755)
    return sys.modules["toolchain"].Cuda(tmp_path, (12, 4), tmp_path)


def test_cuda_architectures(build, toolkit, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(build, "chips_here", lambda: [])
    codes = [flag.split(",code=")[1] for flag in build.arch_flags(toolkit)]
    assert codes == ["sm_80", "sm_86", "sm_89", "sm_90", "compute_90"]
    nvcc = toolkit.path / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("compute_90", "compute_90\\ncompute_100\\ncompute_120"))
    codes = [flag.split(",code=")[1] for flag in build.arch_flags(toolkit)]
    # PTX of 10.0 for 11.0, which lies between two chips with code of their own and takes none of 12.0's
    assert codes[3:] == ["sm_90", "sm_100", "compute_100", "sm_120", "compute_120"]
    for chips, expected in (
        (["8.9"], ["sm_89", "compute_89"]),
        (["8.0", "9.0"], ["sm_80", "sm_90", "compute_90"]),
        (["13.0"], ["sm_120", "compute_120"]),  # newer than nvcc: the driver compiles the PTX
    ):
        monkeypatch.setattr(build, "chips_here", lambda chips=chips: chips)
        assert [flag.split(",code=")[1] for flag in build.arch_flags(toolkit)] == expected
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;10.0+PTX")
    assert [flag.removeprefix("-gencode=arch=") for flag in build.arch_flags(toolkit)] == [
        "compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_100,code=sm_100", "compute_100,code=compute_100",
    ]  # fmt: skip
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0 7.5 8.0 9.0+PTX")  # as containers of all of torch have it
    codes = [flag.split(",code=")[1] for flag in build.arch_flags(toolkit)]
    assert codes == ["sm_80", "sm_90", "compute_90"]
    for wrong, words in (("Ampere", "must hold chips like"), ("7.5", "8.0 and newer")):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wrong)
        with pytest.raises(SystemExit, match=words):
            build.arch_flags(toolkit)


def test_the_chips_of_the_machine_are_asked_for(build, monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '9.0\\n7.5\\n8.0\\n9.0\\n[N/A]\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("ZINIT_VERSION_TAG", raising=False)
    assert build.chips_here() == ["8.0", "9.0"]
    monkeypatch.setenv("ZINIT_VERSION_TAG", "cu130")  # a wheel for others
    assert build.chips_here() == []
    monkeypatch.delenv("ZINIT_VERSION_TAG")
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert build.chips_here() == []


def test_without_pythons_headers_the_host_part_is_left_out(build, monkeypatch, tmp_path):
    """It is optional, and its compilation would fail the whole installation."""
    toolchain = sys.modules["toolchain"]
    monkeypatch.delenv("ZINIT_HOST", raising=False)
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    assert f"{tmp_path / 'Python.h'} is not here" in toolchain.why_no_host()
    monkeypatch.setattr(build, "cuda_for", lambda torch: (toolchain.Cuda(tmp_path, (13, 0), tmp_path), ""))
    assert build.native_parts() == [build.CPU_PART, build.CUDA_PART]
    assert "Python.h is not here" in build.BuildNative.left_out[0]
    (tmp_path / "Python.h").touch()
    assert toolchain.why_no_host() == ""
    monkeypatch.setenv("ZINIT_HOST", "0")
    assert toolchain.why_no_host() == "ZINIT_HOST=0"


@pytest.mark.parametrize(
    "codes, chip, driver, words",
    [
        (("sm_80", "sm_90", "compute_90"), 90, (13, 0), ""),
        (("sm_80",), 89, (13, 0), ""),  # of the same generation
        (("sm_89",), 80, (13, 0), "none of which runs on sm_80"),
        (("sm_80", "sm_86"), 90, (13, 0), "none of which runs on sm_90: TORCH_CUDA_ARCH_LIST=9.0 "),
        (("sm_100", "compute_100"), 110, (13, 1), ""),
        (("sm_120", "compute_120"), 110, (13, 0), "none of which runs on sm_110"),
        (("sm_90a", "compute_90a"), 100, (13, 0), "none of which runs on sm_100"),
        (("sm_100f",), 103, (13, 0), ""),
        (("sm_90",), 90, (12, 8), "this driver knows CUDA 12.8 at most"),
        (("sm_90",), 90, (13, 0), ""),
        (("compute_90",), 90, (13, 0), "the driver must know CUDA 13.1, it knows 13.0"),
        (("compute_90",), 90, (13, 1), ""),
    ],
)
def test_a_library_for_other_chips_or_drivers_is_not_usable(codes, chip, driver, words):
    reason = extension.CudaBuild((13, 1), codes).why_not_on(chip, driver)
    assert words in reason if words else not reason


def test_what_the_cuda_kernels_need_is_said(build, toolkit, monkeypatch):
    toolchain = sys.modules["toolchain"]
    cpu, gpu = (toolchain.Torch(Path(), "2.13.0", cuda) for cuda in (None, "13.0"))
    monkeypatch.delenv("ZINIT_CUDA", raising=False)
    monkeypatch.setattr(toolchain, "find_cuda", lambda: (toolkit, ""))
    assert toolchain.cuda_for(gpu) == (toolkit, "")
    assert toolchain.cuda_for(cpu) == (
        None, "torch 2.13.0 was built without CUDA; ZINIT_CUDA=1 builds them all the same",
    )  # fmt: skip
    monkeypatch.setenv("ZINIT_CUDA", "1")
    assert toolchain.cuda_for(cpu) == (toolkit, "")
    monkeypatch.setattr(toolchain, "find_cuda", lambda: (None, "no CUDA toolkit"))
    with pytest.raises(SystemExit, match="ZINIT_CUDA=1, but no CUDA toolkit"):
        toolchain.cuda_for(gpu)
    monkeypatch.setenv("ZINIT_CUDA", "0")
    assert toolchain.cuda_for(gpu) == (None, "ZINIT_CUDA=0")
    monkeypatch.setenv("ZINIT_CUDA", "perhaps")
    with pytest.raises(SystemExit, match="ZINIT_CUDA must be auto, 0 or 1, got 'perhaps'"):
        toolchain.cuda_for(gpu)


def test_a_missing_or_old_toolkit_is_named(build, toolkit, monkeypatch):
    toolchain = sys.modules["toolchain"]
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert toolchain.find_cuda()[1].startswith(
        "no CUDA toolkit (nvcc, its headers and libcudart_static.a) in /nowhere"
    )
    monkeypatch.setenv("CUDA_HOME", str(toolkit.path))
    (toolkit.path / "bin" / "nvcc").write_text(
        "#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n"
    )
    for file in ("include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (toolkit.path / file).parent.mkdir()
        (toolkit.path / file).touch()
    assert toolchain.find_cuda() == (None, "nvcc 11.8 is older than 12.4")


def test_the_cuda_library_loads_without_a_gpu():
    library = ROOT / "zinit_kernels" / "_C_cuda.so"
    if not library.exists():
        pytest.skip(extension.why_unavailable("cuda"))
    assert extension.available("cuda"), extension.why_unavailable("cuda")
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key("zinit::decode_cuda", "CUDA")
    undefined = nm("-D", "--demangle", "--undefined-only", str(library))
    assert not re.findall(r" (?:c10|at|torch|caffe2)::.*|\bPy[A-Z_]\w+", undefined)
