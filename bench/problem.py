"""The tensors of one measured call, the same for every provider."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .shapes import Shape

NAMES = ("query", "key", "value", "prompt_key", "prompt_value", "gate")


@dataclass(frozen=True)
class Problem:
    """query [B, Hq, T, D]; key, value [B, Hkv, S, D], any strides; prompts [1, Hkv, P, D]; gate float32 [Hq], raw."""

    shape: Shape
    query: Tensor
    key: Tensor
    value: Tensor
    prompt_key: Tensor
    prompt_value: Tensor
    gate: Tensor
    layout: str = "head-major"  # of key and value in memory, or token-major

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.query, self.key, self.value, self.prompt_key, self.prompt_value, self.gate)

    @property
    def is_decode(self) -> bool:
        return self.shape.seqlen_q == 1

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    def with_tensors(self, *tensors: Tensor) -> Problem:
        return Problem(self.shape, *tensors, self.layout)


def make_problem(
    shape: Shape, dtype: torch.dtype, device: torch.device, layout: str = "head-major", seed: int = 0
) -> Problem:
    """Random values (data of zeros runs faster on a chip that saves power); gates around 0.3, away from zero."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    cache = (shape.batch, shape.heads_kv, shape.seqlen_k, shape.head_dim)
    table = (1, shape.heads_kv, shape.prompt_length, shape.head_dim)
    query = normal(shape.batch, shape.heads_q, shape.seqlen_q, shape.head_dim)
    key, value, prompt_key, prompt_value = (normal(*size) for size in (cache, cache, table, table))
    if layout == "token-major":
        key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (key, value))
    gate = torch.randn(shape.heads_q, generator=generator, device=device) + 0.3
    return Problem(shape, query, key, value, prompt_key, prompt_value, gate, layout)
