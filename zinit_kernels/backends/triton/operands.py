"""What the kernels take of torch tensors: pointers with strides, the prompt table, the chip."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LARGEST_TOKEN_STRIDE = 1 << 24  # offsets inside a tile of 128 rows stay int32


class View(NamedTuple):
    """A [batch, head, token, D] tensor and the strides of its first three dimensions; None is an absent tensor."""

    ptr: Tensor | None
    batch: int
    head: int
    token: int


class Prompt:
    """A prompt table as kernels take it; without rows or prompts its pointers are None."""

    def __init__(self, key: Tensor | None, value: Tensor | None, gate: Tensor | None) -> None:
        self.key = self.value = view_of(None)
        self.gate: Tensor | None = None
        self.length = self.rows = self.gate_rows = self.gate_stride = 0
        if key is None or value is None or gate is None or 0 in (key.shape[0], key.shape[2]):
            return
        gate = gate.reshape(-1, gate.shape[-1])  # a decoding step's may be [Hq]
        self.key, self.value, self.gate = view_of(key), view_of(value), gate.contiguous()
        self.rows, self.length = key.shape[0], key.shape[2]
        self.gate_rows = gate.shape[0]
        self.gate_stride = gate.shape[1] if gate.shape[0] > 1 else 0


def token_major_like(tensor: Tensor) -> Tensor:
    batch, heads, seqlen, head_dim = tensor.shape
    return tensor.new_empty((batch, seqlen, heads, head_dim)).transpose(1, 2)


def view_of(tensor: Tensor | None) -> View:
    return View(None, 0, 0, 0) if tensor is None else View(tensor, *tensor.stride()[:3])


def addressable(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(2) < _LARGEST_TOKEN_STRIDE else tensor.contiguous()


def num_sequences(query: Tensor, cu_seqlens: Tensor | None) -> int:
    return query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def arch_of(tensor: Tensor) -> int:
    """10 * major + minor of the tensor's chip; 0 under the interpreter, and on AMD chips, which nobody has tried."""
    if tensor.device.type != "cuda" or torch.version.hip:
        return 0
    chip = torch.cuda.get_device_properties(tensor.device)
    return 10 * chip.major + chip.minor


def num_processors(tensor: Tensor) -> int:
    """Streaming multiprocessors of the tensor's chip; of an imagined small one under the interpreter."""
    if tensor.device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
