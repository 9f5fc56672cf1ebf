"""Finds and loads the compiled operators, and keeps the reason where there are none.

A library is loaded once, on the first question about it. It registers its kernels for the schemas of
`schemas.py`, which may be imported before or after.
"""

import platform
import sys
from functools import cache
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent.parent
LIBRARIES = {"cpu": "_C_cpu.so"}


@cache
def _load(name: str) -> str:
    """Load the library of a backend; '' if its operators are ready, else the reason why not."""
    library = PACKAGE / LIBRARIES[name]
    if not library.is_file():
        if not sys.platform.startswith("linux"):
            return f"the native kernels are built on Linux only, this is {platform.system()}"
        return (
            f"{library} was not built: there was no C++ compiler when zinit_kernels was installed, or "
            "ZINIT_BUILD=0 was set; install g++ 11 or later and install the package again"
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library} did not load into torch {torch.__version__}: {error}"
    return ""


def available(name: str) -> bool:
    """Whether the operators of the compiled backend `name` ("cpu") can be called."""
    return not why_unavailable(name)


def why_unavailable(name: str) -> str:
    """The reason why the compiled backend `name` cannot be called; '' where it can."""
    if name not in LIBRARIES:
        raise ValueError(f"name must be one of {sorted(LIBRARIES)}, got {name!r}")
    return _load(name)


def describe() -> str:
    """One line per compiled backend: the instruction set it chose, or why there is none."""
    return f"cpu: {why_unavailable('cpu') or torch.ops.zinit.cpu_capability()}"
