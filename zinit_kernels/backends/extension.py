"""Finds and loads the compiled operators, and keeps the reason where there are none, with the command that helps.

A library is loaded once, on the first question about it. It registers its kernels for the schemas of
`operators.py`, which may be imported before or after.
"""

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
from typing import Any
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
    return ""


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


def describe() -> str:
    """One line per compiled backend: the CPU's instruction set, "loaded", or why there is none."""
    cpu = why_unavailable("cpu") or torch.ops.zinit.cpu_capability()
    archs = ", ".join(build_facts().get("archs", ()))
    return f"cpu: {cpu}\ncuda: {why_unavailable('cuda') or f'loaded {archs}'.rstrip()}"
