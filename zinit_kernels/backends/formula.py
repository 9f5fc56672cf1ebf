"""The formula in plain PyTorch: what `composed` is made of, and what it and the fused backends differentiate twice.

Kernels have no second derivative, neither the fused ones nor SDPA's on a CPU: where autograd asks for one
(create_graph=True), the first gradients are those of `attention`, which is written out in differentiable
operations. Sequences of a packed batch or a cache become calls of their own, without the keys that none of
their queries sees. That reads lengths on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import CALL, CacheCall, Call
from ..values import has_values


def differentiable_gradients(
    call: Call, wanted: Sequence[bool], grad_out: Tensor | None, grad_lse: Tensor | None
) -> list[Tensor | None]:
    """The gradients, with a graph of their own, of those of the call's differentiable tensors that are wanted.

    Each enters through a view of its own. The search for gradients stops there; it would go on from the query
    into a key that it was computed from, and one tensor that was passed twice stays two inputs.
    """
    given = {name: getattr(call, name) for name in CALL.differentiable}
    views = {
        name: tensor.view_as(tensor)
        for (name, tensor), want in zip(given.items(), wanted, strict=True)
        if want and tensor is not None
    }
    outputs = _attention_without_autocast(call._replace(**views))
    pairs = [(o, g) for o, g in zip(outputs, (grad_out, grad_lse), strict=True) if g is not None]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        list(views.values()),
        [g for _, g in pairs],
        create_graph=True,
        allow_unused=True,
    )
    grads = dict(zip(views, found, strict=True))
    return [grads.get(name) for name in given]


def _attention_without_autocast(call: Call) -> tuple[Tensor, Tensor]:
    with torch.autocast(call.query.device.type, enabled=False):
        return attention(call)


def attention(call: Call) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, T, D] in the query's dtype, log-sum-exp [B, Hq, T]), computed in float32, or float64 of float64."""
    if call.cu_seqlens_q is None:
        out, lse = token_branch(call)
    else:
        branches = [token_branch(one) for one in sequences(call)]
        if not branches:
            return torch.zeros_like(call.query), call.query.new_zeros(
                call.query.shape[:3], dtype=torch.float32
            )
        out, lse = (torch.cat(parts, 2) for parts in zip(*branches, strict=True))
    if call.prompt_key is not None and call.prompt_key.numel():
        out = out + prompt_branch(call)
    return out.to(call.query.dtype), lse


def token_branch(call: Call) -> tuple[Tensor, Tensor]:
    """The first softmax of a call without cu_seqlens, in the computing dtype."""
    query, key, value = (_widened(t) for t in (call.query, call.key, call.value))
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    bias, hidden = masks(call)
    if hidden is None or (has_values(key) and bool(key.isfinite().all()) and bool(value.isfinite().all())):
        scores = call.scale * (query @ key.mT)
        infinite = None
    else:
        scores, value, infinite = _scores_apart(query, key, value, call.scale, hidden)
    scores = _capped(scores, call.softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    if call.sinks is not None:
        weights, lse = _softmax(_with_sinks(scores, call.sinks))
        weights = weights[..., :-1]
    else:
        weights, lse = _softmax(scores)
    out = weights @ value
    if infinite is not None:
        out = out + infinite * weights.sum(-1, keepdim=True)
    return out, lse


def _with_sinks(scores: Tensor, sinks: Tensor) -> Tensor:
    """The scores, behind them each head's sink."""
    column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), -1)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, log-sum-exp); a query without keys has weights 0 and -inf, and no gradient."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], float("-inf"))
    largest = scores.detach().amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == float("-inf"), 0)  # -inf - -inf would be NaN
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    return weights / total, (largest + total.log()).masked_fill(empty, float("-inf")).squeeze(-1)


