"""The kernel families of the GPU backends, and which of them a call needs.

A family is what is tried, and taken or left, as one: kernels that share their code and are launched together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..backends import fused
from ..backends.cuda import MAX_DECODE_TOKENS
from ..call import AnyCall, CacheCall, PromptCall

FEW_ROWS = "triton.few_rows"  # linear layers of a decoding step: no call of attention needs them
# backend -> its families
FAMILIES: dict[str, tuple[str, ...]] = {
    "triton": ("triton.forward", "triton.backward", "triton.decode", FEW_ROWS),
    "cuda": ("cuda.decode", "cuda.prefill", "cuda.prompt"),
    "hybrid": ("hybrid.forward", "hybrid.backward"),
}


class Subject(NamedTuple):
    """What a verdict is about: a family at one dtype and head dimension, which its kernels are compiled for.

    head_dim None: of `FEW_ROWS`, whose kernel knows no heads.
    """

    family: str
    dtype: torch.dtype
    head_dim: int | None

    @property
    def backend(self) -> str:
        return self.family.partition(".")[0]

    @property
    def key(self) -> str:
        """Its name in the file of verdicts."""
        head_dim = "" if self.head_dim is None else f" {self.head_dim}"
        return f"{self.family} {str(self.dtype).removeprefix('torch.')}{head_dim}"

    def __str__(self) -> str:
        head_dim = "" if self.head_dim is None else f", head_dim {self.head_dim}"
        return f"{self.family} ({str(self.dtype).removeprefix('torch.')}{head_dim})"


def needed(backend: str, call: AnyCall) -> tuple[str, ...]:
    """The families that a call takes of a backend. Whether its backward may be taken is asked before its forward."""
    if backend == "triton":
        if isinstance(call, CacheCall):
            return ("triton.decode",)
        if not isinstance(call, PromptCall) and fused.requires_grad(call):
            return ("triton.forward", "triton.backward")
        return ("triton.forward",)
    if backend == "hybrid":
        return FAMILIES["hybrid"] if fused.requires_grad(call) else ("hybrid.forward",)
    if backend == "cuda":
        if isinstance(call, PromptCall):
            return ("cuda.prompt",)
        if isinstance(call, CacheCall):
            new = 0 if call.new_key is None else call.new_key.shape[1]
            return ("cuda.decode" if max(call.query.shape[1], new) <= MAX_DECODE_TOKENS else "cuda.prefill",)
        return ("cuda.prefill",)
    return ()
