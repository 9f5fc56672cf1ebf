"""Zero-initialised attention out of two `scaled_dot_product_attention` calls and an add.

The path for what no fused backend takes: dense masks, other devices (Apple, XPU). Sequences of a packed batch or a
cache are attended one after the other, which reads their lengths on the host. SDPA's CPU kernel has no second
derivative: there, create_graph=True gets the gradients of `reference`, which has one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .calls import CacheCall, Call


def attention(call: Call) -> Tensor:
    """Output [B, Hq, T, D] of a canonical call."""
    out = _attention(call)
    if torch.compiler.is_compiling() or out.device.type != "cpu" or not out.requires_grad:
        return out
    if call.dense_mask is not None and call.dense_mask.requires_grad:
        return out  # SDPA writes it out then, so it can be differentiated again
    return _TwiceDifferentiable.apply(out, *call)


def _attention(call: Call) -> Tensor:
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        return _add_prompt_branch(call, _token_branch(call))
    bounds_q, bounds_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    branches = [
        _token_branch(
            call._replace(
                query=call.query[:, :, bounds_q[b] : bounds_q[b + 1]],
                key=call.key[:, :, bounds_k[b] : bounds_k[b + 1]],
                value=call.value[:, :, bounds_k[b] : bounds_k[b + 1]],
                cu_seqlens_q=None,
                cu_seqlens_k=None,
            )
        )
        for b in range(call.batch_size)
    ]
    out = torch.cat(branches, 2) if branches else torch.zeros_like(call.query)
    return _add_prompt_branch(call, out)


_DIFFERENTIABLE = 6  # the first fields of a call: query, key, value, prompt_key, prompt_value, gate
_TENSORS = 11  # and all that are tensors


class _TwiceDifferentiable(torch.autograd.Function):
    """`out` as it is; a gradient that is to be differentiated again goes past it, through the formula written out."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *fields: Any) -> Tensor:
        ctx.save_for_backward(*fields[:_TENSORS])
        ctx.numbers = fields[_TENSORS:]
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return grad_out, *(None,) * len(Call._fields)
        call = Call._make((*ctx.saved_tensors, *ctx.numbers))
        wanted = ctx.needs_input_grad[1 : 1 + _DIFFERENTIABLE]
        grads = reference.differentiable_gradients(call, wanted, grad_out, None)
        return None, *grads, *(None,) * (len(Call._fields) - _DIFFERENTIABLE)


@torch.no_grad()
def attention_with_cache(call: CacheCall) -> Tensor:
    """Appends to the caches in place, then attends to each sequence's own keys; output [B, T, Hq, D]."""
    whole, seqlens = reference.append(call)
    branches = [
        _token_branch(
            whole._replace(
                query=whole.query[b : b + 1],
                key=whole.key[b : b + 1, :, :seqlen],
                value=whole.value[b : b + 1, :, :seqlen],
            )
        )
        for b, seqlen in enumerate(seqlens.tolist())
    ]
    out = torch.cat(branches) if branches else torch.zeros_like(whole.query)
    return _add_prompt_branch(whole, out).transpose(1, 2)


def _token_branch(call: Call) -> Tensor:
    seqlen_q, seqlen_k = call.query.shape[2], call.key.shape[2]
    if seqlen_k == 0 or call.query.numel() == 0:
        return torch.zeros_like(call.query)
    plain_causal = (call.window_left, call.window_right) == (-1, 0) and seqlen_q == seqlen_k
    # SDPA's CPU kernel scales its causal mask too: NaN where the scale is 0 or negative
    if plain_causal and call.key_bias is None and call.dense_mask is None and call.scale > 0:
        return _sdpa(call.query, call.key, call.value, is_causal=True, scale=call.scale)
    mask = reference.token_mask(call)
    if mask is None:
        return _sdpa(call.query, call.key, call.value, scale=call.scale)
    key, value = reference.blank_masked_keys(call, call.key, call.value)
    # a row that sees no key: SDPA's kernels disagree between 0 and NaN, so let it see them all and drop the result
    dtype, hidden = call.query.dtype, mask == float("-inf")
    empty = hidden.all(-1, keepdim=True)
    # a finite bias stays finite: -1e5 would be -inf in float16, and a row of it would see nothing
    bound = torch.finfo(dtype).max
    mask = (
        mask.to(torch.promote_types(mask.dtype, dtype))
        .clamp(-bound, bound)
        .masked_fill(hidden, float("-inf"))
    )
    mask = mask.masked_fill(empty, 0).to(dtype).expand(-1, -1, seqlen_q, seqlen_k)
    out = _sdpa(call.query, key, value, attn_mask=mask, scale=call.scale)
    return out.masked_fill(empty, 0)


def _add_prompt_branch(call: Call, out: Tensor) -> Tensor:
    if (
        call.prompt_key is None
        or call.prompt_value is None
        or call.gate is None
        or call.prompt_key.numel() == 0
    ):
        return out
    query, dtype = call.query, call.query.dtype
    # prompts of a wider dtype stay in it: float32 prompts can lie beyond float16
    wide = torch.promote_types(dtype, call.prompt_key.dtype)
    shared = call.prompt_key.shape[0] == 1 and call.prompt_index is None
    if shared:
        prompt_key, prompt_value = call.prompt_key, call.prompt_value
        weight = call.gate.tanh() if call.tanh_gate else call.gate
    else:
        prompt_key, prompt_value, weight = reference.gather_prompts(call)
    weight = weight[:, :, None, None]
    prompt_key, prompt_value, weight = (t.to(wide) for t in (prompt_key, prompt_value, weight))
    if shared or call.cu_seqlens_q is None:
        rows = (query.shape[0], -1, -1, -1)
        branch = weight * _sdpa(
            query.to(wide), prompt_key.expand(rows), prompt_value.expand(rows), scale=call.scale
        )
    else:
        bounds = call.cu_seqlens_q.tolist()
        branches = [
            weight[b : b + 1]
            * _sdpa(
                query[:, :, bounds[b] : bounds[b + 1]].to(wide),
                prompt_key[b : b + 1],
                prompt_value[b : b + 1],
                scale=call.scale,
            )
            for b in range(call.batch_size)
        ]
        branch = torch.cat(branches, 2) if branches else torch.zeros_like(query)
    return (out + branch).to(dtype)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    # a branch, since a comparison of dynamic sizes is no bool that torch.compile could pass on
    if query.shape[1] != key.shape[1]:
        options["enable_gqa"] = True
    return F.scaled_dot_product_attention(query, key, value, **options)
