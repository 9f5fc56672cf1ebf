"""The short way: a call that already is what a CPU operator takes goes to it as it came.

The operators check shapes, dtypes and values themselves; checking them in `arguments.py` as well costs 10 us of a
decoding step that takes 60, and 7 of the 300 of 128 tokens in bfloat16 (32 heads, two threads). What an operator cannot
see is asked here. A call that it refuses takes the long way, where what can be converted is, and the rest is named in
the words of the public function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch, ops
from .calls import CacheCall, Call

# by the operator, or where something that is no such tensor is asked here
_REFUSALS = (AttributeError, IndexError, TypeError, ValueError, RuntimeError, ZeroDivisionError)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor | None,
    prompt_value: Tensor | None,
    gate: Any,
    attn_mask: Tensor | None,
    is_causal: bool,
    window_size: tuple[int, int] | None,
    scale: float | None,
    gate_activation: str,
    prompt_index: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """(out, lse) of the arguments of `zero_init_attention`; None: take the long way."""
    try:
        if (
            not dispatch.takes_native(query)
            or attn_mask is not None
            or (is_causal and query.shape[2] != key.shape[2])
            or torch.is_autocast_enabled("cpu")
            or not _is_plain(gate, prompt_key, window_size, scale, gate_activation)
        ):
            return None
        call = Call(
            query, key, value, prompt_key, prompt_value, gate if gate is None or gate.dim() == 2 else gate[None],
            prompt_index, None, None, None, None, query.shape[2], key.shape[2],
            query.shape[3] ** -0.5 if scale is None else scale, -1, 0 if is_causal else -1, gate_activation == "tanh",
        )  # fmt: skip
        return ops.attention(call, "cpu")
    except _REFUSALS:
        return None


def attend_with_cache(
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
            or not _is_plain(gate, prompt_k, window_size, softmax_scale, gate_activation)
        ):
            return None
        scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
        call = CacheCall(
            q, k_cache, v_cache, k, v, prompt_k, prompt_v, gate, prompt_index, cache_seqlens, block_table, rotary_cos,
            rotary_sin, rotary_interleaved, scale, -1, 0 if causal else -1, gate_activation == "tanh", num_splits,
        )  # fmt: skip
        return ops.attention_with_cache(call, "cpu")
    except _REFUSALS:
        return None  # nothing was written: the operator refuses before it begins


def _is_plain(
    gate: Any,
    prompts: Tensor | None,
    window_size: tuple[int, int] | None,
    scale: float | None,
    gate_activation: str,
) -> bool:
    """Whether nothing of what all functions take would have to be converted."""
    return (
        (gate is None or (gate.dtype == torch.float32 and gate.dim() <= 2))
        and (prompts is None or prompts.dim() == 4)
        and (window_size is None or window_size == (-1, -1))
        and (scale is None or type(scale) is float)
        and gate_activation in ("tanh", "identity")
    )
