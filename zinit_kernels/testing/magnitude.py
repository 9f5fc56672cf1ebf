"""How large the terms are that an output or a gradient sums: the unit of its float32 rounding.

A gradient can cancel to nothing (with one key, dS = A (dP - delta) = 0). Then neither its own size nor the error
of eager PyTorch says how much rounding is fair. So every sum of the formulas is evaluated in float64 with the
absolute values of its terms. The gradients of query and key also inherit the rounding of `out`: backward reads it
as it was stored, in delta = rowsum(dO * out).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import reference
from ..call import CALL, Call


class _Sequence(NamedTuple):
    rows: slice  # of the query tensor's token dimension
    batch: int
    query: Tensor  # [Hq, T, D]
    key: Tensor  # [Hq, S, D], repeated to the query heads
    value: Tensor
    hidden: Tensor | None  # additive mask, broadcastable to [Hq, T, S]
    prompt_key: Tensor | None  # [Hq, P, D]
    prompt_value: Tensor | None
    gate: Tensor | None  # [Hq], after the activation


def magnitudes(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, dtype: torch.dtype
) -> dict[str, float]:
    """The largest sum of absolute terms in out, lse and each gradient of a float64 call; out is stored in `dtype`."""
    stored = 0.5 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    found = dict.fromkeys(("out", "lse", *CALL.differentiable), 0.0)
    dsinks = torch.zeros(call.query.shape[1], dtype=call.query.dtype, device=call.query.device)
    rows: dict[str, dict[int, Tensor]] = {"prompt_key": {}, "prompt_value": {}, "gate": {}}
    table_rows = reference.prompt_rows(call).tolist() if call.prompt_key is not None else []
    for one in _sequences(call):
        dout = grad_out[one.batch, :, one.rows].abs()
        scores, slope = _capped(call.scale * one.query @ one.key.mT, call.softcap)
        scores = scores if one.hidden is None else scores + one.hidden
        if call.sinks is not None:
            scores = torch.cat((scores, call.sinks[:, None, None].expand(*scores.shape[:2], 1)), -1)
        weights = torch.softmax(scores, -1).nan_to_num(0) if scores.shape[-1] else scores
        weights, sink_weights = weights.split((one.key.shape[1], weights.shape[-1] - one.key.shape[1]), -1)
        key, value, query = one.key.abs(), one.value.abs(), one.query.abs()
        dweights = dout @ value.mT
        delta = (weights * dweights).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta + grad_lse[one.batch, :, one.rows, None].abs()
        delta = delta + stored * (dout * out[one.batch, :, one.rows].abs()).sum(-1, keepdim=True)
        dscores = weights * (dweights + delta) * slope
        dsinks += (sink_weights * delta).sum((1, 2))
        summed, dquery = weights @ value, call.scale * dscores @ key
        dkey, dvalue = call.scale * dscores.mT @ query, weights.mT @ dout
        if one.prompt_key is not None and one.prompt_value is not None and one.gate is not None:
            size = one.gate.abs()[:, None, None]
            scores, slope = _capped(call.scale * one.query @ one.prompt_key.mT, call.softcap)
            weights = torch.softmax(scores, -1)
            dweights = dout @ one.prompt_value.abs().mT
            r = (weights * dweights).sum(-1, keepdim=True)
            dscores = size * weights * (dweights + r) * slope
            summed = summed + size * weights @ one.prompt_value.abs()
            dquery = dquery + call.scale * dscores @ one.prompt_key.abs()
            terms = (call.scale * dscores.mT @ query, (size * weights).mT @ dout, r.sum((1, 2)))
            for name, term in zip(rows, terms, strict=True):
                row = table_rows[one.batch if call.cu_seqlens_q is None else _sequence_of(call, one)]
                rows[name][row] = rows[name].get(row, 0) + term
        scores = call.scale * query @ key.mT
        for name, term in (
            ("out", summed),
            ("lse", scores),
            ("query", dquery),
            ("key", dkey),
            ("value", dvalue),
        ):
            found[name] = max(found[name], _largest(term))
    if call.sinks is not None:
        found["lse"], found["sinks"] = max(found["lse"], _largest(call.sinks)), _largest(dsinks)
    group = call.query.shape[1] // call.key.shape[1]
    for name, by_row in rows.items():
        found[name] = group * max((_largest(term) for term in by_row.values()), default=0.0)
    found["key"], found["value"] = group * found["key"], group * found["value"]
    return found


def _capped(scores: Tensor, softcap: float) -> tuple[Tensor, Tensor | float]:
    """The scores under a soft cap, and the derivative."""
    if not softcap:
        return scores, 1.0
    size = (scores / softcap).tanh()
    return softcap * size, 1 - size * size


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _sequence_of(call: Call, one: _Sequence) -> int:
    assert call.cu_seqlens_q is not None
    return int((call.cu_seqlens_q[1:] <= one.rows.start).sum())


def _sequences(call: Call) -> Iterator[_Sequence]:
    group = call.query.shape[1] // call.key.shape[1]
    bias, visible = reference.token_mask(call)
    mask = bias
    if visible is not None:
        hidden = torch.zeros((), dtype=call.query.dtype, device=call.query.device).masked_fill(
            ~visible, float("-inf")
        )
        mask = hidden if bias is None else bias + hidden
    if mask is not None:
        mask = mask.expand(call.query.shape[0], call.query.shape[1], call.query.shape[2], call.key.shape[2])
    for b in range(call.batch_size):
        rows, columns, batch = slice(None), slice(None), b
        if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
            rows = slice(int(call.cu_seqlens_q[b]), int(call.cu_seqlens_q[b + 1]))
            columns = slice(int(call.cu_seqlens_k[b]), int(call.cu_seqlens_k[b + 1]))
            batch = 0
            if rows.start == rows.stop:
                continue
        key, value = (
            t[batch, :, columns].nan_to_num(0).repeat_interleave(group, 0) for t in (call.key, call.value)
        )
        prompts: tuple[Tensor | None, ...] = (None, None, None)
        row = int(reference.prompt_rows(call)[b]) if call.prompt_key is not None else -1
        if (
            row >= 0
            and call.prompt_key is not None
            and call.prompt_value is not None
            and call.gate is not None
        ):
            gate = call.gate[row if call.gate.shape[0] > 1 else 0]
            prompts = (
                call.prompt_key[row].repeat_interleave(group, 0),
                call.prompt_value[row].repeat_interleave(group, 0),
                gate.tanh() if call.tanh_gate else gate,
            )
        hidden = None if mask is None else mask[batch, :, rows, columns]
        yield _Sequence(rows, batch, call.query[batch, :, rows], key, value, hidden, *prompts)
