"""The operators of the backend: the vendor's attention, and around it our kernels for the prompts.

    forward     out, lse = vendor(q, k, v)           out += s softmax(scale q pk^T) pv, in place
    backward    tokens = out - prompt term           dq, dk, dv = vendor'(dO, q, k, v, tokens, lse)
                dq += prompt term of dq, in place    dpk, dpv, dgate: Triton's kernels for the prompts' gradients

`tokens` is what the vendor had computed, and is recomputed so that no second output per layer is kept for backward. It
lives while one layer's backward runs. In two bytes per number it is out by one rounding more than the tokens' output
was, half a unit in the last place of `out` and half of its own; the fused kernels read the rounded `out` there too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...call import CALL, Call, Saved, batched, from_backward_arguments
from .. import fused
from ..triton import prompt_launch
from ..triton.operands import has_no_prompts
from . import vendor
from .vendor import token_major_like

_TOKENS = tuple(name for name in CALL.differentiable if batched(name))


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`zinit::forward_hybrid`."""
    call = Call(*arguments)
    attention = _attention_of(call)
    out, lse = vendor.of_forward(*attention).forward(*attention)
    if has_no_prompts(call):
        return _token_major(out), lse
    target = None if _is_token_major(out) else token_major_like(call.query)
    return _token_major(prompt_launch.add_prompts(call, out, target)), lse


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """`zinit::backward_hybrid`. What is not wanted is neither allocated nor computed."""
    saved, call, needs = from_backward_arguments(arguments)
    names = CALL.differentiable
    wanted = {name: bool(needs >> i & 1) for i, name in enumerate(names)}
    found: dict[str, Tensor] = {}
    # Triton's backward computes the prompts' gradients. No vendor takes a gradient of the log-sum-exp: then it computes
    # all, since it reads the same `out` and log-sum-exp.
    is_fused = {name: wanted[name] and (name not in _TOKENS or saved.grad_lse is not None) for name in names}
    if saved.grad_lse is None and any(wanted[name] for name in _TOKENS):
        found |= _token_gradients(saved, call, wanted)
    if any(is_fused.values()):
        some = sum(1 << i for i, name in enumerate(names) if is_fused[name])
        given = zip(names, fused.run("backward", "triton", (*arguments[:-1], some)), strict=True)
        found |= {name: grad for name, grad in given if is_fused[name]}
    return tuple(
        found[name] if name in found else call.query.new_empty((0,), dtype=torch.float32) for name in names
    )


def _token_gradients(saved: Saved, call: Call, wanted: dict[str, bool]) -> dict[str, Tensor]:
    """Those of the gradients of query, key and value that are wanted."""
    attention = _attention_of(call)
    room = vendor.of_backward(*attention)
    tokens = saved.out
    if not has_no_prompts(call):
        tokens = prompt_launch.add_prompts(call, saved.out, room.empty_out(call.query), subtracts=True)
    elif tokens.stride() != (place := room.empty_out(call.query)).stride():
        tokens = place.copy_(tokens)
    query, key, value, is_causal, scale = attention
    grads = dict(
        zip(
            _TOKENS,
            room.backward(saved.grad_out, query, key, value, tokens, saved.lse, is_causal, scale),
            strict=True,
        )
    )
    del tokens
    if wanted["query"] and not has_no_prompts(call):
        source = grads["query"]
        target = None if _is_token_major(source) else token_major_like(source)
        grads["query"] = prompt_launch.add_grad_query(call, saved.grad_out, source, target)
    return {name: _token_major(grad) for name, grad in grads.items() if wanted[name]}


def _attention_of(call: Call) -> tuple[Tensor, Tensor, Tensor, bool, float]:
    """What the vendor is asked: (query, key, value, is_causal, scale)."""
    return call.query, call.key, call.value, call.window_right == 0, call.scale


def _token_major_strides(tensor: Tensor) -> tuple[int, ...]:
    _, heads, seqlen, head_dim = tensor.shape
    return seqlen * heads * head_dim, head_dim, heads * head_dim, 1


def _is_token_major(tensor: Tensor) -> bool:
    """Whether [B, H, T, D] is stored as [B, T, H, D]; the step of a dimension of one element may be any."""
    expected, steps = _token_major_strides(tensor), tensor.stride()
    return steps == expected or all(
        size == 1 or step == right for size, step, right in zip(tensor.shape, steps, expected, strict=True)
    )


def _token_major(tensor: Tensor) -> Tensor:
    """The tensor as the operators promise it, copied where it is stored otherwise."""
    expected = _token_major_strides(tensor)
    if tensor.stride() == expected:
        return tensor
    if _is_token_major(tensor):
        return tensor.as_strided(tensor.shape, expected)
    return token_major_like(tensor).copy_(tensor)
