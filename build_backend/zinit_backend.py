"""setuptools' PEP 517 backend with two rules added: torch is a build requirement only where none can be found, and
pybind11 only where the CUDA kernels are built.

Listed in pyproject.toml, torch would be downloaded (2.5 GB with CUDA) into every isolated build, in its
newest version, although all the build reads is the headers of the torch already in the environment.
"""

import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (the rest of the PEP 517 hooks, unchanged)

sys.path.insert(0, str(Path(__file__).parent))
from toolchain import (  # noqa: E402 (needs the line above)
    MIN_TORCH,
    cuda_for,
    find_compiler,
    find_torch,
    why_no_host,
    why_pure_python,
)


def _headers() -> list[str]:
    compiler, _ = find_compiler()
    if why_pure_python() or compiler is None:  # nothing to compile, or nothing to compile with
        return []
    torch = find_torch()
    cuda, _ = cuda_for(torch)
    headers = [] if torch is not None else [f"torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}"]
    return headers + (["pybind11>=2.13"] if cuda is not None and not why_no_host() else [])


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _headers()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _headers()
