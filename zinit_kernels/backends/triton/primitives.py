"""What the kernels share: addresses, tile loads, which keys a query sees, the online softmax, the prompt branch.

Alphabet: BLOCK_M queries, BLOCK_N keys, BLOCK_P prompts, BLOCK_D the head dimension rounded up to a power of
two. Scores are kept in base 2 (`scale_log2 = scale * log2(e)`): one exp2 where exp costs a multiply more.
Tensors are read through (batch, head, token) strides in elements. Addresses of tiles are int64; offsets inside
a tile are int32.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST_BIAS = tl.constexpr(-3.0e38)  # finfo.min in a mask, times log2(e), would become -inf: masked


# What forward and backward are told whose values make no new kernel.
RUN_TIME = [
    "heads_q", "heads_kv", "seqlen_q", "seqlen_k", "total_q", "total_k", "window_left", "window_right", "prompt_length",
    "prompt_rows", "gate_stride",
]  # fmt: skip


@triton.jit
def unravel(program, size, heads):
    """(index below size, head, sequence) of a program; one grid axis holds all, the others end at 65535."""
    rest = program // size
    return program % size, rest % heads, rest // heads


@triton.jit
def locate_sequence(cu_seqlens_ptr, batch, seqlen, total):
    """(index of the batch dimension, first row, rows) of a sequence; lengths that leave the tensor are cut."""
    if cu_seqlens_ptr is None:
        return batch, batch * 0, batch * 0 + seqlen
    else:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + batch), 0), total)
        last = tl.minimum(tl.load(cu_seqlens_ptr + batch + 1), total)
        return batch * 0, first, tl.maximum(last - first, 0)


@triton.jit
def row_ptr(ptr, strides, batch, head, row):
    """Address of one row of a [batch, head, token, D] tensor."""
    return (
        ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + row.to(tl.int64) * strides[2]
    )


@triton.jit
def load_tile(
    ptr, stride, rows, num_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr
):
    """[len(rows), BLOCK_D]: rows of a tile at `ptr`; zero at rows >= num_rows and at dimensions >= HEAD_DIM."""
    dims = tl.arange(0, BLOCK_D)
    pointers = ptr + rows[:, None] * stride + dims[None, :]
    if CHECK_ROWS:
        return tl.load(pointers, mask=(rows < num_rows)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_kept(ptr, stride, rows, keep, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`load_tile` of the rows that `keep` names; padding may hold NaN, and 0 x NaN is NaN."""
    dims = tl.arange(0, BLOCK_D)
    mask = keep[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(ptr + rows[:, None] * stride + dims[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, stride, rows, num_rows, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes `tile`, rounded to the tensor's dtype, to the rows < num_rows and the dimensions < HEAD_DIM."""
    dims = tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(ptr + rows[:, None] * stride + dims[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_bias(key_bias_ptr, columns, num_keys):
    """Additive bias of some keys in base 2; -inf behind the last key. key_bias_ptr: that of the sequence."""
    bias = tl.load(key_bias_ptr + columns, mask=columns < num_keys, other=float("-inf"))
    return tl.where(bias == float("-inf"), bias, tl.maximum(bias * LOG2E, LOWEST_BIAS))


@triton.jit
def load_lse(lse_ptr, rows, num_rows):
    """log-sum-exp of some queries in base 2; +inf, whose weights exp2(score - lse) are 0, where there is no key."""
    lse = tl.load(lse_ptr + rows, mask=rows < num_rows, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def in_window(position, column, window_left, window_right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Which keys (columns) a query sees whose own key stands at `position` (bottom-right aligned)."""
    seen = column == column
    if HAS_LEFT:
        seen = seen & (column >= position - window_left)
    if HAS_RIGHT:
        seen = seen & (column <= position + window_right)
    return seen


@triton.jit
def key_range(
    position, seqlen_k, window_left, window_right,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """(first, full_first, full_last, last) of the keys that BLOCK_M queries from `position` on look at.

    In [full_first, full_last) every query sees every key: no mask arithmetic there. Tiles start at multiples of
    BLOCK_N; first <= full_first <= full_last, and the masked tiles are [first, full_first) and [full_last, last).
    """
    first = position * 0
    full_first = first
    last = first + seqlen_k
    full_last = last
    if HAS_RIGHT:
        last = tl.minimum(last, tl.maximum(position + BLOCK_M + window_right, 0))
        full_last = tl.minimum(last, tl.maximum(position + window_right + 1, 0))
    full_last = full_last // BLOCK_N * BLOCK_N
    if HAS_LEFT:
        first = tl.maximum(position - window_left, 0) // BLOCK_N * BLOCK_N
        all_left = tl.maximum(position + BLOCK_M - 1 - window_left, 0)
        whole = (last + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        full_first = tl.minimum((all_left + BLOCK_N - 1) // BLOCK_N * BLOCK_N, tl.maximum(whole, first))
    full_last = tl.maximum(full_last, full_first)
    return first, full_first, full_last, last


@triton.jit
def online_softmax(scores, row_max, row_sum):
    """(weights, new maximum, new sum, factor for what was accumulated before) of one more block of scores.

    A row that has seen no key keeps maximum -inf; its pivot is 0, because -inf - -inf would be NaN.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.math.exp2(scores - pivot[:, None])
    rescale = tl.math.exp2(row_max - pivot)
    return weights, new_max, row_sum * rescale + tl.sum(weights, 1), rescale


@triton.jit
def prompt_row(prompt_index_ptr, batch, prompt_rows):
    """Prompt table row of a sequence, -1 = none. A number beyond the table counts as none: no stray read."""
    if prompt_index_ptr is None:
        return tl.where(prompt_rows > 1, batch, 0)
    else:
        row = tl.load(prompt_index_ptr + batch)
        return tl.where(row < prompt_rows, row, -1)


@triton.jit
def activate(gate, TANH: tl.constexpr):
    """act(gate) in float32. Near 0, where gates start, Lambert's continued fraction keeps tanh's digits."""
    if TANH:
        square = gate * gate
        near = gate / (1 + square / (3 + square / (5 + square / (7 + square / (9 + square / 11)))))
        decay = tl.math.exp2(tl.abs(gate) * (-2.0 * LOG2E))
        far = (1 - decay) / (1 + decay)
        return tl.where(tl.abs(gate) < 1, near, tl.where(gate < 0, -far, far))
    else:
        return gate


@triton.jit
def prompt_weights(
    query, prompt_key, prompt_length, scale_log2, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr
):
    """softmax(scale q pk^T), [BLOCK_M, BLOCK_P] float32; P is padded to BLOCK_P."""
    scores = tl.dot(query, tl.trans(prompt_key), input_precision=PRECISION) * scale_log2
    scores = tl.where((tl.arange(0, BLOCK_P) < prompt_length)[None, :], scores, float("-inf"))
    weights = tl.math.exp2(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def add_prompt_branch(
    acc, query, prompt_key_ptr, prompt_value_ptr, prompt_key_stride, prompt_value_stride, prompt_length, gate,
    scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + gate * softmax(scale q pk^T) pv; the gate (one, or [BLOCK_M, 1]) scales in float32, before rounding."""
    prompts = tl.arange(0, BLOCK_P)
    prompt_key = load_tile(prompt_key_ptr, prompt_key_stride, prompts, prompt_length, HEAD_DIM, BLOCK_D, True)
    weights = (
        prompt_weights(query, prompt_key.to(query.dtype), prompt_length, scale_log2, BLOCK_P, PRECISION)
        * gate
    )
    prompt_value = load_tile(
        prompt_value_ptr, prompt_value_stride, prompts, prompt_length, HEAD_DIM, BLOCK_D, True
    )
    return tl.dot(weights.to(query.dtype), prompt_value.to(query.dtype), acc, input_precision=PRECISION)
