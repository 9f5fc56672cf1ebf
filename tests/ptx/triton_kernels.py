"""The Triton backend on CPU tensors by way of what Triton compiles for a chip: its PTX, interpreted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import ptx_machine
import ptx_module
import pytest
import torch
import triton
from ptx_counters import Counters
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from zinit_kernels.backends import triton as backend
from zinit_kernels.backends.hybrid import run as hybrid_run
from zinit_kernels.backends.triton import few_rows_launch, launch, prompt_launch

PROCESSORS = 8  # as many as Triton's own interpreter is told


class Chip:
    """Launches of Triton kernels, compiled for sm_`arch` and interpreted.

    change: PTX -> PTX, to plant a bug. launched: the names of the kernels that have run. counted: their counters.
    """

    def __init__(self, arch: int, change: Callable[[str], str] = lambda text: text) -> None:
        self.arch, self.change = arch, change
        self.tensors: list[torch.Tensor] = []
        self.launched: list[str] = []
        self.counted: dict[str, Counters] | None = None  # by kernel, where it is a dictionary
        self._entries: dict[str, ptx_module.Entry] = {}

    def run(self, compiled, grid: tuple[int, ...], arguments) -> None:
        text = compiled.asm["ptx"]
        if text not in self._entries:
            (self._entries[text],) = ptx_module.parse(self.change(text)).values()
        entry = self._entries[text]
        memory = ptx_machine.Buffers()
        values: list[int | float] = []
        for kind, argument in zip(compiled.src.signature.values(), arguments, strict=True):
            _flatten(kind, argument, values, memory)
        scratch = len(entry.parameter_types) - len(values)  # memory that these kernels do not use
        values += [0] * scratch
        grid = (*grid, 1, 1)[:3]
        self.launched.append(entry.name)
        threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
        counters = None if self.counted is None else self.counted.setdefault(entry.name, Counters())
        ptx_machine.run(entry, grid, threads, shared, entry.pack(values), memory, counters)


def _flatten(kind, argument, values: list[int | float], memory: ptx_machine.Buffers) -> None:
    """Adds a kernel's argument as the compiled kernel takes it; what is compiled in, it does not take."""
    if isinstance(kind, tuple):
        for one, part in zip(kind, argument, strict=True):
            _flatten(one, part, values, memory)
    elif kind != "constexpr":
        if isinstance(argument, torch.Tensor):
            memory.add(argument.untyped_storage().data_ptr(), argument.untyped_storage().nbytes())
            argument = argument.data_ptr()
        values.append(argument)


@contextlib.contextmanager
def operators() -> Iterator[None]:
    """The operators of the backends "triton" and "hybrid" on CPU tensors."""
    library = torch.library.Library("zinit", "IMPL")
    for stage in ("forward", "backward", "decode"):
        library.impl(f"{stage}_triton", getattr(launch, stage), "CPU")
    for stage in ("forward", "backward"):
        library.impl(f"{stage}_hybrid", getattr(hybrid_run, stage), "CPU")
    try:
        yield
    finally:
        library._destroy()


@contextlib.contextmanager
def without_machine_code() -> Iterator[None]:
    """Triton compiles down to PTX, and ptxas is left out; in a cache of its own, since a GPU needs the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CUDABackend, "make_cubin", lambda *_: b"")
        patch.setattr(triton.knobs.cache, "dir", str(Path(triton.knobs.cache.dir) / "ptx"))
        yield


def install(monkeypatch: pytest.MonkeyPatch, chip: Chip) -> None:
    """The backends "triton" and "hybrid" compile for the chip and interpret, until the test ends."""
    compile_only = triton.runtime.jit.JITFunction.run

    def run(kernel, *args, grid, warmup, **named):
        with without_machine_code():
            compiled = compile_only(kernel, *args, grid=grid, warmup=True, **named)
        given = dict(zip(kernel.arg_names, args, strict=False)) | named
        chip.run(compiled, grid, [given[name] for name in kernel.arg_names])
        return compiled

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", chip.arch, 32),
        get_current_device=lambda: chip.arch,  # Triton keeps what it has compiled by device
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    for module in (launch, prompt_launch, few_rows_launch):
        monkeypatch.setattr(module, "arch_of", lambda tensor: chip.arch)
    for module in (launch, few_rows_launch):
        monkeypatch.setattr(module, "num_processors", lambda tensor: PROCESSORS)
    monkeypatch.setattr(backend, "_why_not_here", lambda call: "")
