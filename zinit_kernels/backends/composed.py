"""Zero-initialised attention out of two `scaled_dot_product_attention` calls and an add.

The path for what no fused backend takes: dense masks, other devices (Apple, XPU). With a soft cap, which SDPA does
not have, both attentions are written out. The sequences of a packed batch are attended one after the other, which reads
their lengths on the host. So are those of a cache on a CPU; on a device they are one masked attention (`whole_cache`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import CALL, AnyCall, CacheCall, Call, PromptCall
from ..values import has_values, why_transformed
from . import formula, whole_cache

CHECKS_VALUES = False
_MOST_GROUPED = 16  # tokens; each group repeats the mask


def why_not(call: AnyCall, return_lse: bool) -> str:
    if return_lse:
        return "scaled_dot_product_attention does not return the log-sum-exp"
    if reason := why_transformed():
        return reason
    if isinstance(call, CacheCall):
        has_lengths = _reads_lengths(call)
    else:
        has_lengths = (call.cu_seqlens if isinstance(call, PromptCall) else call.cu_seqlens_q) is not None
    if has_lengths and not has_values(call.query):
        return "it reads sequence lengths on the host: torch.compile cannot trace that, fake and meta tensors have none"
    return ""


def attention(call: Call) -> tuple[Tensor, None]:
    out = _attention(call)
    if torch.compiler.is_compiling() or out.device.type != "cpu" or not out.requires_grad:
        return out, None
    if call.dense_mask is not None and call.dense_mask.requires_grad:
        return out, None  # SDPA writes it out then, so it can be differentiated again
    return _TwiceDifferentiable.apply(out, *call), None


@torch.no_grad()
def attention_with_cache(call: CacheCall) -> tuple[Tensor, None]:
    if _reads_lengths(call):
        query, pieces = formula.append(call)
        out = torch.cat([_token_branch(piece) for piece in pieces]) if pieces else torch.zeros_like(query)
    else:
        piece, may_be_empty = whole_cache.append(call)
        query, out = piece.query, _token_branch(_grouped(piece), may_be_empty)
        out = out.unflatten(2, (-1, query.shape[2])).flatten(1, 2) if out.shape != query.shape else out
    return _add_prompt_branch(call.attention(query, query, query), out).transpose(1, 2), None


def _reads_lengths(call: CacheCall) -> bool:
    """Whether the sequences of a cache are sliced to their lengths; on a device the host would wait for them."""
    return call.query.device.type == "cpu"


def add_prompt_branch(call: PromptCall) -> None:
    call.out.add_(attention(call.attention())[0])


def _attention(call: Call) -> Tensor:
    if call.cu_seqlens_q is None:
        return _add_prompt_branch(call, _token_branch(call))
    branches = [_token_branch(one) for one in formula.sequences(call)]
    return _add_prompt_branch(call, torch.cat(branches, 2) if branches else _nothing(call))


class _TwiceDifferentiable(torch.autograd.Function):
    """`out` as it is. SDPA's CPU kernel has no second derivative: a gradient that is to be differentiated again
    goes past it, through the formula written out."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *fields: Any) -> Tensor:
        call = Call(*fields)
        tensors, ctx.numbers = CALL.split(CALL.arguments(call))
        ctx.save_for_backward(call.dense_mask, *tensors)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        _, *needed = ctx.needs_input_grad
        if not torch.is_grad_enabled():
            return grad_out, *(None for _ in needed)
        dense_mask, *tensors = ctx.saved_tensors
        call = Call(*tensors, *ctx.numbers)._replace(dense_mask=dense_mask)
        wanted = needed[: len(CALL.differentiable)]
        grads = formula.differentiable_gradients(call, wanted, grad_out, None)
        return None, *grads, *(None for _ in needed[len(wanted) :])


