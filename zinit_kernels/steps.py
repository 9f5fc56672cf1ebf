"""The short way of a decoding step: a call that already is what the CPU operator takes goes to it as it came.

The operator checks shapes, dtypes and values itself; checking them in `arguments.py` as well costs 10 us of a step that
takes 60 (512 keys, two threads). What an operator cannot see is asked here. A call that it refuses takes the long way,
where what can be converted is, and the rest is named in the words of the public function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch, ops
from .calls import CacheCall


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    gate: Any,
    cache_seqlens: Any,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int] | None,
    num_splits: int,
    gate_activation: str,
    prompt_index: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """(out, lse) of the arguments of `zero_init_attention_with_kvcache`; None: take the long way."""
    try:
        if (
            not dispatch.takes_native(q)
            or k_cache.requires_grad
            or v_cache.requires_grad
            or (k is not None and (k_cache is v_cache or 0 in k_cache.stride() or 0 in v_cache.stride()))
            or cache_seqlens.dtype != torch.int32
            or (gate is not None and (gate.dtype != torch.float32 or gate.dim() > 2))
            or (prompt_k is not None and prompt_k.dim() != 4)
            or not (window_size is None or window_size == (-1, -1))
            or not (softmax_scale is None or type(softmax_scale) is float)
            or gate_activation not in ("tanh", "identity")
        ):
            return None
        scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
        call = CacheCall(
            q, k_cache, v_cache, k, v, prompt_k, prompt_v, gate, prompt_index, cache_seqlens, block_table, rotary_cos,
            rotary_sin, rotary_interleaved, scale, -1, 0 if causal else -1, gate_activation == "tanh", num_splits,
        )  # fmt: skip
        return ops.attention_with_cache(call, "cpu")
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
        return None  # nothing was written: the operator refuses before it begins
