"""Finds and loads the compiled operators, and keeps the reason where there are none, with the command that helps.

A library is loaded once, on the first question about it. It registers its kernels for the schemas of
`operators.py`, which may be imported before or after.
"""

import ctypes
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

PACKAGE = Path(__file__).resolve().parent.parent
LIBRARIES = {"cpu": "_C_cpu.so", "cuda": "_C_cuda.so"}
NEEDED_TO_BUILD = {"cpu": "g++ 11 or later", "cuda": "nvcc 12.4 or later and a torch built for CUDA"}


@cache
def _load(name: str) -> str:
    """Load the library of a backend; '' if its operators are ready, else the reason why not."""
    library = PACKAGE / LIBRARIES[name]
    if not library.is_file():
        if not sys.platform.startswith("linux"):
            return f"the native kernels are built on Linux only, this is {platform.system()}"
        return f"{library} was not built. Install {NEEDED_TO_BUILD[name]}, then run: {build_command(name)}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        again = f"To build it again: {build_command(name)}"
        return f"{library} did not load into torch {torch.__version__}: {error}. {again}"
    if missing := _without_kernel(name):
        return (
            f"{library} was built from older sources: it has no {', '.join(missing)}. To build it again: "
            f"{build_command(name)}"
        )
    return ""


def _without_kernel(name: str) -> list[str]:
    """The operators of a backend, defined so far, that have no kernel: an update came without a build."""
    defined = torch._C._dispatch_get_all_op_names()
    own = sorted(op for op in defined if op.startswith("zinit::") and op.endswith(f"_{name}"))
    key = "CompositeExplicitAutograd"  # for which csrc/ registers its kernels
    return [op for op in own if not torch._C._dispatch_has_kernel_for_dispatch_key(op, key)]


def build_command(name: str) -> str:
    """The shell command that installs the package again with the compiled backend `name`, from where it came from.

    --no-cache-dir, because pip would take the wheel without kernels that it kept.
    """
    switches = {"ZINIT_BUILD": os.environ.get("ZINIT_BUILD") == "0", "ZINIT_CUDA": name == "cuda"}
    words = [f"{switch}=1" for switch, is_needed in switches.items() if is_needed]
    words += [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--force-reinstall",
        "--no-cache-dir",
        "--no-deps",
        *_source(),
    ]
    return shlex.join(words)


def _source() -> list[str]:
    """pip's words for what this installation was made of: a checkout, or what PEP 610's direct_url.json records."""
    if (PACKAGE.parent / "setup.py").is_file():
        return ["--editable", str(PACKAGE.parent)]
    try:
        origin = json.loads(
            importlib.metadata.distribution("zinit-kernels").read_text("direct_url.json") or "{}"
        )
    except (importlib.metadata.PackageNotFoundError, ValueError):
        origin = {}
    url, version_control = origin.get("url", ""), origin.get("vcs_info")
    if version_control:
        return [f"{version_control['vcs']}+{url}@{version_control['commit_id']}"]
    if url.startswith("file:") and not url.endswith(".whl"):
        return [url2pathname(urlsplit(url).path)]
    return ["--no-binary", "zinit-kernels", "zinit-kernels"]


@cache
def warn_without_cpu_kernels() -> None:
    """Says once that calls on CPU tensors take the slow way, and what helps; nothing where nothing would help."""
    if sys.platform.startswith("linux"):
        warnings.warn(
            f"zinit_kernels computes in plain PyTorch, several times slower than its CPU kernels: {_load('cpu')}",
            RuntimeWarning,
            stacklevel=5,  # of the caller of zero_init_attention
        )


def available(name: str) -> bool:
    """Whether the operators of the compiled backend `name` ("cpu" or "cuda") can be called."""
    return not why_unavailable(name)


def why_unavailable(name: str) -> str:
    """The reason why the compiled backend `name` cannot be called; '' where it can."""
    if name not in LIBRARIES:
        raise ValueError(f"name must be one of {sorted(LIBRARIES)}, got {name!r}")
    return _load(name)


def build_facts() -> dict[str, Any]:
    """How the CUDA kernels were built: cuda, torch, archs, and per kernel registers, stack and spilled bytes; {} if
    they were not, or without pybind11."""
    try:
        host = importlib.import_module("zinit_kernels._C_host")
    except ImportError:
        return {}
    return {**json.loads(host.build_facts), "kernels": json.loads(host.kernel_facts)}


class CudaBuild(NamedTuple):
    """toolkit: of nvcc, (13, 0). codes: what the kernels were compiled for: sm_90 (machine code), compute_90 (PTX)."""

    toolkit: tuple[int, int]
    codes: tuple[str, ...]

    def why_not_on(self, chip: int, driver: tuple[int, int]) -> str:
        """The reason why the kernels cannot run on a chip (90 is sm_90); '' if they can.

        driver: `driver_version`. Machine code needs the toolkit's major version of it, PTX the minor one too.
        """
        made = f"the CUDA kernels were built by nvcc {'.'.join(map(str, self.toolkit))}"
        if driver < (self.toolkit[0], 0):
            return (
                f"{made}, and this driver knows CUDA {driver[0]}.{driver[1]} at most: install a newer driver, or build "
                f"with a CUDA {driver[0]} toolkit: CUDA_HOME=... {build_command('cuda')}"
            )
        running = [code for code in self.codes if _runs(code, chip)]
        again = f"TORCH_CUDA_ARCH_LIST={chip // 10}.{chip % 10} {build_command('cuda')}"
        if any(code.startswith("sm_") for code in running) or (running and driver >= self.toolkit):
            return ""
        if running:
            return (
                f"{made} for {', '.join(self.codes)}; to compile {running[-1]} for sm_{chip} the driver must know CUDA "
                f"{'.'.join(map(str, self.toolkit))}, it knows {driver[0]}.{driver[1]}: {again}"
            )
        return f"{made} for {', '.join(self.codes)}, none of which runs on sm_{chip}: {again}"


def _runs(code: str, chip: int) -> bool:
    """Whether a chip runs what was compiled for a code, by CUDA's rules of compatibility."""
    kind, _, name = code.partition("_")
    number = int(name.rstrip("af"))
    if name.endswith("a"):  # of one chip alone
        return number == chip
    if kind == "sm" or name.endswith("f"):  # of one generation
        return number // 10 == chip // 10 and number <= chip
    return number <= chip


def driver_version() -> tuple[int, int]:
    """The newest CUDA that the machine's driver knows, (12, 8); (99, 0) where it does not say."""
    known = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(known))
    except (OSError, AttributeError):
        failed = 1
    return (99, 0) if failed or not known.value else (known.value // 1000, known.value % 1000 // 10)


def cuda_build() -> CudaBuild:
    """How the loaded CUDA kernels were built."""
    toolkit, *codes = torch.ops.zinit.cuda_build().split()
    major, minor = map(int, toolkit.split("."))
    return CudaBuild((major, minor), tuple(codes))


def describe() -> str:
    """One line per compiled backend: the CPU's instruction set, "loaded", or why there is none."""
    cpu = why_unavailable("cpu") or torch.ops.zinit.cpu_capability()
    cuda = why_unavailable("cuda") or f"loaded {', '.join(cuda_build().codes)}"
    return f"cpu: {cpu}\ncuda: {cuda}"
