"""The weights of a model in memory that the processor maps 2 MiB at a time.

Who reads memory from one end to the other, as decoding reads weights, asks for the address of a page every 4 KiB. In a
virtual machine (AMD EPYC, 2 cores) one thread reads 16.1 GB/s from such pages and 31.3 from huge ones, two threads read
25.8 and 35.5. Linux makes huge pages of memory that asks for them; a mapped file has none.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor, nn

_HUGE = 2 << 20  # bytes of a huge page
_ALIGNMENT = 64  # bytes: a line of the cache
_MEMORY = Path("/proc/meminfo")


def use_huge_pages(model: nn.Module) -> bool:
    """Moves a frozen model's weights, buffers too, into one block of huge pages. Returns whether it did.

    It does nothing, and the weights stay where they are, on other devices than a CPU, where the system has no huge
    pages to ask for, and where the weights take more than half of the memory that is free: those of a mapped file need
    not fit into it.
    """
    places = [
        (held, name, tensor)
        for module in model.modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None and type(tensor) in (Tensor, nn.Parameter)
    ]
    if any(tensor.device.type != "cpu" or tensor.requires_grad for _, _, tensor in places):
        return False
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for _, _, tensor in places]
    if not places or 2 * sum(sizes) > _free_memory() or (block := _block(sum(sizes))) is None:
        return False
    begin = 0
    moved: dict[int, Tensor] = {}  # weights that two modules share stay one
    for index, (held, name, tensor) in enumerate(places):
        if id(tensor) not in moved:
            place = block[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            with torch.no_grad():
                place.copy_(tensor)
            moved[id(tensor)] = nn.Parameter(place, False) if isinstance(tensor, nn.Parameter) else place
        held[name] = moved[id(tensor)]
        begin += sizes[index]
    return True


def _block(size: int) -> Tensor | None:
    """Bytes of anonymous memory that begin at a huge page; None where the system gives none."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return None
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping as long as a weight lives
    return whole[-whole.data_ptr() % _HUGE :][:size]


def _free_memory() -> int:
    """Bytes that can be had without swapping; 0 where the system does not say."""
    try:
        lines = _MEMORY.read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)
