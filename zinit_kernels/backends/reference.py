"""The specification: zero-initialised attention in plain PyTorch, any dtype, any device, differentiable to any order.

    out[b,h,i] =               sum_j softmax_j(cap(scale * q[b,h,i] . k[b,g,j]) + mask[b,h,i,j]) v[b,g,j]
               + act(gate[h])  sum_p softmax_p(cap(scale * q[b,h,i] . pk[n,g,p])) pv[n,g,p]

g = h // (Hq // Hkv), n = prompt table row of sequence b, act = tanh or identity (LLaMA-Adapter, arXiv 2303.16199,
eqs. 5-8), cap(s) = softcap * tanh(s / softcap), or s without a softcap (Gemma 2, arXiv 2408.00118, section 2). Two
softmaxes that share nothing. With sinks, the first has one more score, sinks[h], whose value is 0. Scores are
materialised: this file is for reading and for judging the other backends, none of which imports it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import AnyCall, CacheCall, Call, PromptCall
from ..values import has_autocast, has_values

CHECKS_VALUES = False


def why_not(call: AnyCall, return_lse: bool) -> str:
    """'': it runs every call."""
    return ""


def attention(call: Call, compute_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, T, D] in the query's dtype and the token branch's log-sum-exp [B, Hq, T].

    compute_dtype: the dtype everything is computed in; default float64 for float64 inputs, else float32.
    """
    dtype = compute_dtype or (torch.float64 if call.query.dtype == torch.float64 else torch.float32)
    device = call.query.device.type
    if not has_autocast(device):
        return _attention(call, dtype)
    with torch.autocast(device, enabled=False):
        return _attention(call, dtype)