def _scores_apart(
    query: Tensor, key: Tensor, value: Tensor, scale: float, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values that are NaN or infinite, kept from the queries that do not see them (0 * NaN is NaN).

    Returns the scores; the finite values, zero in place of the others; and what the others add to each query that sees
    them: an infinity or NaN.
    """
    broken = ~key.isfinite().all(-1)[:, :, None]
    finite_key, finite_value = (t.nan_to_num(0.0, 0.0, 0.0) for t in (key, value))
    scores = torch.where(broken, (query @ key.mT).detach(), query @ finite_key.mT) * scale
    seen = (~hidden).to(value.dtype).expand(scores.shape)
    nan, plus, minus = (
        (seen @ which.to(value.dtype)) > 0
        for which in (value.isnan(), value == float("inf"), value == float("-inf"))
    )
    added = torch.zeros_like(query).masked_fill(plus, float("inf")).masked_fill(minus, float("-inf"))
    return scores, finite_value, added.masked_fill(nan | (plus & minus), float("nan"))


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * (scores / softcap).tanh() if softcap else scores


def prompt_branch(call: Call) -> Tensor:
    """The second sum of a call with prompts, [B, Hq, T, D] in the computing dtype."""
    query = _widened(call.query)
    key, value, weight = (_widened(t) for t in prompts(call))
    one_by_one = call.cu_seqlens_q is not None and key.shape[0] != 1
    if one_by_one:  # a packed token is a sequence of its own, with its sequence's prompts
        assert call.cu_seqlens_q is not None
        lengths = call.cu_seqlens_q.diff().long()
        key, value, weight = (t.repeat_interleave(lengths, 0) for t in (key, value, weight))
        query = query.permute(2, 1, 0, 3)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = _capped(call.scale * (query @ key.mT), call.softcap)
    branch = weight[:, :, None, None] * (scores.softmax(-1) @ value)
    return branch.permute(2, 1, 0, 3) if one_by_one else branch


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def sequences(call: Call) -> list[Call]:
    """One call without cu_seqlens for each sequence of a packed batch, its prompts left out."""
    assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
    bounds_q, bounds_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    return [
        _one_sequence(
            call,
            call.query[:, :, bounds_q[b] : bounds_q[b + 1]],
            call.key[:, :, bounds_k[b] : bounds_k[b + 1]],
            call.value[:, :, bounds_k[b] : bounds_k[b + 1]],
        )
        for b in range(call.batch_size)
    ]


def _one_sequence(call: Call | CacheCall, query: Tensor, key: Tensor, value: Tensor) -> Call:
    """[1, H, T, D] queries against the keys that they see: the window is aligned at the end, so the first ones go."""
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    first = max(seqlen_k - seqlen_q - call.window_left, 0) if call.window_left >= 0 else 0
    return Call(
        query=query,
        key=key[:, :, first:],
        value=value[:, :, first:],
        max_seqlen_q=seqlen_q,
        max_seqlen_k=seqlen_k - first,
        sinks=call.sinks,
        scale=call.scale,
        softcap=call.softcap,
        window_left=call.window_left,
        window_right=call.window_right,
    )


def append(call: CacheCall) -> tuple[Tensor, list[Call]]:
    """Rotates, writes the new keys and values behind those of each sequence, in place. Returns the rotated queries
    [B, Hq, T, D], and the attention of each sequence that is left to do, its prompts left out."""
    query, new_key = rotated(call)
    lengths = call.cache_seqlens.tolist()
    query = query.transpose(1, 2)
    pieces = []
    for b, length in enumerate(lengths):
        if new_key is not None and call.new_value is not None:
            end = length + new_key.shape[1]
            _write(call, b, length, new_key[b], call.new_value[b])
            length = end
        first = 0 if call.cache_leftpad is None else int(call.cache_leftpad[b])
        key, value = (t[:, :, first:] for t in _read(call, b, length))
        pieces.append(_one_sequence(call, query[b : b + 1], key, value))
    return query, pieces


def rotated(call: CacheCall) -> tuple[Tensor, Tensor | None]:
    """(query, new_key) with the rotary embedding of their positions, as they are where the call has no tables."""
    query, new_key = call.query, call.new_key
    if call.rotary_cos is None or call.rotary_sin is None:
        return query, new_key
    start = call.cache_seqlens.long()[:, None]
    # flash-attn's rule: without a causal mask or a window all queries are at the first new position
    step = 0 if call.window_left == call.window_right == -1 else 1
    tables = call.rotary_cos, call.rotary_sin
    positions = start + step * torch.arange(query.shape[1], device=query.device)
    query = _rotate(query, positions, *tables, call.rotary_interleaved)
    if new_key is not None:
        positions = start + torch.arange(new_key.shape[1], device=query.device)
        new_key = _rotate(new_key, positions, *tables, call.rotary_interleaved)
    return query, new_key


def _write(call: CacheCall, b: int, start: int, key: Tensor, value: Tensor) -> None:
    end = start + key.shape[0]
    if call.block_table is None:
        call.key_cache[b, start:end], call.value_cache[b, start:end] = key, value
        return
    page_size = call.key_cache.shape[1]
    positions = torch.arange(start, end, device=key.device)
    pages = call.block_table[b].long()[positions // page_size]
    slots = positions % page_size
    call.key_cache[pages, slots], call.value_cache[pages, slots] = key, value


def _read(call: CacheCall, b: int, length: int) -> tuple[Tensor, Tensor]:
    """The first `length` keys and values of a sequence, [1, Hkv, S, D]."""
    if call.block_table is None:
        caches = call.key_cache[b, :length], call.value_cache[b, :length]
    else:
        pages = call.block_table[b, : -(-length // max(call.key_cache.shape[1], 1))].long()
        caches = (
            call.key_cache[pages].flatten(0, 1)[:length],
            call.value_cache[pages].flatten(0, 1)[:length],
        )
    key, value = caches
    return key[None].transpose(1, 2), value[None].transpose(1, 2)


def _rotate(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of the first 2 * cos.shape[1] dimensions of [B, T, H, D]; positions [B, T]."""
    dtype, rotary_dim = torch.promote_types(x.dtype, torch.float32), 2 * cos.shape[1]
    rotated = x[..., :rotary_dim].to(dtype)
    pairs = rotated.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    real, imaginary = pairs.unbind(-1 if interleaved else -2)
    cos, sin = cos[positions].to(dtype).unsqueeze(2), sin[positions].to(dtype).unsqueeze(2)
    turned = torch.stack(
        (real * cos - imaginary * sin, imaginary * cos + real * sin), -1 if interleaved else -2
    )
    return torch.cat((turned.flatten(-2).to(x.dtype), x[..., rotary_dim:]), -1)


def masks(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """(bias, hidden) of a call without cu_seqlens, each broadcastable to [B, Hq, T, S]: what is added to the
    scores, and True where a query does not see a key."""
    bias = None if call.key_bias is None else call.key_bias[:, None, None]
    hidden = None if bias is None else bias == float("-inf")
    if call.dense_mask is not None:
        if call.dense_mask.dtype == torch.bool:
            invisible = ~call.dense_mask
        else:
            bias = call.dense_mask if bias is None else bias + call.dense_mask
            invisible = call.dense_mask == float("-inf")
        hidden = invisible if hidden is None else hidden | invisible
    if (call.window_left, call.window_right) != (-1, -1):
        invisible = _outside_window(call)[None, None]
        hidden = invisible if hidden is None else hidden | invisible
    return bias, hidden


def _outside_window(call: Call) -> Tensor:
    """[T, S]: whether a key lies outside of a query's window; the last query is at the last key."""
    seqlen_q, seqlen_k = call.query.shape[2], call.key.shape[2]
    row, column = (torch.arange(n, device=call.query.device) for n in (seqlen_q, seqlen_k))
    ahead = column[None, :] - row[:, None] - (seqlen_k - seqlen_q)
    if call.window_left < 0:
        return ahead > call.window_right
    if call.window_right < 0:
        return ahead < -call.window_left
    return (ahead < -call.window_left) | (ahead > call.window_right)


def prompts(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts [n, Hkv, P, D] and activated gates [n, Hq] of each sequence, zeros where it has none; n = 1 where all
    share them."""
    assert call.prompt_key is not None and call.prompt_value is not None and call.gate is not None
    key, value, gate = call.prompt_key, call.prompt_value, call.gate
    if call.prompt_index is not None:
        rows = call.prompt_index.long()
        absent = rows < 0
        rows = rows.clamp(min=0)
        # not a product with 0: a row that nobody asks for may hold NaN
        key, value = (t[rows].masked_fill(absent[:, None, None, None], 0) for t in (key, value))
        gate = gate[rows] if gate.shape[0] > 1 else gate.expand(len(rows), -1)
        gate = gate.masked_fill(absent[:, None], 0)
    gate = gate.tanh() if call.tanh_gate else gate
    return key, value, gate.expand(key.shape[0], -1)