def _grouped(call: Call) -> Call:
    """A masked call of few queries with the queries of a group of heads as those of one head, [B, Hkv, G * T, D].

    Of SDPA's kernels only cuDNN's takes both a mask and grouped heads; else it writes the scores out in float32.
    """
    mask, group, tokens = call.dense_mask, call.query.shape[1] // call.key.shape[1], call.query.shape[2]
    if (
        mask is None
        or group == 1
        or not 0 < tokens <= _MOST_GROUPED
        or call.softcap
        or call.sinks is not None
    ):
        return call
    if tokens > 1:
        mask = mask[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
    query = call.query.unflatten(1, (-1, group)).flatten(2, 3)
    return call._replace(query=query, dense_mask=mask, max_seqlen_q=query.shape[2])


def _nothing(call: Call) -> Tensor:
    """The token branch where no query sees a key: zeros, which depend on their inputs as every output does."""
    inputs = call.query, call.key, call.value, call.sinks, call.dense_mask
    return _depending(torch.zeros_like(call.query), *inputs)


def _depending(out: Tensor, *inputs: Tensor | None) -> Tensor:
    """`out`, with a gradient of zero for each of the inputs."""
    for tensor in inputs:
        if tensor is not None and tensor.requires_grad:
            # masked and not multiplied by 0: it may hold NaN
            zeros = tensor.masked_fill(torch.ones_like(tensor, dtype=torch.bool), 0)
            out = out + zeros.sum().to(out.dtype)
    return out


def _token_branch(call: Call, may_be_empty: bool = True) -> Tensor:
    """The first softmax of a call without cu_seqlens.

    may_be_empty: whether a dense mask may leave a query without keys; finding those takes ten launches.
    """
    seqlen_q, seqlen_k = call.query.shape[2], call.key.shape[2]
    if seqlen_k == 0 or call.query.numel() == 0:
        return _nothing(call)
    if call.softcap or call.sinks is not None:  # SDPA has neither
        return formula.token_branch(call)[0].to(call.query.dtype)
    plain_causal = (call.window_left, call.window_right) == (-1, 0) and seqlen_q == seqlen_k
    # SDPA's CPU kernel scales its causal mask too: NaN where the scale is 0 or negative
    if plain_causal and call.key_bias is None and call.dense_mask is None and call.scale > 0:
        out = _sdpa(call.query, call.key, call.value, is_causal=True, scale=call.scale)
        return _without_unseen_nan(call, out)
    if not may_be_empty and call.dense_mask is not None:
        return _sdpa(call.query, call.key, call.value, attn_mask=call.dense_mask, scale=call.scale)
    bias, hidden = formula.masks(call)
    if bias is None and hidden is None:
        return _sdpa(call.query, call.key, call.value, scale=call.scale)
    key, value = call.key, call.value
    if call.key_bias is not None:  # padding is often uninitialised memory, and 0 * NaN is NaN
        masked = (call.key_bias == float("-inf"))[:, None, :, None]
        key, value = key.masked_fill(masked, 0), value.masked_fill(masked, 0)
    mask, empty = _as_sdpa_takes_it(call, bias, hidden)
    if _is_far_from_zero(mask, call.query, key, value):
        return formula.token_branch(call)[0].to(call.query.dtype)
    out = _sdpa(call.query, key, value, attn_mask=mask, scale=call.scale)
    return _without_unseen_nan(call, out.masked_fill(empty, 0))


def _as_sdpa_takes_it(call: Call, bias: Tensor | None, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """(additive mask [.., T, S] in the query's dtype, True for queries that see no key).

    SDPA's kernels disagree between 0 and NaN about a query without keys: it sees them all, and its row is dropped.
    """
    query, dtype = call.query, call.query.dtype
    if bias is None:
        mask = torch.zeros((), dtype=dtype, device=query.device)
    else:  # a finite bias stays finite: -1e5 would be -inf in float16, and a row of it would see nothing
        bound = torch.finfo(dtype).max
        mask = bias.to(torch.promote_types(bias.dtype, dtype)).clamp(-bound, bound)
    assert hidden is not None
    empty = hidden.all(-1, keepdim=True)
    mask = mask.masked_fill(hidden & ~empty, float("-inf")).masked_fill(empty, 0).to(dtype)
    return mask.expand(-1, -1, query.shape[2], call.key.shape[2]), empty


def _is_far_from_zero(mask: Tensor, *inputs: Tensor) -> bool:
    """Whether SDPA's gradients would be wrong because a query's largest bias is far from 0.

    Its backward on a CPU computes exp(score - lse). In an lse of -1e30 the logarithm of S is lost: with finfo.min as
    the bias of all S keys the gradient of value was S times too large. On a device, looking would stall it.
    """
    if mask.device.type != "cpu" or not has_values(mask) or not mask.numel():
        return False
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (mask, *inputs)):
        return False
    # up to 1e4, the largest bias in older models, float32 rounds lse no more than the scores themselves
    return bool(mask.detach().amax(-1).abs().amax() > 1e4)


def _without_unseen_nan(call: Call, out: Tensor) -> Tensor:
    """SDPA lets a key or value that is NaN or infinite reach queries that do not see it (0 * NaN is NaN).

    Where the result says that there may be one, the formula is written out. On a device, looking would stall it:
    there SDPA's result stays.
    """
    if out.device.type != "cpu" or not has_values(out):
        return out
    total = out.detach().sum(
        dtype=torch.promote_types(out.dtype, torch.float32)
    )  # one pass, where isfinite makes two
    if total.isfinite():
        return out
    return formula.token_branch(call)[0].to(out.dtype)


def _add_prompt_branch(call: Call, out: Tensor) -> Tensor:
    if call.prompt_key is None or call.prompt_value is None or call.gate is None:
        return out
    if call.prompt_key.numel() == 0:
        return _depending(out, call.prompt_key, call.prompt_value, call.gate)
    if call.softcap:
        return (out + formula.prompt_branch(call)).to(call.query.dtype)
    query, dtype = call.query, call.query.dtype
    # prompts of a wider dtype stay in it: float32 prompts can lie beyond float16
    wide = torch.promote_types(dtype, call.prompt_key.dtype)
    prompt_key, prompt_value, weight = (t.to(wide) for t in formula.prompts(call))
    weight = weight[:, :, None, None]
    if call.cu_seqlens_q is None or prompt_key.shape[0] == 1:
        rows = (query.shape[0], -1, -1, -1)
        branch = _sdpa(query.to(wide), prompt_key.expand(rows), prompt_value.expand(rows), scale=call.scale)
        return (out + weight * branch).to(dtype)
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
    if not branches:
        return _depending(out, call.prompt_key, call.prompt_value, call.gate)
    return (out + torch.cat(branches, 2)).to(dtype)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    # a branch: under torch.compile the comparison of symbolic sizes is no plain bool that could be passed on
    if query.shape[1] != key.shape[1]:
        options["enable_gqa"] = True
    query, key, value = (_with_own_rows(t) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, **options)


def _with_own_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied if its rows overlap by steps of one element, as those of `Tensor.unfold` may.

    SDPA stores its result in the order of the query's strides. They do not say which dimension is the last one then,
    and its CPU kernel writes to wrong places; its backward refuses such keys in bfloat16.
    """
    others = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    if tensor.shape[-1] > 1 and any(size > 1 and step == 1 for size, step in others):
        return tensor.contiguous()
    return tensor