@torch.no_grad()
def attention_with_cache(call: CacheCall, compute_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Appends (rotated) new keys and values to the caches in place, then attends; output [B, T, Hq, D]."""
    whole, seqlens = _append(call)
    slots = torch.arange(whole.max_seqlen_k, device=seqlens.device)[None, :]
    written = slots < seqlens[:, None]
    position = seqlens[:, None] - whole.max_seqlen_q + torch.arange(whole.max_seqlen_q, device=seqlens.device)
    visible = _in_window(position, slots.expand_as(written), call.window_left, call.window_right)
    visible = visible & written[:, None, :]
    if call.cache_leftpad is not None:
        visible = visible & (slots >= call.cache_leftpad[:, None])[:, None, :]
    mask_alone = whole._replace(dense_mask=visible[:, None], window_left=-1, window_right=-1)
    out, lse = attention(mask_alone, compute_dtype)
    return out.transpose(1, 2), lse


def add_prompt_branch(call: PromptCall) -> None:
    """out += the second sum of the formula."""
    call.out.add_(attention(call.attention())[0])


def _attention(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    query, key, value = (x.to(dtype) for x in (call.query, call.key, call.value))
    sinks = None if call.sinks is None else call.sinks.to(dtype)
    out, lse = _softmax_attention(query, key, value, call.scale, call.softcap, *token_mask(call), sinks)
    if call.prompt_key is not None and call.prompt_value is not None and call.gate is not None:
        out = out + _prompt_branch(call, query, dtype)
    return out.to(call.query.dtype), lse.to(torch.promote_types(dtype, torch.float32))


def token_mask(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """(bias, visible), each broadcastable to [B, Hq, T, S] or None: what is added to the scores, and which keys a query
    sees. A bias of -inf hides a key too."""
    device = call.query.device
    seqlen_q, seqlen_k = call.query.shape[2], call.key.shape[2]
    seen = []
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        query_sequence, query_position = _sequence_and_position(call.cu_seqlens_q, seqlen_q)
        key_sequence, key_position = _sequence_and_position(call.cu_seqlens_k, seqlen_k)
        lengths_q, lengths_k = call.cu_seqlens_q.diff(), call.cu_seqlens_k.diff()
        query_position = query_position + ((lengths_k - lengths_q)[query_sequence] if call.batch_size else 0)
        seen.append(query_sequence[:, None] == key_sequence[None, :])
    else:
        query_position = torch.arange(seqlen_q, device=device) + seqlen_k - seqlen_q
        key_position = torch.arange(seqlen_k, device=device)
    if (call.window_left, call.window_right) != (-1, -1):
        seen.append(
            _in_window(query_position[None], key_position[None], call.window_left, call.window_right)[0]
        )
    biases = [] if call.key_bias is None else [call.key_bias[:, None, None, :]]
    if call.dense_mask is not None:
        (seen if call.dense_mask.dtype == torch.bool else biases).append(call.dense_mask)
    seen += [bias != float("-inf") for bias in biases]
    bias, visible = None, None
    for one in biases:
        bias = one if bias is None else bias + one
    for one in seen:
        visible = one if visible is None else visible & one
    return bias, visible


def _append(call: CacheCall) -> tuple[Call, Tensor]:
    """Rotates, writes the new keys and values at cache_seqlens; returns the attention that is left to do, against
    whole caches without a mask of their ends, and the new lengths, int64 [B]."""
    seqlens = call.cache_seqlens.long()
    query, new_key = call.query, call.new_key
    if call.rotary_cos is not None and call.rotary_sin is not None:
        # flash-attn's rule: without a causal mask or a window all queries sit at the first new position
        advance = 1 if (call.window_left, call.window_right) != (-1, -1) else 0
        query = _rotate(query, seqlens, advance, call.rotary_cos, call.rotary_sin, call.rotary_interleaved)
        if new_key is not None:
            new_key = _rotate(new_key, seqlens, 1, call.rotary_cos, call.rotary_sin, call.rotary_interleaved)
    if new_key is not None and call.new_value is not None:
        position = seqlens[:, None] + torch.arange(new_key.shape[1], device=query.device)  # [B, T_new]
        if call.block_table is None:
            owner, slot = torch.arange(len(seqlens), device=query.device)[:, None], position
        else:
            page_size = call.key_cache.shape[1]
            owner, slot = call.block_table.long().gather(1, position // page_size), position % page_size
        call.key_cache[owner, slot] = new_key
        call.value_cache[owner, slot] = call.new_value
        seqlens = seqlens + new_key.shape[1]
    key, value = _gather_pages(call)
    turned = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return call.attention(*turned), seqlens


def _gather_pages(call: CacheCall) -> tuple[Tensor, Tensor]:
    """The caches as [B, S, Hkv, D]; pages are gathered, entries of unused pages clamped into the pool."""
    if call.block_table is None:
        return call.key_cache, call.value_cache
    num_pages = call.key_cache.shape[0]
    table = call.block_table.long().clamp(0, max(num_pages - 1, 0))  # [B, max_pages]
    return call.key_cache[table].flatten(1, 2), call.value_cache[table].flatten(1, 2)


def prompt_rows(call: Call) -> Tensor:
    """Row of the prompt table per sequence, int64 [B]; -1 = none."""
    assert call.prompt_key is not None
    if call.prompt_index is not None:
        return call.prompt_index.long()
    rows = call.prompt_key.shape[0]
    batch = torch.arange(call.batch_size, device=call.query.device)
    return batch if rows == call.batch_size else torch.zeros_like(batch)


def _gather_prompts(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Each sequence's prompts [B, Hkv, P, D] and activated gates [B, Hq]; zeros where it has none."""
    assert call.prompt_key is not None and call.prompt_value is not None and call.gate is not None
    rows = prompt_rows(call)
    absent = (rows < 0)[:, None]
    rows = rows.clamp(min=0)
    # masked_fill and not a product with 0: a row that nobody uses may hold NaN
    hidden = absent[..., None, None]
    key, value = call.prompt_key[rows].masked_fill(hidden, 0), call.prompt_value[rows].masked_fill(hidden, 0)
    gate = (call.gate[rows] if call.gate.shape[0] > 1 else call.gate.expand(len(rows), -1)).masked_fill(
        absent, 0
    )
    return key, value, gate.tanh() if call.tanh_gate else gate


def _softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float,
    bias: Tensor | None,
    visible: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    if visible is None:
        scores = (query @ key.transpose(-1, -2)) * scale
    else:
        scores, value, infinities = _among_visible(query, key, value, scale, visible)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:  # a key that every query sees, and whose value is 0
        scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)), -1)
        value = F.pad(value, (0, 0, 0, 1))
    if scores.shape[-1] == 0:
        return scores @ value, scores.new_full(scores.shape[:-1], float("-inf"))
    # a finite pivot for rows without a key: exp(-inf - 0) = 0, where -inf - -inf would be NaN
    pivot = scores.detach().amax(-1, keepdim=True)
    pivot = pivot.masked_fill(pivot == float("-inf"), 0)
    weights = (scores - pivot).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    safe_total = total.masked_fill(empty, 1)
    lse = (pivot + safe_total.log()).masked_fill(empty, float("-inf")).squeeze(-1)
    out = (weights / safe_total) @ value
    if visible is not None and infinities is not None:
        out = out + infinities * (weights / safe_total).sum(-1, keepdim=True)
    return out, lse


