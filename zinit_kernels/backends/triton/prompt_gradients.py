"""The prompt part of backward, and the row sums that the token part needs.

    Ap  = softmax(scale q pk^T)     dAp = dO pv^T     r = rowsum(Ap * dAp)     dSp = s Ap (dAp - r)
    dpk = scale dSp^T q             dpv = s Ap^T dO   dg = act'(g) sum r       delta = rowsum(dO * out) - s r - dlse

Two stages, so that the sums have one order: every program leaves the partial sum of its rows in float32, and a second
kernel adds the partials of each prompt table row.
"""

import triton
import triton.language as tl

from .primitives import activate, load_tile, locate_sequence, prompt_row, prompt_weights, row_ptr, unravel

RUN_TIME = [
    "heads_q", "heads_kv", "seqlen_q", "total_q", "sequences", "prompt_length", "prompt_rows", "gate_stride",
    "gate_rows", "parts",
]  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME)
def partial_sums_kernel(
    query_ptr, prompt_key_ptr, prompt_value_ptr, gate_ptr, prompt_index_ptr, cu_seqlens_q_ptr, out_ptr,
    grad_out_ptr,
    grad_lse_ptr, delta_ptr, partial_key_ptr, partial_value_ptr, partial_gate_ptr,
    query_strides, prompt_key_strides, prompt_value_strides, out_strides, grad_out_strides,
    heads_q, heads_kv, seqlen_q, total_q, prompt_length, prompt_rows, gate_stride, parts, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
    CHUNK_D: tl.constexpr,
    TANH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta [B, Hq, T], and float32 partials of dpk / scale and dpv [B, Hq, parts, P, D] and of sum r [B, Hq, parts].

    A program owns every `parts`-th tile of queries of one head, and CHUNK_D columns of dpk and dpv: with many prompts
    and a wide head all columns together would not fit the registers.
    """
    piece, head, sequence = unravel(tl.program_id(0), parts * (BLOCK_D // CHUNK_D), heads_q)
    part, chunk = piece % parts, piece // parts
    head_kv = head // (heads_q // heads_kv)
    batch, first_q, num_q = locate_sequence(cu_seqlens_q_ptr, sequence, seqlen_q, total_q)
    query_ptr = row_ptr(query_ptr, query_strides, batch, head, first_q)
    grad_out_ptr = row_ptr(grad_out_ptr, grad_out_strides, batch, head, first_q)
    row_offset = (batch.to(tl.int64) * heads_q + head) * total_q + first_q
    if prompt_key_ptr is not None:
        row = prompt_row(prompt_index_ptr, sequence, prompt_rows)
        has_row = row >= 0
        row = tl.maximum(row, 0)  # a sequence without prompts leaves partials that nobody reads
        gate = activate(tl.load(gate_ptr + row * gate_stride + head), TANH)
        prompts = tl.arange(0, BLOCK_P)
        prompt_key_ptr = row_ptr(prompt_key_ptr, prompt_key_strides, row, head_kv, row * 0)
        prompt_value_ptr = row_ptr(prompt_value_ptr, prompt_value_strides, row, head_kv, row * 0)
        prompt_key = load_tile(
            prompt_key_ptr, prompt_key_strides[2], prompts, prompt_length, HEAD_DIM, BLOCK_D, True
        )
        prompt_value = load_tile(
            prompt_value_ptr, prompt_value_strides[2], prompts, prompt_length, HEAD_DIM, BLOCK_D, True
        )
        prompt_key = prompt_key.to(query_ptr.dtype.element_ty)  # [BLOCK_P, BLOCK_D]
        prompt_value = prompt_value.to(query_ptr.dtype.element_ty)

    sum_key = tl.zeros([BLOCK_P, CHUNK_D], tl.float32)
    sum_value = tl.zeros([BLOCK_P, CHUNK_D], tl.float32)
    sum_r = tl.zeros([BLOCK_M], tl.float32)
    rows = tl.arange(0, BLOCK_M)
    column = chunk * CHUNK_D
    for start in range(part * BLOCK_M, num_q, parts * BLOCK_M):
        left = num_q - start
        query_tile_ptr = query_ptr + tl.cast(start, tl.int64) * query_strides[2]
        grad_out_tile_ptr = grad_out_ptr + tl.cast(start, tl.int64) * grad_out_strides[2]
        grad_out = load_tile(grad_out_tile_ptr, grad_out_strides[2], rows, left, HEAD_DIM, BLOCK_D, True)
        delta = tl.zeros([BLOCK_M], tl.float32)
        if delta_ptr is not None:
            out_tile_ptr = row_ptr(out_ptr, out_strides, batch, head, first_q + start)
            out = load_tile(out_tile_ptr, out_strides[2], rows, left, HEAD_DIM, BLOCK_D, True)
            delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
            if grad_lse_ptr is not None:
                delta -= tl.load(grad_lse_ptr + row_offset + start + rows, mask=rows < left, other=0.0)
        if prompt_key_ptr is not None:
            query = load_tile(query_tile_ptr, query_strides[2], rows, left, HEAD_DIM, BLOCK_D, True)
            weights = prompt_weights(query, prompt_key, prompt_length, scale_log2, BLOCK_P, PRECISION)
            grad_weights = tl.dot(
                grad_out, tl.trans(prompt_value), input_precision=PRECISION
            )  # [BLOCK_M, BLOCK_P]
            r = tl.sum(weights * grad_weights, 1)
            delta -= tl.where(has_row, gate * r, 0.0)  # row 0, read in its place, may hold NaN
            sum_r += r
            if CHUNK_D < BLOCK_D:
                query = load_tile(
                    query_tile_ptr + column, query_strides[2], rows, left, HEAD_DIM - column, CHUNK_D, True
                )
                grad_out = load_tile(
                    grad_out_tile_ptr + column, grad_out_strides[2], rows, left, HEAD_DIM - column, CHUNK_D, True,
                )  # fmt: skip
            if partial_key_ptr is not None:
                grad_scores = gate * weights * (grad_weights - r[:, None])
                sum_key = tl.dot(
                    tl.trans(grad_scores.to(query.dtype)), query, sum_key, input_precision=PRECISION
                )
            if partial_value_ptr is not None:
                weights = (gate * weights).to(query.dtype)
                sum_value = tl.dot(tl.trans(weights), grad_out, sum_value, input_precision=PRECISION)
        if delta_ptr is not None:
            owned = tl.where(chunk == 0, left, 0)
            tl.store(delta_ptr + row_offset + start + rows, delta, mask=rows < owned)

    if prompt_key_ptr is not None:
        slot = (sequence.to(tl.int64) * heads_q + head) * parts + part
        columns = column + tl.arange(0, CHUNK_D)
        offsets = slot * prompt_length * HEAD_DIM + prompts[:, None] * HEAD_DIM + columns[None, :]
        mask = (prompts < prompt_length)[:, None] & (columns < HEAD_DIM)[None, :]
        if partial_key_ptr is not None:
            tl.store(partial_key_ptr + offsets, sum_key, mask=mask)
        if partial_value_ptr is not None:
            tl.store(partial_value_ptr + offsets, sum_value, mask=mask)
        if partial_gate_ptr is not None:
            if chunk == 0:
                tl.store(partial_gate_ptr + slot, tl.sum(sum_r, 0))


@triton.jit
def _sum_partials(
    partial_ptr, prompt_index_ptr, first, last, row, head_kv, elements, size, heads_q, group, parts,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """[BLOCK_E] sums over the sequences of a prompt row, the heads of a key head's group, and the parts."""
    total = tl.zeros([BLOCK_E], tl.float32)
    per_sequence = group * parts
    for start in range(first, last, BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        sequence = slots // per_sequence
        found = slots < last
        if prompt_index_ptr is not None:
            found = found & (tl.load(prompt_index_ptr + sequence, mask=found, other=-1) == row)
        index = (sequence.to(tl.int64) * heads_q + head_kv * group) * parts + slots % per_sequence
        pointers = partial_ptr + index[:, None] * size + elements[None, :]
        total += tl.sum(tl.load(pointers, mask=found[:, None] & (elements < size)[None, :], other=0.0), 0)
    return total


@triton.jit(do_not_specialize=RUN_TIME)
def add_partials_kernel(
    partial_key_ptr, partial_value_ptr, partial_gate_ptr, gate_ptr, prompt_index_ptr,
    grad_prompt_key_ptr, grad_prompt_value_ptr, grad_gate_ptr,
    heads_q, heads_kv, sequences, prompt_length, prompt_rows, gate_rows, parts, scale,
    HEAD_DIM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """The second stage: one program owns BLOCK_E elements of dpk and dpv of one table row and key head.

    The first of them also sums dg over the heads of its group; a gate shared by all rows is summed by row 0.
    """
    size = prompt_length * HEAD_DIM
    tile, head_kv, row = unravel(tl.program_id(0), tl.cdiv(size, BLOCK_E), heads_kv)
    group = heads_q // heads_kv
    per_sequence = group * parts
    elements = tile * BLOCK_E + tl.arange(0, BLOCK_E)
    first, last = row * 0, sequences * per_sequence
    if prompt_index_ptr is None:
        if prompt_rows > 1:  # one row per sequence: its own partials alone
            first = row * per_sequence
            last = first + per_sequence
    offset = (row.to(tl.int64) * heads_kv + head_kv) * size
    if grad_prompt_key_ptr is not None:
        total = _sum_partials(
            partial_key_ptr, prompt_index_ptr, first, last, row, head_kv, elements, size, heads_q, group, parts,
            BLOCK_E, BLOCK_S,
        ) * scale  # fmt: skip
        total = total.to(grad_prompt_key_ptr.dtype.element_ty)
        tl.store(grad_prompt_key_ptr + offset + elements, total, mask=elements < size)
    if grad_prompt_value_ptr is not None:
        total = _sum_partials(
            partial_value_ptr, prompt_index_ptr, first, last, row, head_kv, elements, size, heads_q, group,
            parts,
            BLOCK_E, BLOCK_S,
        )  # fmt: skip
        total = total.to(grad_prompt_value_ptr.dtype.element_ty)
        tl.store(grad_prompt_value_ptr + offset + elements, total, mask=elements < size)
    if grad_gate_ptr is not None:
        if (tile == 0) & (row < gate_rows):
            for member in range(0, group):
                _add_gate(
                    partial_gate_ptr, gate_ptr, prompt_index_ptr, grad_gate_ptr, row,
                    head_kv * group + member, heads_q,
                    sequences, prompt_rows, gate_rows, parts, BLOCK_S, TANH,
                )  # fmt: skip


@triton.jit
def _add_gate(
    partial_gate_ptr, gate_ptr, prompt_index_ptr, grad_gate_ptr, row, head, heads_q, sequences, prompt_rows,
    gate_rows,
    parts, BLOCK_S: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """dg = act'(gate) sum r over the sequences that use this gate."""
    total = tl.zeros([BLOCK_S], tl.float32)
    for start in range(0, sequences * parts, BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        sequence = slots // parts
        found = slots < sequences * parts
        rows = sequence
        if prompt_index_ptr is not None:
            rows = tl.load(prompt_index_ptr + sequence, mask=found, other=-1)
            found = found & (rows >= 0) & (rows < prompt_rows)
        found = found & (tl.where(gate_rows == 1, row, rows) == row)
        index = (sequence.to(tl.int64) * heads_q + head) * parts + slots % parts
        total += tl.load(partial_gate_ptr + index, mask=found, other=0.0)
    gate = tl.load(gate_ptr + row * heads_q + head)
    slope = 1.0
    if TANH:
        act = activate(gate, TANH)
        slope = 1.0 - act * act
    sum_r = tl.sum(total, 0)
    grad = tl.where(sum_r == 0, 0.0, slope * sum_r)  # the gate of a row that nobody uses may be NaN
    tl.store(grad_gate_ptr + row * heads_q + head, grad)
