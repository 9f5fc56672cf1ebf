"""The prompt part of backward, and the row sums that the token part needs.

    Ap  = softmax(scale q pk^T)     dAp = dO pv^T     r = rowsum(Ap * dAp)     dSp = s Ap (dAp - r)
    dpk = scale dSp^T q             dpv = s Ap^T dO   dg = act'(g) sum r       delta = rowsum(dO * out) - s r - dlse
    dsink = -sum e^(sink - lse) delta

with s = act(g); lse counts the head's sink. Two stages, so that the sums have one order and backward gives the same
bits every time: every program of the first writes the partial sum of its rows in float32, and the second adds the
partials of each prompt table row. The sinks' partials are added by torch.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import (
    LOG2E,
    RUN_TIME,
    Cap,
    Prompts,
    activate,
    block_of,
    cap_slopes,
    dot,
    load_gate,
    load_prompts,
    load_tile,
    locate_sequence,
    prompt_row,
    rows_from,
    skip_rows,
    unravel,
)
from .softmax import prompt_softmax


@triton.jit(do_not_specialize=RUN_TIME)
def zinit_partial_sums_kernel(
    query,  # View [B, Hq, T, D]
    prompt_key,  # View [N, Hkv, P, D]; no pointer: delta alone
    prompt_value,  # View [N, Hkv, P, D]
    gate_ptr,  # float32 [N or 1, Hq]
    prompt_index_ptr,  # int32 [B] or None
    sinks_ptr,  # float32 [Hq] or None
    cu_seqlens_q_ptr,  # int32 [B + 1] or None
    lse_ptr,  # float32 [B, Hq, T], as forward wrote it; read for the sinks' gradient alone
    out,  # View [B, Hq, T, D]
    grad_out,  # View [B, Hq, T, D]
    grad_lse_ptr,  # float32 [B, Hq, T] or None
    delta_ptr,  # float32 [B, Hq, T], or None where nobody wants it
    partial_key_ptr,  # float32 [B, Hq, parts, P, D] or None: partial sums of dpk / scale
    partial_value_ptr,  # float32 [B, Hq, parts, P, D] or None: partial sums of dpv
    partial_gate_ptr,  # float32 [B, Hq, parts] or None: partial sums of r
    partial_sinks_ptr,  # float32 [B, Hq, parts] or None: partial sums of dsink
    num_heads_q,
    num_heads_kv,
    seqlen_q,  # T; the longest one where packed
    total_q,  # rows of the query tensor
    prompt_length,
    prompt_rows,
    gate_stride,  # 0: one row of gates for all table rows
    num_parts,
    scale_log2,  # scale * log2(e)
    cap_scale,  # scale / softcap; None: no soft cap
    cap_size,  # softcap
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHUNK_D: tl.constexpr,
    TANH: tl.constexpr,
):
    """delta, and one part of the sums over the queries of a head.

    A program owns every num_parts-th tile of queries, and CHUNK_D columns of dpk and dpv: with many prompts and a wide
    head all columns together would not fit the registers.
    """
    NUM_CHUNKS: tl.constexpr = block_of(HEAD_DIM) // CHUNK_D
    WANTS_DELTA: tl.constexpr = delta_ptr is not None or partial_sinks_ptr is not None
    cap = Cap(cap_scale, cap_size)
    piece, head, sequence = unravel(tl.program_id(0), num_parts * NUM_CHUNKS, num_heads_q)
    part, chunk = piece % num_parts, piece // num_parts
    kv_head = head // (num_heads_q // num_heads_kv)
    batch, first_q, num_q = locate_sequence(cu_seqlens_q_ptr, sequence, seqlen_q, total_q)
    query_rows = rows_from(query, batch, head, first_q)
    grad_out_rows = rows_from(grad_out, batch, head, first_q)
    row_offset = (batch.to(tl.int64) * num_heads_q + head) * total_q + first_q
    if prompt_key.ptr is not None:
        prompts = Prompts(
            prompt_key, prompt_value, gate_ptr, prompt_index_ptr, prompt_rows, prompt_length, gate_stride
        )
        row = prompt_row(prompts, sequence)
        has_row = row >= 0
        row = tl.maximum(row, 0)  # a sequence without prompts writes partial sums that nobody reads
        gate = load_gate(prompts, row, head, TANH)
        dtype: tl.constexpr = query.ptr.dtype.element_ty
        prompt_k = load_prompts(prompt_key, row, kv_head, prompt_length, dtype, BLOCK_P, HEAD_DIM)
        prompt_v = load_prompts(prompt_value, row, kv_head, prompt_length, dtype, BLOCK_P, HEAD_DIM)

    sum_key = tl.zeros([BLOCK_P, CHUNK_D], tl.float32)
    sum_value = tl.zeros([BLOCK_P, CHUNK_D], tl.float32)
    sum_r = tl.zeros([BLOCK_M], tl.float32)
    sum_sink = tl.zeros([BLOCK_M], tl.float32)
    sink = None
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head)
    rows = tl.arange(0, BLOCK_M)
    column = chunk * CHUNK_D
    for start in range(part * BLOCK_M, num_q, num_parts * BLOCK_M):
        left = num_q - start
        do = load_tile(skip_rows(grad_out_rows, start), left, BLOCK_M, HEAD_DIM, True)
        delta = tl.zeros([BLOCK_M], tl.float32)
        if WANTS_DELTA:
            out_tile = load_tile(rows_from(out, batch, head, first_q + start), left, BLOCK_M, HEAD_DIM, True)
            delta = tl.sum(do.to(tl.float32) * out_tile.to(tl.float32), 1)
            if grad_lse_ptr is not None:
                delta -= tl.load(grad_lse_ptr + row_offset + start + rows, mask=rows < left, other=0.0)
        if prompt_key.ptr is not None:
            q = load_tile(skip_rows(query_rows, start), left, BLOCK_M, HEAD_DIM, True)
            p, s = prompt_softmax(q, prompt_k, prompt_length, scale_log2, cap, BLOCK_P)
            dp = dot(do, tl.trans(prompt_v))  # [BLOCK_M, BLOCK_P]
            r = tl.sum(p * dp, 1)
            delta -= tl.where(has_row, gate * r, 0.0)  # row 0, read in its place, may hold NaN
            sum_r += r
            if NUM_CHUNKS > 1:
                q = _load_columns(skip_rows(query_rows, start), column, left, BLOCK_M, CHUNK_D, HEAD_DIM)
                do = _load_columns(skip_rows(grad_out_rows, start), column, left, BLOCK_M, CHUNK_D, HEAD_DIM)
            if partial_key_ptr is not None:
                ds = gate * p * (dp - r[:, None])
                if cap.size is not None:
                    ds *= cap_slopes(s, cap)
                sum_key = dot(tl.trans(ds.to(q.dtype)), q, sum_key)
            if partial_value_ptr is not None:
                sum_value = dot(tl.trans((gate * p).to(q.dtype)), do, sum_value)
        if delta_ptr is not None:
            owned = tl.where(chunk == 0, left, 0)
            tl.store(delta_ptr + row_offset + start + rows, delta, mask=rows < owned)
        if partial_sinks_ptr is not None:
            lse = tl.load(lse_ptr + row_offset + start + rows, mask=rows < left, other=float("inf"))
            # a sink of -inf has no weight, even where lse is -inf too
            sum_sink -= tl.where(sink == float("-inf"), 0.0, tl.math.exp2((sink - lse) * LOG2E) * delta)

    slot = (sequence.to(tl.int64) * num_heads_q + head) * num_parts + part
    if partial_sinks_ptr is not None:
        if chunk == 0:
            tl.store(partial_sinks_ptr + slot, tl.sum(sum_sink, 0))
    if prompt_key.ptr is not None:
        index = tl.arange(0, BLOCK_P)
        columns = column + tl.arange(0, CHUNK_D)
        offsets = slot * prompt_length * HEAD_DIM + index[:, None] * HEAD_DIM + columns[None, :]
        mask = (index < prompt_length)[:, None] & (columns < HEAD_DIM)[None, :]
        if partial_key_ptr is not None:
            tl.store(partial_key_ptr + offsets, sum_key, mask=mask)
        if partial_value_ptr is not None:
            tl.store(partial_value_ptr + offsets, sum_value, mask=mask)
        if partial_gate_ptr is not None:
            if chunk == 0:
                tl.store(partial_gate_ptr + slot, tl.sum(sum_r, 0))


@triton.jit
def _load_columns(
    rows, column, num_rows, BLOCK_ROWS: tl.constexpr, CHUNK_D: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """[BLOCK_ROWS, CHUNK_D] from a column on; zero at rows >= num_rows and at columns >= HEAD_DIM."""
    index = tl.arange(0, BLOCK_ROWS)
    columns = column + tl.arange(0, CHUNK_D)
    mask = (index < num_rows)[:, None] & (columns < HEAD_DIM)[None, :]
    return tl.load(rows.ptr + index[:, None] * rows.stride + columns[None, :], mask=mask, other=0.0)


class Summands(NamedTuple):
    """The partial results that belong to one table row and key head, and the elements that a program sums of each."""

    prompt_index_ptr: Any
    first: Any  # of the slots that may belong to the row, (sequence, head of the group, part)
    last: Any
    row: Any
    kv_head: Any
    num_heads_q: Any
    group: Any  # heads of a key head
    num_parts: Any
    elements: Any
    size: Any  # elements of a partial result


@triton.jit
def _sum_partials(partial_ptr, summands, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr):
    """[BLOCK_E] sums over the sequences of a prompt row, the heads of a key head's group, and the parts."""
    prompt_index_ptr, first, last, row, kv_head, num_heads_q, group, num_parts, elements, size = summands
    total = tl.zeros([BLOCK_E], tl.float32)
    per_sequence = group * num_parts
    for start in range(first, last, BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        sequence = slots // per_sequence
        found = slots < last
        if prompt_index_ptr is not None:
            found = found & (tl.load(prompt_index_ptr + sequence, mask=found, other=-1) == row)
        slot = (sequence.to(tl.int64) * num_heads_q + kv_head * group) * num_parts + slots % per_sequence
        pointers = partial_ptr + slot[:, None] * size + elements[None, :]
        total += tl.sum(tl.load(pointers, mask=found[:, None] & (elements < size)[None, :], other=0.0), 0)
    return total


@triton.jit(do_not_specialize=RUN_TIME)
def zinit_add_partials_kernel(
    partial_key_ptr,  # as the first stage wrote them
    partial_value_ptr,
    partial_gate_ptr,
    gate_ptr,  # float32 [gate_rows, Hq]
    prompt_index_ptr,  # int32 [B] or None
    grad_prompt_key_ptr,  # [N, Hkv, P, D] or None
    grad_prompt_value_ptr,  # [N, Hkv, P, D] or None
    grad_gate_ptr,  # float32 [gate_rows, Hq] or None
    num_heads_q,
    num_heads_kv,
    num_sequences,
    prompt_length,
    prompt_rows,
    gate_rows,
    num_parts,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TANH: tl.constexpr,
):
    """The second stage: one program owns BLOCK_E elements of dpk and dpv of one table row and key head.

    The first of them also sums dg over the heads of its group; row 0 does so for a gate that all rows share.
    """
    size = prompt_length * HEAD_DIM
    tile, kv_head, row = unravel(tl.program_id(0), tl.cdiv(size, BLOCK_E), num_heads_kv)
    group = num_heads_q // num_heads_kv
    per_sequence = group * num_parts
    elements = tile * BLOCK_E + tl.arange(0, BLOCK_E)
    first, last = row * 0, num_sequences * per_sequence
    if prompt_index_ptr is None:
        if prompt_rows > 1:  # each sequence has a row of its own, which sums its own partials alone
            first = row * per_sequence
            last = first + per_sequence
    offset = (row.to(tl.int64) * num_heads_kv + kv_head) * size
    summands = Summands(
        prompt_index_ptr, first, last, row, kv_head, num_heads_q, group, num_parts, elements, size
    )
    if grad_prompt_key_ptr is not None:
        total = _sum_partials(partial_key_ptr, summands, BLOCK_E, BLOCK_S)
        total = (total * scale).to(grad_prompt_key_ptr.dtype.element_ty)
        tl.store(grad_prompt_key_ptr + offset + elements, total, mask=elements < size)
    if grad_prompt_value_ptr is not None:
        total = _sum_partials(partial_value_ptr, summands, BLOCK_E, BLOCK_S)
        total = total.to(grad_prompt_value_ptr.dtype.element_ty)
        tl.store(grad_prompt_value_ptr + offset + elements, total, mask=elements < size)
    if grad_gate_ptr is not None:
        if (tile == 0) & (row < gate_rows):
            for member in range(0, group):
                head = kv_head * group + member
                _add_gate(
                    partial_gate_ptr,
                    gate_ptr,
                    prompt_index_ptr,
                    grad_gate_ptr,
                    row,
                    head,
                    num_heads_q,
                    num_sequences,
                    prompt_rows,
                    gate_rows,
                    num_parts,
                    BLOCK_S,
                    TANH,
                )


@triton.jit
def _add_gate(
    partial_gate_ptr,
    gate_ptr,
    prompt_index_ptr,
    grad_gate_ptr,
    row,
    head,
    num_heads_q,
    num_sequences,
    prompt_rows,
    gate_rows,
    num_parts,
    BLOCK_S: tl.constexpr,
    TANH: tl.constexpr,
):
    """dg = act'(gate) sum r over the sequences that use this gate."""
    total = tl.zeros([BLOCK_S], tl.float32)
    for start in range(0, num_sequences * num_parts, BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        sequence = slots // num_parts
        found = slots < num_sequences * num_parts
        rows = sequence
        if prompt_index_ptr is not None:
            rows = tl.load(prompt_index_ptr + sequence, mask=found, other=-1)
            found = found & (rows >= 0) & (rows < prompt_rows)
        found = found & (tl.where(gate_rows == 1, row, rows) == row)
        slot = (sequence.to(tl.int64) * num_heads_q + head) * num_parts + slots % num_parts
        total += tl.load(partial_gate_ptr + slot, mask=found, other=0.0)
    gate = tl.load(gate_ptr + row * num_heads_q + head)
    slope = 1.0
    if TANH:
        act = activate(gate, TANH)
        slope = 1.0 - act * act
    sum_r = tl.sum(total, 0)
    grad = tl.where(sum_r == 0, 0.0, slope * sum_r)  # the gate of a row that nobody uses may be NaN
    tl.store(grad_gate_ptr + row * num_heads_q + head, grad)