def _among_visible(
    query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The scores, the values as far as they are finite, and what those that are not add to each query that sees them.

    A key or value that a query does not see has no influence on it, whatever it holds. A plain product would let one
    through that is NaN or infinite, forward and backward: 0 * NaN is NaN.
    """
    if has_values(key) and bool(key.isfinite().all() & value.isfinite().all()):
        return (query @ key.transpose(-1, -2)) * scale, value, None
    zero_for = lambda x: x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # noqa: E731
    is_finite_key = key.isfinite().all(-1)[:, :, None, :]
    scores = query @ zero_for(key).transpose(-1, -2)
    scores = torch.where(is_finite_key, scores, (query @ key.transpose(-1, -2)).detach())

    pairs = visible.to(value.dtype).expand(scores.shape)
    sees = {x: pairs @ (value == x).to(value.dtype) > 0 for x in (float("inf"), float("-inf"))}
    sees_nan = pairs @ value.isnan().to(value.dtype) > 0
    infinities = torch.zeros_like(query)
    for x, rows in sees.items():
        infinities = infinities.masked_fill(rows, x)
    both = sees[float("inf")] & sees[float("-inf")]
    return scores * scale, zero_for(value), infinities.masked_fill(sees_nan | both, float("nan"))


def _prompt_branch(call: Call, query: Tensor, dtype: torch.dtype) -> Tensor:
    assert call.prompt_key is not None and call.prompt_value is not None and call.gate is not None
    if call.prompt_key.shape[0] == 0:
        return torch.zeros_like(query)
    prompt_key, prompt_value, weight = (t.to(dtype) for t in _gather_prompts(call))
    if call.cu_seqlens_q is None:
        branch, _ = _softmax_attention(
            query, prompt_key, prompt_value, call.scale, call.softcap, None, None, None
        )
        return weight[:, :, None, None] * branch
    total = query.shape[2]
    sequence, _ = _sequence_and_position(call.cu_seqlens_q, total)
    tokens = query[0].transpose(0, 1).unsqueeze(2)  # one "sequence" per token: [total, Hq, 1, D]
    branch, _ = _softmax_attention(
        tokens, prompt_key[sequence], prompt_value[sequence], call.scale, call.softcap, None, None, None
    )
    return (weight[sequence][:, :, None, None] * branch).squeeze(2).transpose(0, 1).unsqueeze(0)


def _sequence_and_position(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    row = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    return sequence, row - cu_seqlens[sequence]


def _in_window(query_position: Tensor, key_position: Tensor, left: int, right: int) -> Tensor:
    """[B, T] and [B, S] positions -> [B, T, S]: which keys each query sees."""
    distance = key_position[:, None, :] - query_position[:, :, None]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        visible = visible & (distance >= -left)
    if right >= 0:
        visible = visible & (distance <= right)
    return visible


def _rotate(x: Tensor, start: Tensor, advance: int, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of [B, T, H, D] at positions start[b] + advance * t, the first 2 * cos.shape[1] dimensions."""
    half = cos.shape[1]
    position = start[:, None] + advance * torch.arange(x.shape[1], device=x.device)[None, :]
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table[position].to(dtype)[:, :, None] for table in (cos, sin))  # [B, T, 1, R / 2]
    rotary, rest = x[..., : 2 * half].to(dtype), x[..., 2 * half :]
    first, second = (
        (rotary[..., ::2], rotary[..., 1::2]) if interleaved else (rotary[..., :half], rotary[..., half:])
    )
    turned = (first * cos - second * sin, first * sin + second * cos)
    rotated = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([rotated.to(x.dtype), rest], -1)
