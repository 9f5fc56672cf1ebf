"""The forward kernel: both softmaxes, one accumulator, `out` and `lse` written once."""

import triton
import triton.language as tl

from .primitives import (
    LN2,
    RUN_TIME,
    activate,
    add_prompt_branch,
    in_window,
    key_range,
    load_bias,
    load_kept,
    load_tile,
    locate_sequence,
    online_softmax,
    prompt_row,
    row_ptr,
    store_tile,
    unravel,
)


@triton.jit
def _attend(
    acc, row_max, row_sum, query, key_ptr, value_ptr, key_bias_ptr, key_stride, value_stride,
    first, last, seqlen_k, position, window_left, window_right, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One stretch of keys [first, last), with mask arithmetic or (in tiles that every query sees whole) without."""
    for start in range(first, last, BLOCK_N):
        rows = tl.arange(0, BLOCK_N)
        columns = start + rows
        key_tile_ptr = key_ptr + tl.cast(start, tl.int64) * key_stride
        value_tile_ptr = value_ptr + tl.cast(start, tl.int64) * value_stride
        if key_bias_ptr is not None:
            bias = load_bias(key_bias_ptr, columns, seqlen_k)
            keep = bias != float("-inf")
            key = load_kept(key_tile_ptr, key_stride, rows, keep, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            value = load_kept(value_tile_ptr, value_stride, rows, keep, HEAD_DIM, BLOCK_D)
        else:
            left = seqlen_k - start
            key = load_tile(key_tile_ptr, key_stride, rows, left, HEAD_DIM, BLOCK_D, MASKED)
            value = load_tile(value_tile_ptr, value_stride, rows, left, HEAD_DIM, BLOCK_D, MASKED)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2  # [BLOCK_M, BLOCK_N]
        if key_bias_ptr is not None:
            scores += bias[None, :]
        if MASKED:
            seen = in_window(
                position[:, None], columns[None, :], window_left, window_right, HAS_LEFT, HAS_RIGHT
            )
            scores = tl.where(seen & (columns < seqlen_k)[None, :], scores, float("-inf"))
        weights, row_max, row_sum, rescale = online_softmax(scores, row_max, row_sum)
        acc = tl.dot(weights.to(value.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=RUN_TIME)
def forward_kernel(
    query_ptr, key_ptr, value_ptr, prompt_key_ptr, prompt_value_ptr, gate_ptr, prompt_index_ptr, key_bias_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, out_ptr, lse_ptr,
    query_strides, key_strides, value_strides, prompt_key_strides, prompt_value_strides, out_strides,
    heads_q, heads_kv, seqlen_q, seqlen_k, total_q, total_k, window_left, window_right, prompt_length,
    prompt_rows,
    gate_stride, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, TANH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T + mask) v + act(gate) softmax(scale q pk^T) pv; lse = log sum exp of the first.

    One program owns BLOCK_M queries of one head. The token loop ends, its accumulator is divided by the token
    denominator, and the gated prompt block is added into the same accumulator.
    """
    tile, head, sequence = unravel(tl.program_id(0), tl.cdiv(seqlen_q, BLOCK_M), heads_q)
    head_kv = head // (heads_q // heads_kv)
    batch, first_q, num_q = locate_sequence(cu_seqlens_q_ptr, sequence, seqlen_q, total_q)
    _, first_k, num_k = locate_sequence(cu_seqlens_k_ptr, sequence, seqlen_k, total_k)
    if HAS_RIGHT:  # the last queries see the most keys: start with them, so that no long tile comes last
        tile = tl.cdiv(num_q, BLOCK_M) - 1 - tile
    start = tile * BLOCK_M
    if (start < 0) | (start >= num_q):
        return

    rows = tl.arange(0, BLOCK_M)
    query_ptr = row_ptr(query_ptr, query_strides, batch, head, first_q + start)
    key_ptr = row_ptr(key_ptr, key_strides, batch, head_kv, first_k)
    value_ptr = row_ptr(value_ptr, value_strides, batch, head_kv, first_k)
    if key_bias_ptr is not None:
        key_bias_ptr += batch.to(tl.int64) * seqlen_k
    query = load_tile(
        query_ptr, query_strides[2], rows, num_q - start, HEAD_DIM, BLOCK_D, True
    )  # [BLOCK_M, BLOCK_D]

    position = start + num_k - num_q
    first, full_first, full_last, last = key_range(
        position, num_k, window_left, window_right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    positions = position + rows
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if HAS_LEFT:
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, query, key_ptr, value_ptr, key_bias_ptr, key_strides[2], value_strides[2],
            first, full_first, num_k, positions, window_left, window_right, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_N, True, HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, query, key_ptr, value_ptr, key_bias_ptr, key_strides[2], value_strides[2],
        full_first, full_last, num_k, positions, window_left, window_right, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_N, False, HAS_LEFT, HAS_RIGHT, PRECISION,
    )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, query, key_ptr, value_ptr, key_bias_ptr, key_strides[2], value_strides[2],
        full_last, last, num_k, positions, window_left, window_right, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_N, True, HAS_LEFT, HAS_RIGHT, PRECISION,
    )  # fmt: skip

    safe_sum = tl.where(row_sum == 0, 1.0, row_sum)
    acc = acc / safe_sum[:, None]
    lse = (row_max + tl.math.log2(safe_sum)) * LN2  # -inf + 0 where a row has no key
    if prompt_key_ptr is not None:
        row = prompt_row(prompt_index_ptr, sequence, prompt_rows)
        if row >= 0:
            gate = activate(tl.load(gate_ptr + row * gate_stride + head), TANH)
            acc = add_prompt_branch(
                acc, query,
                row_ptr(prompt_key_ptr, prompt_key_strides, row, head_kv, row * 0),
                row_ptr(prompt_value_ptr, prompt_value_strides, row, head_kv, row * 0),
                prompt_key_strides[2], prompt_value_strides[2], prompt_length, gate, scale_log2,
                HEAD_DIM, BLOCK_D, BLOCK_P, PRECISION,
            )  # fmt: skip

    out_ptr = row_ptr(out_ptr, out_strides, batch, head, first_q + start)
    store_tile(out_ptr, out_strides[2], rows, num_q - start, acc, HEAD_DIM, BLOCK_D)
    lse_ptr += (batch.to(tl.int64) * heads_q + head) * total_q + first_q + start
    tl.store(lse_ptr + rows, lse, mask=rows < num_q - start)
