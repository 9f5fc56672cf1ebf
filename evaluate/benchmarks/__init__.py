"""The benchmarks that ask a model about images: how their files are read, what is asked, and their tables.

A benchmark is a module that defines BENCHMARK. `all_benchmarks` finds it, so adding one takes one file.
"""

from __future__ import annotations

import importlib
import pkgutil

from ..question import Benchmark


def all_benchmarks() -> dict[str, Benchmark]:
    """Name -> benchmark, of every module of this folder that defines one."""
    modules = (
        importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)
    )
    found = [module.BENCHMARK for module in modules if hasattr(module, "BENCHMARK")]
    return {benchmark.name: benchmark for benchmark in found}
