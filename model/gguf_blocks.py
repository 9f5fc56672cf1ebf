"""Blocks of GGUF files, packed as they are: the same codes and scales in another order."""

from __future__ import annotations

import torch
from torch import Tensor

from zinit_kernels.packed import PackedWeight, pack

from .gguf_file import GGUF

_BLOCK = 32  # numbers
BLOCKS = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}  # type -> bytes of a block
_ROWS_AT_ONCE = 1 << 12  # a multiple of the 16 rows of a panel


def packed_blocks(gguf: GGUF, name: str, order: Tensor | None = None) -> PackedWeight:
    """A matrix of Q8_0, Q4_0 or Q4_1 blocks, its rows in this order. The file's pages are read once.

    A block is a float16 scale, in Q4_1 a float16 min, then 32 codes: bytes, or 16 bytes of which the low halves are the
    first 16 codes and the high halves the last.
    """
    info = gguf.tensors[name]
    kind, (rows, columns) = info.type.name, info.shape
    blocks = torch.from_numpy(gguf.bytes_of(name)).view(rows, columns // _BLOCK, BLOCKS[kind])
    parts = []
    for start in range(0, rows, _ROWS_AT_ONCE):
        end = min(start + _ROWS_AT_ONCE, rows)
        part = blocks[start:end] if order is None else blocks[order[start:end]]
        parts.append(_pack(part, kind).data)
    first = _pack(blocks[:1], kind)
    return PackedWeight(torch.cat(parts), rows, columns, first.scheme)


def _pack(blocks: Tensor, kind: str) -> PackedWeight:
    head = 4 if kind == "Q4_1" else 2
    numbers = blocks[..., :head].contiguous().view(torch.float16)
    scales, mins = numbers[..., 0], numbers[..., 1] if kind == "Q4_1" else None
    codes = blocks[..., head:]
    if kind == "Q8_0":
        return pack(codes.flatten(1).view(torch.int8), scales, None, 8)
    return pack(torch.cat([codes & 15, codes >> 4], -1).flatten(1), scales, mins, 4)
