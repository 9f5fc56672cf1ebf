"""The canonical form of a call, which every backend takes; `schemas.py` says what each tensor looks like."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """One attention call."""

    query: Tensor
    key: Tensor
    value: Tensor
    prompt_key: Tensor | None
    prompt_value: Tensor | None
    gate: Tensor | None
    prompt_index: Tensor | None
    key_bias: Tensor | None
    dense_mask: Tensor | None  # bool (True = attend) or additive, broadcastable to [B, Hq, T, S]
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float
    window_left: int
    window_right: int
    tanh_gate: bool

    @property
    def batch_size(self) -> int:
        return self.query.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1


class CacheCall(NamedTuple):
    """One call of the cache function, token-major as its users have it."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    new_key: Tensor | None
    new_value: Tensor | None
    prompt_key: Tensor | None
    prompt_value: Tensor | None
    gate: Tensor | None
    prompt_index: Tensor | None
    cache_seqlens: Tensor
    block_table: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_interleaved: bool
    scale: float
    window_left: int
    window_right: int
    tanh_gate: bool
    num_splits: int
