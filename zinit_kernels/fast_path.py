"""The fast path: a call that already is what the CPU operator takes goes to it at once.

The operator checks shapes and values itself. Checking and converting them in `arguments.py` as well costs
10 us of a decoding step that takes 60, and 7 of the 300 us of 128 tokens in bfloat16 (32 heads, two threads).

`attention` and `attention_with_cache` return None for a call that has to be converted, or that another
backend may have to run. They ask before, of every tensor, and never learn it from an error. An error of the
operator is raised; if the arguments break a rule of the public function, in that function's words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from . import arguments, dispatch
from .backends import fused
from .call import (
    CACHE_CALL,
    CALL,
    GATE_ACTIVATIONS,
    MAX_SCALE,
    PLAIN_TYPES,
    SOFTCAPS,
    Form,
    Role,
    TensorSpec,
)

# What OpOverload.__call__ calls: it packs the 22 arguments of a decode call anew, 0.5 of 10.5 us.
_FORWARD, _DECODE = fused.OPERATORS["forward", "cpu"]._op, fused.OPERATORS["decode", "cpu"]._op
_ALL_KEYS = (-1, -1)


def _test_of(name: str, spec: TensorSpec) -> str:
    """The expression that says of a tensor that nothing would have to be converted, and no other backend asked."""
    if (
        spec.role is Role.WRITTEN
    ):  # its dtype, strides and overlaps are never converted: the operator refuses them
        return f"type({name}) in PLAIN_TYPES and not {name}.requires_grad"
    strides = "" if spec.contiguous else f" or {name}.stride(-1) == 1"
    tests = [f"type({name}) in PLAIN_TYPES"]
    if spec.is_table:  # of the gates the operator takes a single row without its dimension
        tests.append(f"0 < {name}.dim() <= 2" if spec.dims == 2 else f"{name}.dim() == {spec.dims}")
    if spec.dtypes:  # else the operator compares it with the query's
        tests.append(f"{name}.dtype in DTYPES_OF_{name}")
    return f"{' and '.join(tests)} and ({name}.is_contiguous(){strides})"


def _predicate(form: Form, join: str, test_of: Callable[[str, TensorSpec], str]) -> Callable[..., bool]:
    """A function of an operator's tensors, compiled from their fields into one expression: a loop over the
    fields takes 3 us, the expression 1."""
    tests = []
    for name, spec in form.specs.items():
        absent = f"{name} is None or " if join == "and" else f"{name} is not None and "
        tests.append(f"({absent if name in form.optional else ''}({test_of(name, spec)}))")
    names = {f"DTYPES_OF_{name}": frozenset(spec.dtypes) for name, spec in form.specs.items()}
    source = f"lambda {', '.join(form.specs)}: {f' {join} '.join(tests)}"
    return eval(source, {"PLAIN_TYPES": PLAIN_TYPES, **names})


_are_canonical = _predicate(CALL, "and", _test_of)
_are_canonical_with_cache = _predicate(CACHE_CALL, "and", _test_of)
_require_grad = _predicate(CACHE_CALL, "or", lambda name, spec: f"{name}.requires_grad")


def _is_open() -> bool:
    """Whether any call may take the CPU operator without a question to `dispatch`."""
    return (
        dispatch.CPU_IS_FIRST
        and forward_ad._current_level < 0
        and peek_interpreter_stack() is None
        and not is_compiling()
    )


def _limits(window_size: Any, causal: bool) -> tuple[int, int] | None:
    """(left, right) of a window with limits; None: to be checked or converted."""
    if type(window_size) is not tuple or len(window_size) != 2:
        return None
    left, right = window_size
    if type(left) is not int or type(right) is not int or left < -1 or right < -1:
        return None
    return left, 0 if causal else right


def attention(
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
    softcap: float | None,
    gate_activation: str,
    prompt_index: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """(out, lse) of the arguments of `zero_init_attention`, or None."""
    try:
        if attn_mask is not None or not _is_open() or is_autocast_enabled("cpu"):
            return None
        keys, values = _with_rows(prompt_key, prompt_value)
        # the gradient has the shape that the operator was given
        gates = gate[None] if type(gate) in PLAIN_TYPES and gate.dim() == 1 else gate
        if not _are_canonical(query, key, value, keys, values, gates, sinks, prompt_index, None, None, None):
            return None
        if query.dim() != 4 or key.dim() != 4:
            return None
        _, heads_q, seqlen_q, head_dim = query.shape
        seqlen_k = key.shape[2]
        if (is_causal and seqlen_q != seqlen_k) or not _is_plain(
            query, keys, values, gates, heads_q, head_dim, scale, softcap, gate_activation
        ):
            return None
        left, right = -1, 0 if is_causal else -1
        if window_size is not None and window_size != _ALL_KEYS:
            window = _limits(window_size, is_causal)
            if window is None or seqlen_q != seqlen_k:
                return None
            left, right = window
        operands = (
            query, key, value, keys, values, gates, sinks, prompt_index, None, None, None, seqlen_q, seqlen_k,
            head_dim**-0.5 if scale is None else scale, softcap, left, right, gate_activation == "tanh",
        )  # fmt: skip
        return fused.attention_of("cpu", *operands) if is_grad_enabled() else _FORWARD(*operands)
    except RuntimeError as error:
        arguments.refuse(
            error, arguments.from_sdpa, query, key, value, prompt_key, prompt_value, gate, attn_mask, is_causal,
            window_size, scale, softcap, gate_activation, prompt_index, sinks,
        )  # fmt: skip


def attention_with_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    gate: Any,
    cache_seqlens: Any,
    cache_leftpad: Tensor | None,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool | None,
    softmax_scale: float | None,
    causal: bool | None,
    window_size: tuple[int, int] | None,
    softcap: float | None,
    num_splits: int,
    gate_activation: str,
    prompt_index: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """(out, lse) of the arguments of `zero_init_attention_with_kvcache`, or None."""
    try:
        if causal is None or cache_batch_idx is not None or not _is_open() or type(num_splits) is not int:
            return None
        keys, values = _with_rows(prompt_k, prompt_v)
        tensors = (
            q, k_cache, v_cache, k, v, keys, values, gate, sinks, prompt_index, cache_seqlens, cache_leftpad,
            block_table, rotary_cos, rotary_sin,
        )  # fmt: skip
        if not _are_canonical_with_cache(*tensors):
            return None
        if q.dim() != 4:
            return None
        _, _, heads_q, head_dim = q.shape
        if not _is_plain(q, keys, values, gate, heads_q, head_dim, softmax_scale, softcap, gate_activation):
            return None
        if rotary_cos is not None and (
            rotary_interleaved is None or rotary_sin is None or rotary_cos.dtype is not rotary_sin.dtype
        ):
            return None
        left, right = -1, 0 if causal else -1
        if window_size is not None and window_size != _ALL_KEYS:
            window = _limits(window_size, causal)
            if window is None:
                return None
            left, right = window
        operands = (
            *tensors, rotary_interleaved or False, head_dim**-0.5 if softmax_scale is None else softmax_scale,
            softcap, left, right, gate_activation == "tanh", num_splits,
        )  # fmt: skip
        if is_grad_enabled() and _require_grad(*tensors):
            with torch.no_grad():
                done = _DECODE(*operands)
        else:
            done = _DECODE(*operands)
        if k is not None:
            increment_version((k_cache, v_cache))
        return done
    except RuntimeError as error:
        arguments.refuse(
            error, arguments.from_cache, q, k_cache, v_cache, k, v, prompt_k, prompt_v, gate, cache_seqlens,
            cache_leftpad, cache_batch_idx, block_table, rotary_cos, rotary_sin, rotary_interleaved, softmax_scale,
            causal, window_size, softcap, num_splits, gate_activation, prompt_index, sinks,
        )  # fmt: skip


def _with_rows(prompt_key: Any, prompt_value: Any) -> tuple[Any, Any]:
    """[1, ...] of tables that leave their only row out."""
    if type(prompt_key) in PLAIN_TYPES and type(prompt_value) in PLAIN_TYPES and prompt_key.dim() == 3:
        return prompt_key[None], prompt_value[None]
    return prompt_key, prompt_value


def _is_plain(
    query: Tensor,
    prompt_key: Tensor | None,
    prompt_value: Tensor | None,
    gate: Tensor | None,
    heads_q: int,
    head_dim: int,
    scale: float | None,
    softcap: float | None,
    gate_activation: str,
) -> bool:
    """What both functions have to ask beside each tensor."""
    return (
        query.is_cpu
        and (gate is None or gate.shape[-1] == heads_q)
        and (prompt_key is None or prompt_value is None or prompt_key.dtype is prompt_value.dtype)
        and 1 <= head_dim <= fused.MAX_HEAD_DIM
        and (scale is None or (type(scale) is float and -MAX_SCALE <= scale <= MAX_SCALE))
        and type(softcap) is float
        and (softcap == 0.0 or SOFTCAPS[0] <= softcap <= SOFTCAPS[1])
        and gate_activation in GATE_ACTIVATIONS
    )
