"""Finds and loads the compiled operators, and keeps the reason where there are none.

A library is loaded once, on the first question about it. It registers its kernels for the schemas of
`schemas.py`, which may be imported before or after.
"""

import importlib
import json
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent.parent
LIBRARIES = {"cpu": "_C_cpu.so", "cuda": "_C_cuda.so"}
NEEDED_TO_BUILD = {
    "cpu": "C++ compiler (g++ 11 or later)",
    "cuda": "nvcc 12.4 or later beside a torch built for CUDA",
}


@cache
def _load(name: str) -> str:
    """Load the library of a backend; '' if its operators are ready, else the reason why not."""
    library = PACKAGE / LIBRARIES[name]
    if not library.is_file():
        if not sys.platform.startswith("linux"):
            return f"the native kernels are built on Linux only, this is {platform.system()}"
        return (
            f"{library} was not built: ZINIT_BUILD=0 was set when zinit_kernels was installed, or there was no "
            f"{NEEDED_TO_BUILD[name]}; install the package again with it"
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library} did not load into torch {torch.__version__}: {error}"
    return ""


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


def describe() -> str:
    """One line per compiled backend: the CPU's instruction set, "loaded", or why there is none."""
    cpu = why_unavailable("cpu") or torch.ops.zinit.cpu_capability()
    archs = ", ".join(build_facts().get("archs", ()))
    return f"cpu: {cpu}\ncuda: {why_unavailable('cuda') or f'loaded {archs}'.rstrip()}"
