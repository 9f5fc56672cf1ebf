"""The token part of backward: dK/dV and dQ in kernels of their own, each sum in one program, so bits never change.

A  = exp(S - lse)      dS = A * (dO v^T - delta)      delta = rowsum(dO * out) - s r - dlse
dv = A^T dO            dk = scale dS^T q              dq = scale (dS k + dSp pk)
"""

import triton
import triton.language as tl

from .primitives import (
    RUN_TIME,
    activate,
    in_window,
    key_range,
    load_bias,
    load_kept,
    load_lse,
    load_tile,
    locate_sequence,
    prompt_row,
    prompt_weights,
    row_ptr,
    store_tile,
    unravel,
)


@triton.jit
def _accumulate_key_value(
    grad_key, grad_value, key, value, bias, query_ptr, grad_out_ptr, lse_ptr, delta_ptr, query_strides,
    grad_out_strides,
    first, last, num_q, total_q, group, positions, window_left, window_right, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    NEEDS_KEY: tl.constexpr, NEEDS_VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One stretch of queries [first, last) of every head of the group; everything is transposed, [BLOCK_N, BLOCK_M].

    Heads and queries run in one loop: nested, the three stretches kept all their addresses alive at once and spilled.
    """
    tiles = tl.cdiv(tl.maximum(last - first, 0), BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    for step in range(0, group * tiles):
        member = tl.cast(step // tiles, tl.int64)
        start = first + step % tiles * BLOCK_M
        left = num_q - start
        offset = tl.cast(start, tl.int64)
        query_tile_ptr = query_ptr + member * query_strides[1] + offset * query_strides[2]
        grad_out_tile_ptr = grad_out_ptr + member * grad_out_strides[1] + offset * grad_out_strides[2]
        row_offset = member * total_q + start
        query = load_tile(
            query_tile_ptr, query_strides[2], rows, left, HEAD_DIM, BLOCK_D, MASKED
        )  # [BLOCK_M, BLOCK_D]
        grad_out = load_tile(grad_out_tile_ptr, grad_out_strides[2], rows, left, HEAD_DIM, BLOCK_D, MASKED)
        lse = load_lse(lse_ptr + row_offset, rows, left)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale_log2
        if HAS_BIAS:
            scores += bias[:, None]
            weights = tl.math.exp2(tl.minimum(scores - lse[None, :], 0.0))
        else:
            weights = tl.math.exp2(scores - lse[None, :])
        if MASKED:
            seen = in_window(
                positions[:, None], (start + rows)[None, :], window_right, window_left, HAS_RIGHT, HAS_LEFT
            )
            weights = tl.where(seen, weights, 0.0)
        if NEEDS_VALUE:
            grad_value = tl.dot(weights.to(query.dtype), grad_out, grad_value, input_precision=PRECISION)
        if NEEDS_KEY:
            delta = tl.load(delta_ptr + row_offset + rows, mask=rows < left, other=0.0)
            grad_weights = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
            grad_scores = weights * (grad_weights - delta[None, :])
            grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit(do_not_specialize=RUN_TIME)
def grad_key_value_kernel(
    query_ptr, key_ptr, value_ptr, grad_out_ptr, lse_ptr, delta_ptr, key_bias_ptr, cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    grad_key_ptr, grad_value_ptr,
    query_strides, key_strides, value_strides, grad_out_strides, grad_key_strides, grad_value_strides,
    heads_q, heads_kv, seqlen_q, seqlen_k, total_q, total_k, window_left, window_right, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk = scale dS^T q and dv = A^T dO, summed over the queries and the query heads of one key head.

    One program owns BLOCK_N keys. Keys behind the last one are zero rows of their own: nothing reads them.
    """
    NEEDS_KEY: tl.constexpr = grad_key_ptr is not None
    NEEDS_VALUE: tl.constexpr = grad_value_ptr is not None
    HAS_BIAS: tl.constexpr = key_bias_ptr is not None
    tile, head_kv, sequence = unravel(tl.program_id(0), tl.cdiv(seqlen_k, BLOCK_N), heads_kv)
    batch, first_q, num_q = locate_sequence(cu_seqlens_q_ptr, sequence, seqlen_q, total_q)
    _, first_k, num_k = locate_sequence(cu_seqlens_k_ptr, sequence, seqlen_k, total_k)
    start = tile * BLOCK_N
    if start >= num_k:
        return

    columns = tl.arange(0, BLOCK_N)
    left = num_k - start
    key_ptr = row_ptr(key_ptr, key_strides, batch, head_kv, first_k + start)
    value_ptr = row_ptr(value_ptr, value_strides, batch, head_kv, first_k + start)
    if HAS_BIAS:
        bias = load_bias(key_bias_ptr + batch.to(tl.int64) * seqlen_k, start + columns, num_k)
        keep = bias != float("-inf")
        key = load_kept(key_ptr, key_strides[2], columns, keep, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        value = load_kept(value_ptr, value_strides[2], columns, keep, HEAD_DIM, BLOCK_D)
    else:
        bias = tl.zeros([BLOCK_N], tl.float32)
        key = load_tile(key_ptr, key_strides[2], columns, left, HEAD_DIM, BLOCK_D, True)
        value = load_tile(value_ptr, value_strides[2], columns, left, HEAD_DIM, BLOCK_D, True)

    # seen from the keys the windows change sides
    position = start - (num_k - num_q)
    first, full_first, full_last, last = key_range(
        position, num_q, window_right, window_left, BLOCK_N, BLOCK_M, HAS_RIGHT, HAS_LEFT
    )
    positions = position + columns
    grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    group = heads_q // heads_kv
    query_ptr = row_ptr(query_ptr, query_strides, batch, head_kv * group, first_q)
    grad_out_ptr = row_ptr(grad_out_ptr, grad_out_strides, batch, head_kv * group, first_q)
    row_offset = (batch.to(tl.int64) * heads_q + head_kv * group) * total_q + first_q
    lse_ptr += row_offset
    if NEEDS_KEY:
        delta_ptr += row_offset
    if HAS_RIGHT:
        grad_key, grad_value = _accumulate_key_value(
            grad_key, grad_value, key, value, bias, query_ptr, grad_out_ptr, lse_ptr, delta_ptr,
            query_strides, grad_out_strides,
            first, full_first, num_q, total_q, group, positions, window_left, window_right, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_M,
            True, HAS_LEFT, HAS_RIGHT, HAS_BIAS, NEEDS_KEY, NEEDS_VALUE, PRECISION,
        )  # fmt: skip
    grad_key, grad_value = _accumulate_key_value(
        grad_key, grad_value, key, value, bias, query_ptr, grad_out_ptr, lse_ptr, delta_ptr, query_strides,
        grad_out_strides,
        full_first, full_last, num_q, total_q, group, positions, window_left, window_right, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_M,
        False, HAS_LEFT, HAS_RIGHT, HAS_BIAS, NEEDS_KEY, NEEDS_VALUE, PRECISION,
    )  # fmt: skip
    grad_key, grad_value = _accumulate_key_value(
        grad_key, grad_value, key, value, bias, query_ptr, grad_out_ptr, lse_ptr, delta_ptr, query_strides,
        grad_out_strides,
        full_last, last, num_q, total_q, group, positions, window_left, window_right, scale_log2, HEAD_DIM,
        BLOCK_D, BLOCK_M,
        True, HAS_LEFT, HAS_RIGHT, HAS_BIAS, NEEDS_KEY, NEEDS_VALUE, PRECISION,
    )  # fmt: skip

    if NEEDS_KEY:
        grad_key_ptr = row_ptr(grad_key_ptr, grad_key_strides, batch, head_kv, first_k + start)
        store_tile(grad_key_ptr, grad_key_strides[2], columns, left, grad_key * scale, HEAD_DIM, BLOCK_D)
    if NEEDS_VALUE:
        grad_value_ptr = row_ptr(grad_value_ptr, grad_value_strides, batch, head_kv, first_k + start)
        store_tile(grad_value_ptr, grad_value_strides[2], columns, left, grad_value, HEAD_DIM, BLOCK_D)


@triton.jit
def _accumulate_query(
    grad_query, query, grad_out, lse, delta, key_ptr, value_ptr, key_bias_ptr, key_stride, value_stride,
    first, last, num_k, positions, window_left, window_right, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One stretch of keys [first, last) for a tile of queries, [BLOCK_M, BLOCK_N]."""
    for start in range(first, last, BLOCK_N):
        rows = tl.arange(0, BLOCK_N)
        columns = start + rows
        key_tile_ptr = key_ptr + tl.cast(start, tl.int64) * key_stride
        value_tile_ptr = value_ptr + tl.cast(start, tl.int64) * value_stride
        if key_bias_ptr is not None:
            bias = load_bias(key_bias_ptr, columns, num_k)
            keep = bias != float("-inf")
            key = load_kept(key_tile_ptr, key_stride, rows, keep, HEAD_DIM, BLOCK_D)
            value = load_kept(value_tile_ptr, value_stride, rows, keep, HEAD_DIM, BLOCK_D)
        else:
            key = load_tile(key_tile_ptr, key_stride, rows, num_k - start, HEAD_DIM, BLOCK_D, MASKED)
            value = load_tile(value_tile_ptr, value_stride, rows, num_k - start, HEAD_DIM, BLOCK_D, MASKED)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
        if key_bias_ptr is not None:
            weights = tl.math.exp2(tl.minimum(scores + bias[None, :] - lse[:, None], 0.0))
        else:
            weights = tl.math.exp2(scores - lse[:, None])
        if MASKED:
            seen = in_window(
                positions[:, None], columns[None, :], window_left, window_right, HAS_LEFT, HAS_RIGHT
            )
            weights = tl.where(seen & (columns < num_k)[None, :], weights, 0.0)
        grad_weights = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta[:, None])
        grad_query = tl.dot(grad_scores.to(key.dtype), key, grad_query, input_precision=PRECISION)
    return grad_query


@triton.jit(do_not_specialize=RUN_TIME)
def grad_query_kernel(
    query_ptr, key_ptr, value_ptr, prompt_key_ptr, prompt_value_ptr, gate_ptr, prompt_index_ptr, grad_out_ptr,
    lse_ptr,
    delta_ptr, key_bias_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, grad_query_ptr,
    query_strides, key_strides, value_strides, prompt_key_strides, prompt_value_strides, grad_out_strides,
    grad_query_strides,
    heads_q, heads_kv, seqlen_q, seqlen_k, total_q, total_k, window_left, window_right, prompt_length,
    prompt_rows,
    gate_stride, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, TANH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq = scale (dS k + dSp pk), dSp = s Ap (dAp - rowsum(Ap dAp)); one program owns BLOCK_M queries of one head.

    The prompt term is recomputed here (three products with P columns) rather than read: no rounding in between, and
    no pass over memory.
    """
    tile, head, sequence = unravel(tl.program_id(0), tl.cdiv(seqlen_q, BLOCK_M), heads_q)
    head_kv = head // (heads_q // heads_kv)
    batch, first_q, num_q = locate_sequence(cu_seqlens_q_ptr, sequence, seqlen_q, total_q)
    _, first_k, num_k = locate_sequence(cu_seqlens_k_ptr, sequence, seqlen_k, total_k)
    if HAS_RIGHT:
        tile = tl.cdiv(num_q, BLOCK_M) - 1 - tile
    start = tile * BLOCK_M
    if (start < 0) | (start >= num_q):
        return

    rows = tl.arange(0, BLOCK_M)
    left = num_q - start
    query_ptr = row_ptr(query_ptr, query_strides, batch, head, first_q + start)
    grad_out_ptr = row_ptr(grad_out_ptr, grad_out_strides, batch, head, first_q + start)
    key_ptr = row_ptr(key_ptr, key_strides, batch, head_kv, first_k)
    value_ptr = row_ptr(value_ptr, value_strides, batch, head_kv, first_k)
    if key_bias_ptr is not None:
        key_bias_ptr += batch.to(tl.int64) * seqlen_k
    row_offset = (batch.to(tl.int64) * heads_q + head) * total_q + first_q + start
    query = load_tile(query_ptr, query_strides[2], rows, left, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    grad_out = load_tile(grad_out_ptr, grad_out_strides[2], rows, left, HEAD_DIM, BLOCK_D, True)
    lse = load_lse(lse_ptr + row_offset, rows, left)  # [BLOCK_M]
    delta = tl.load(delta_ptr + row_offset + rows, mask=rows < left, other=0.0)

    position = start + num_k - num_q
    first, full_first, full_last, last = key_range(
        position, num_k, window_left, window_right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    positions = position + rows
    grad_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_LEFT:
        grad_query = _accumulate_query(
            grad_query, query, grad_out, lse, delta, key_ptr, value_ptr, key_bias_ptr, key_strides[2],
            value_strides[2],
            first, full_first, num_k, positions, window_left, window_right, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_N, True, HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
    grad_query = _accumulate_query(
        grad_query, query, grad_out, lse, delta, key_ptr, value_ptr, key_bias_ptr, key_strides[2],
        value_strides[2],
        full_first, full_last, num_k, positions, window_left, window_right, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_N, False, HAS_LEFT, HAS_RIGHT, PRECISION,
    )  # fmt: skip
    grad_query = _accumulate_query(
        grad_query, query, grad_out, lse, delta, key_ptr, value_ptr, key_bias_ptr, key_strides[2],
        value_strides[2],
        full_last, last, num_k, positions, window_left, window_right, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_N, True, HAS_LEFT, HAS_RIGHT, PRECISION,
    )  # fmt: skip

    if prompt_key_ptr is not None:
        row = prompt_row(prompt_index_ptr, sequence, prompt_rows)
        if row >= 0:
            prompts = tl.arange(0, BLOCK_P)
            gate = activate(tl.load(gate_ptr + row * gate_stride + head), TANH)
            prompt_key_ptr = row_ptr(prompt_key_ptr, prompt_key_strides, row, head_kv, row * 0)
            prompt_value_ptr = row_ptr(prompt_value_ptr, prompt_value_strides, row, head_kv, row * 0)
            prompt_key = load_tile(
                prompt_key_ptr, prompt_key_strides[2], prompts, prompt_length, HEAD_DIM, BLOCK_D, True
            ).to(query.dtype)
            prompt_value = load_tile(
                prompt_value_ptr, prompt_value_strides[2], prompts, prompt_length, HEAD_DIM, BLOCK_D, True
            ).to(query.dtype)
            weights = prompt_weights(query, prompt_key, prompt_length, scale_log2, BLOCK_P, PRECISION)
            grad_weights = tl.dot(
                grad_out, tl.trans(prompt_value), input_precision=PRECISION
            )  # [BLOCK_M, BLOCK_P]
            r = tl.sum(weights * grad_weights, 1)
            grad_scores = gate * weights * (grad_weights - r[:, None])
            grad_query = tl.dot(
                grad_scores.to(query.dtype), prompt_key, grad_query, input_precision=PRECISION
            )

    grad_query_ptr = row_ptr(grad_query_ptr, grad_query_strides, batch, head, first_q + start)
    store_tile(grad_query_ptr, grad_query_strides[2], rows, left, grad_query * scale, HEAD_DIM, BLOCK_D)
