"""What the build takes from this machine: a C++ compiler and torch's headers. torch is not imported."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

MIN_TORCH = (2, 11)
MIN_CUDA = (12, 4)
CUDA_LIBRARIES = ("lib64", "lib", "targets/*/lib", "lib/*-linux-gnu")
STABLE_HEADER = "include/torch/csrc/stable/library.h"


class Torch(NamedTuple):
    path: Path
    version: str
    cuda: str | None  # the version of CUDA it was built with


class Cuda(NamedTuple):
    path: Path
    version: tuple[int, int]
    libraries: Path


def fail(message: str):
    raise SystemExit(f"\n[zinit build] error: {message}\n")


def why_pure_python() -> str:
    """Why an installation is to have no native kernels, though nothing is wrong; '' if it is to have them."""
    wanted = os.environ.get("ZINIT_BUILD", "1")
    if wanted not in ("0", "1"):
        fail(f"ZINIT_BUILD must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return "ZINIT_BUILD=0"
    return "" if sys.platform.startswith("linux") else f"they are built on Linux only, this is {sys.platform}"


def why_no_host() -> str:
    """Why _C_host is not built beside the CUDA kernels; '' if it is. It alone needs Python's headers."""
    if os.environ.get("ZINIT_HOST", "1") == "0":
        return "ZINIT_HOST=0"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.is_file() else f"{header} is not here (Debian, Ubuntu: apt-get install python3-dev)"


def find_compiler() -> tuple[list[str] | None, str]:
    """The C++ compiler as a command line, or None and what is missing."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in names:
        command = shlex.split(name)
        if shutil.which(command[0]):
            if accepts(command, ["-std=c++20"]):
                return command, ""
            return None, f"{name} does not know C++20"
    return None, f"no C++ compiler was found (looked for {', '.join(names)})"


def accepts(compiler: list[str], flags: list[str]) -> bool:
    check = [*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(check, capture_output=True).returncode == 0


def find_cuda() -> tuple[Cuda | None, str]:
    """The CUDA toolkit, or None and why there will be no CUDA kernels."""
    nvcc = shutil.which("nvcc")
    named = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = named or ["/usr/local/cuda", *([str(Path(nvcc).resolve().parent.parent)] if nvcc else [])]
    for folder in map(Path, folders):
        if not (folder / "bin" / "nvcc").is_file() or not (folder / "include" / "cuda_runtime.h").is_file():
            continue
        runtimes = [path for where in CUDA_LIBRARIES for path in folder.glob(f"{where}/libcudart_static.a")]
        if not runtimes:
            continue
        text = subprocess.run([folder / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
        major, minor = re.search(r"release (\d+)\.(\d+)", text).groups()
        version = int(major), int(minor)
        if version < MIN_CUDA:
            return None, f"nvcc {major}.{minor} is older than {MIN_CUDA[0]}.{MIN_CUDA[1]}"
        return Cuda(folder, version, runtimes[0].parent), ""
    return (
        None,
        f"no CUDA toolkit (nvcc, its headers and libcudart_static.a) in {', '.join(folders)}; CUDA_HOME names another",
    )


def cuda_for(torch: Torch | None) -> tuple[Cuda | None, str]:
    """The toolkit for building the CUDA kernels against this torch, or None and why they are left out."""
    wanted = os.environ.get("ZINIT_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        fail(f"ZINIT_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None, "ZINIT_CUDA=0"
    cuda, reason = find_cuda()
    if cuda is None and wanted == "1":
        fail(f"ZINIT_CUDA=1, but {reason}")
    if wanted == "auto" and cuda is not None and torch is not None and torch.cuda is None:
        return None, f"torch {torch.version} was built without CUDA; ZINIT_CUDA=1 builds them all the same"
    return cuda, reason


def find_torch() -> Torch | None:
    """The torch to compile against: ZINIT_TORCH_DIR, else what Python would import, else the environment's.

    pip's isolated build hides the environment's packages from sys.path, but sys.prefix, and so sysconfig,
    still point at the environment being installed into.
    """
    for path in _candidates():
        if (path / STABLE_HEADER).is_file():
            values = _assigned_strings(path / "version.py")
            version = values["__version__"]
            if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= MIN_TORCH:
                return Torch(path, version, values.get("cuda"))
    return None


def _candidates() -> list[Path]:
    if os.environ.get("ZINIT_TORCH_DIR"):
        return [Path(os.environ["ZINIT_TORCH_DIR"])]
    found = []
    spec = importlib.util.find_spec("torch")  # finds, does not import
    if spec and spec.submodule_search_locations:
        found.append(Path(next(iter(spec.submodule_search_locations))))
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    folders.append(site.getusersitepackages())
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if os.environ.get(variable):
            folders.append(str(Path(os.environ[variable], "lib", python, "site-packages")))
    return list(dict.fromkeys(found + [Path(folder) / "torch" for folder in folders]))


def _assigned_strings(source: Path) -> dict[str, str]:
    """`name = "text"` lines of a Python file, read without running it."""
    values = {}
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                values[target.id] = node.value.value
    return values
