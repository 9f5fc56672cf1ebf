"""A base whose layers differ from another's by little: biases, LoRA factors and norms, beside the same weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import UserError
from .llama import Llama


class Delta(NamedTuple):
    """What is added to one linear layer: y = W x + up (down x) + bias."""

    bias: Tensor | None = None  # [out]
    down: Tensor | None = None  # [rank, in]
    up: Tensor | None = None  # [out, rank]


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a delta. `plain` is the layer without it."""

    def __init__(self, plain: nn.Linear, delta: Delta):
        super().__init__()
        self.plain = plain
        for name, tensor in delta._asdict().items():
            self.register_buffer(
                name, None if tensor is None else tensor.to(plain.weight.device, plain.weight.dtype)
            )

    @property
    def weight(self) -> Tensor:
        """Of the layer without the delta."""
        return self.plain.weight

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.plain.weight, self.bias)
        if self.down is not None:
            out = out + F.linear(F.linear(x, self.down), self.up)
        return out


def with_deltas(base: Llama, linears: Mapping[str, Delta], norms: Mapping[str, Tensor]) -> Llama:
    """A base with these deltas, by the names of its modules, and with these weights in its norms.

    All other weights are the first base's own, in the same memory, and the first base stays as it is.
    """
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    adapted = copy.deepcopy(base, shared)
    for name, delta in linears.items():
        plain = adapted.get_submodule(name)
        if not isinstance(plain, nn.Linear):
            raise UserError(
                "the adapter changes the layers of its base, which must not be quantised for it: leave out --quantise."
            )
        adapted.set_submodule(name, AdaptedLinear(plain, delta))
    for name, weight in norms.items():
        norm = adapted.get_submodule(name)
        norm.weight = nn.Parameter(weight.to(base.device, torch.float32), requires_grad=False)
    return adapted
