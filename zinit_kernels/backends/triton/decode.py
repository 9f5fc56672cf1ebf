"""Attention of new queries against a cache: append, split over the keys, combine.

The rows of a tile are the (token, query head) pairs of one key head, so that a group of queries reads its keys once.
Exactly one place adds the prompt branch: the kernel that writes `out`, which is the attention kernel where the keys are
not split and the combine kernel where they are. Lengths, pages and prompt rows are read on the device; a number that
would lead outside a tensor is cut, so that a bad one cannot read or write past memory.
"""

import triton
import triton.language as tl

from .primitives import (
    LN2,
    activate,
    add_prompt_branch,
    in_window,
    key_range,
    online_softmax,
    prompt_row,
    row_ptr,
    unravel,
)

RUN_TIME = [
    "heads_q", "heads_kv", "seqlen_q", "seqlen_new", "capacity", "num_pages", "table_stride", "rotary_rows",
    "rotary_stride", "window_left", "window_right", "prompt_length", "prompt_rows", "gate_stride", "num_splits",
]  # fmt: skip


@triton.jit
def _load_rotated(
    row_ptrs, valid, positions, cos_ptr, sin_ptr, rotary_rows, rotary_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK_D], rotated by (cos, sin)[position] in its first 2 * HALF dimensions, in the tensor's dtype."""
    dims = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    tile = tl.load(row_ptrs[:, None] + dims[None, :], mask=mask, other=0.0)
    if cos_ptr is None:
        return tile
    else:
        if INTERLEAVED:
            angle, is_first = dims // 2, dims % 2 == 0
            partner = tl.where(is_first, dims + 1, dims - 1)
        else:
            is_first = dims < HALF
            partner = tl.where(is_first, dims + HALF, dims - HALF)
            angle = tl.where(is_first, dims, partner)
        turned = mask & (dims < 2 * HALF)[None, :]
        other = tl.load(row_ptrs[:, None] + partner[None, :], mask=turned, other=0.0).to(tl.float32)
        table = tl.minimum(positions, rotary_rows - 1)[:, None] * rotary_stride + angle[None, :]
        cos = tl.load(cos_ptr + table, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + table, mask=turned, other=0.0).to(tl.float32)
        rotated = tile.to(tl.float32) * cos + tl.where(is_first[None, :], -other, other) * sin
        return tl.where(turned, rotated.to(tile.dtype), tile)


@triton.jit
def _slots(
    block_table_ptr, strides, sequence, head, positions, valid, num_pages, table_stride, PAGE_SIZE: tl.constexpr
):  # fmt: skip
    """(int64 offsets in a cache, which of them exist) of some positions of a sequence."""
    offset = head.to(tl.int64) * strides[1]
    if block_table_ptr is None:
        return offset + sequence.to(tl.int64) * strides[0] + positions.to(tl.int64) * strides[2], valid
    else:
        entry = block_table_ptr + sequence.to(tl.int64) * table_stride + positions // PAGE_SIZE
        page = tl.load(entry, mask=valid, other=-1)
        exists = (page >= 0) & (page < num_pages)
        slot = (positions % PAGE_SIZE).to(tl.int64)
        return offset + page.to(tl.int64) * strides[0] + slot * strides[2], exists


@triton.jit
def _append(
    rows, positions, valid, sequence, head, new_key_ptr, new_value_ptr, key_cache_ptr, value_cache_ptr, block_table_ptr,
    cos_ptr, sin_ptr, new_key_strides, new_value_strides, key_cache_strides, value_cache_strides, num_pages,
    table_stride, rotary_rows, rotary_stride, is_writer,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The (rotated key, value) of some new rows of a head; the writer leaves them in their slots of the caches."""
    dims = tl.arange(0, BLOCK_D)
    key = _load_rotated(
        row_ptr(new_key_ptr, new_key_strides, sequence, head, rows), valid, positions, cos_ptr, sin_ptr, rotary_rows,
        rotary_stride, HEAD_DIM, BLOCK_D, HALF, INTERLEAVED,
    )  # fmt: skip
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    value_rows = row_ptr(new_value_ptr, new_value_strides, sequence, head, rows)
    value = tl.load(value_rows[:, None] + dims[None, :], mask=mask, other=0.0)
    if is_writer:
        slots, exists = _slots(
            block_table_ptr, key_cache_strides, sequence, head, positions, valid, num_pages, table_stride, PAGE_SIZE,
        )  # fmt: skip
        mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
        tl.store(key_cache_ptr + slots[:, None] + dims[None, :], key, mask=mask)
        slots, exists = _slots(
            block_table_ptr, value_cache_strides, sequence, head, positions, valid, num_pages, table_stride,
            PAGE_SIZE,
        )  # fmt: skip
        tl.store(value_cache_ptr + slots[:, None] + dims[None, :], value, mask=mask)
    return key, value


@triton.jit(do_not_specialize=RUN_TIME)
def append_kernel(
    new_key_ptr, new_value_ptr, key_cache_ptr, value_cache_ptr, cache_seqlens_ptr, block_table_ptr, cos_ptr, sin_ptr,
    new_key_strides, new_value_strides, key_cache_strides, value_cache_strides,
    heads_kv, seqlen_new, capacity, num_pages, table_stride, rotary_rows, rotary_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """cache[seqlen + t] = rotate(new[t]); one program owns BLOCK_T new tokens of one head."""
    tile, head, sequence = unravel(tl.program_id(0), tl.cdiv(seqlen_new, BLOCK_T), heads_kv)
    rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    positions = tl.maximum(tl.load(cache_seqlens_ptr + sequence), 0) + rows
    _append(
        rows, positions, (rows < seqlen_new) & (positions < capacity), sequence, head, new_key_ptr, new_value_ptr,
        key_cache_ptr, value_cache_ptr, block_table_ptr, cos_ptr, sin_ptr, new_key_strides, new_value_strides,
        key_cache_strides, value_cache_strides, num_pages, table_stride, rotary_rows, rotary_stride, True,
        HEAD_DIM, BLOCK_D, PAGE_SIZE, HALF, INTERLEAVED,
    )  # fmt: skip


@triton.jit
def _attend_cache(
    acc, row_max, row_sum, query, key_cache_ptr, value_cache_ptr, block_table_ptr, key_cache_strides,
    value_cache_strides, sequence, head_kv, first, last, cached, positions, num_pages, table_stride,
    window_left, window_right, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One stretch of keys [first, last); slots behind the last key may hold NaN and are never read."""
    dims = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        present = columns < cached
        slots, exists = _slots(
            block_table_ptr, key_cache_strides, sequence, head_kv, columns, present, num_pages, table_stride,
            PAGE_SIZE,
        )  # fmt: skip
        value_slots, _ = _slots(
            block_table_ptr, value_cache_strides, sequence, head_kv, columns, present, num_pages, table_stride,
            PAGE_SIZE,
        )  # fmt: skip
        key_ptrs = key_cache_ptr + slots[:, None] + dims[None, :]
        value_ptrs = value_cache_ptr + value_slots[:, None] + dims[None, :]
        if MASKED or block_table_ptr is not None:
            mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
            key = tl.load(key_ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
            value = tl.load(value_ptrs, mask=mask, other=0.0)
        elif HEAD_DIM < BLOCK_D:
            key = tl.load(key_ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0)
            value = tl.load(value_ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        else:
            key = tl.load(key_ptrs)
            value = tl.load(value_ptrs)
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, query, key, value, positions, columns, present, window_left, window_right,
            scale_log2, MASKED, HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit
def _attend_tile(
    acc, row_max, row_sum, query, key, value, positions, columns, present, window_left, window_right, scale_log2,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2  # [BLOCK_M, len(columns)]
    if MASKED:
        seen = in_window(positions[:, None], columns[None, :], window_left, window_right, HAS_LEFT, HAS_RIGHT)
        scores = tl.where(seen & present[None, :], scores, float("-inf"))
    weights, row_max, row_sum, rescale = online_softmax(scores, row_max, row_sum)
    acc = tl.dot(weights.to(value.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit
def _finish(
    acc, lse_log2, query, heads, tokens, valid, prompt_key_ptr, prompt_value_ptr, gate_ptr, prompt_index_ptr,
    out_ptr, lse_ptr,
    prompt_key_strides, prompt_value_strides, out_strides, sequence, head_kv, heads_q, seqlen_q, prompt_length,
    prompt_rows, gate_stride, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, TANH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the gated prompt branch to the token branch and writes out and lse: the only place that does."""
    if prompt_key_ptr is not None:
        row = prompt_row(prompt_index_ptr, sequence, prompt_rows)
        if row >= 0:
            gate = activate(tl.load(gate_ptr + row * gate_stride + heads), TANH)  # [BLOCK_M]
            acc = add_prompt_branch(
                acc, query,
                row_ptr(prompt_key_ptr, prompt_key_strides, row, head_kv, row * 0),
                row_ptr(prompt_value_ptr, prompt_value_strides, row, head_kv, row * 0),
                prompt_key_strides[2], prompt_value_strides[2], prompt_length, gate[:, None], scale_log2,
                HEAD_DIM, BLOCK_D, BLOCK_P, PRECISION,
            )  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    out_rows = row_ptr(out_ptr, out_strides, sequence, heads, tokens)
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out_rows[:, None] + dims[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(
        lse_ptr + (sequence.to(tl.int64) * heads_q + heads) * seqlen_q + tokens, lse_log2 * LN2, mask=valid
    )


@triton.jit
def _tile_rows(tile, head_kv, group, seqlen_q, BLOCK_M: tl.constexpr):
    """(token, query head, exists) of the rows of a tile; rows that do not exist name the last one that does."""
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < seqlen_q * group
    rows = tl.minimum(rows, seqlen_q * group - 1)
    return rows // group, head_kv * group + rows % group, valid


@triton.jit(do_not_specialize=RUN_TIME)
def decode_kernel(
    query_ptr, key_cache_ptr, value_cache_ptr, new_key_ptr, new_value_ptr, prompt_key_ptr, prompt_value_ptr, gate_ptr,
    prompt_index_ptr, cache_seqlens_ptr, block_table_ptr, cos_ptr, sin_ptr, out_ptr, lse_ptr, partial_out_ptr,
    partial_lse_ptr,
    query_strides, key_cache_strides, value_cache_strides, new_key_strides, new_value_strides, prompt_key_strides,
    prompt_value_strides, out_strides,
    heads_q, heads_kv, seqlen_q, seqlen_new, capacity, num_pages, table_stride, rotary_rows, rotary_stride,
    window_left, window_right, prompt_length, prompt_rows, gate_stride, num_splits, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, PAGE_SIZE: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, TANH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of the keys for one tile of rows: out and lse, or with partial_out_ptr a partial result in float32.

    partial_out [splits, B, Hq, T, D] is divided by its own denominator, partial_lse [splits, B, Hq, T] in base 2.

    At most BLOCK_T new keys come in new_key_ptr: every tile's last split takes them from there, so that nobody waits
    for the one program of the head that writes them into the cache. More are in the cache already.
    """
    tiles = tl.cdiv(seqlen_q * (heads_q // heads_kv), BLOCK_M)
    piece, head_kv, sequence = unravel(tl.program_id(0), num_splits * tiles, heads_kv)
    split, tile = piece % num_splits, piece // num_splits
    group = heads_q // heads_kv
    tokens, heads, valid = _tile_rows(tile, head_kv, group, seqlen_q, BLOCK_M)
    cached = tl.maximum(tl.load(cache_seqlens_ptr + sequence), 0)
    num_k = tl.minimum(cached + seqlen_new, capacity)
    rotary_positions = cached + (tokens if HAS_LEFT or HAS_RIGHT else tokens * 0)
    query = _load_rotated(
        row_ptr(query_ptr, query_strides, sequence, heads, tokens), valid, rotary_positions, cos_ptr, sin_ptr,
        rotary_rows, rotary_stride, HEAD_DIM, BLOCK_D, HALF, INTERLEAVED,
    )  # fmt: skip

    position = num_k - seqlen_q
    positions = position + tokens
    if new_key_ptr is None:
        cached = num_k
    else:
        cached = tl.minimum(cached, capacity)
    first, full_first, full_last, last = key_range(
        position + tile * BLOCK_M // group, cached, window_left, window_right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    length = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), BLOCK_N), num_splits) * BLOCK_N
    first += split * length
    last = tl.minimum(first + length, last)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if HAS_LEFT:
        acc, row_max, row_sum = _attend_cache(
            acc, row_max, row_sum, query, key_cache_ptr, value_cache_ptr, block_table_ptr, key_cache_strides,
            value_cache_strides, sequence, head_kv, first, tl.minimum(last, full_first), cached, positions,
            num_pages, table_stride, window_left, window_right, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, True, HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
    acc, row_max, row_sum = _attend_cache(
        acc, row_max, row_sum, query, key_cache_ptr, value_cache_ptr, block_table_ptr, key_cache_strides,
        value_cache_strides, sequence, head_kv, tl.maximum(first, full_first), tl.minimum(last, full_last),
        cached, positions, num_pages, table_stride, window_left, window_right, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, False, HAS_LEFT, HAS_RIGHT, PRECISION,
    )  # fmt: skip
    acc, row_max, row_sum = _attend_cache(
        acc, row_max, row_sum, query, key_cache_ptr, value_cache_ptr, block_table_ptr, key_cache_strides,
        value_cache_strides, sequence, head_kv, tl.maximum(first, full_last), last, cached, positions, num_pages,
        table_stride, window_left, window_right, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, True, HAS_LEFT, HAS_RIGHT, PRECISION,
    )  # fmt: skip
    if new_key_ptr is not None:
        if split == num_splits - 1:
            rows = tl.arange(0, BLOCK_T)
            present = (rows < seqlen_new) & (cached + rows < num_k)
            key, value = _append(
                rows, cached + rows, present, sequence, head_kv, new_key_ptr, new_value_ptr, key_cache_ptr,
                value_cache_ptr, block_table_ptr, cos_ptr, sin_ptr, new_key_strides, new_value_strides,
                key_cache_strides, value_cache_strides, num_pages, table_stride, rotary_rows, rotary_stride,
                tile == 0, HEAD_DIM, BLOCK_D, PAGE_SIZE, HALF, INTERLEAVED,
            )  # fmt: skip
            acc, row_max, row_sum = _attend_tile(
                acc, row_max, row_sum, query, key, value, positions, cached + rows, present, window_left,
                window_right, scale_log2, True, HAS_LEFT, HAS_RIGHT, PRECISION,
            )  # fmt: skip

    safe_sum = tl.where(row_sum == 0, 1.0, row_sum)
    acc = acc / safe_sum[:, None]
    lse = row_max + tl.math.log2(safe_sum)
    if partial_out_ptr is None:
        _finish(
            acc, lse, query, heads, tokens, valid, prompt_key_ptr, prompt_value_ptr, gate_ptr,
            prompt_index_ptr, out_ptr,
            lse_ptr, prompt_key_strides, prompt_value_strides, out_strides, sequence, head_kv, heads_q,
            seqlen_q,
            prompt_length, prompt_rows, gate_stride, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_P, TANH, PRECISION,
        )  # fmt: skip
    else:
        sequences = tl.num_programs(0) // (num_splits * tiles * heads_kv)
        slots = ((split.to(tl.int64) * sequences + sequence) * heads_q + heads) * seqlen_q + tokens
        dims = tl.arange(0, BLOCK_D)
        mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
        tl.store(partial_out_ptr + slots[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
        tl.store(partial_lse_ptr + slots, lse, mask=valid)


@triton.jit(do_not_specialize=RUN_TIME)
def combine_kernel(
    partial_out_ptr, partial_lse_ptr, query_ptr, prompt_key_ptr, prompt_value_ptr, gate_ptr, prompt_index_ptr,
    cache_seqlens_ptr, cos_ptr, sin_ptr, out_ptr, lse_ptr,
    query_strides, prompt_key_strides, prompt_value_strides, out_strides,
    heads_q, heads_kv, seqlen_q, rotary_rows, rotary_stride, prompt_length, prompt_rows, gate_stride,
    num_splits, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, ADVANCE: tl.constexpr, TANH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = sum_s 2^(lse_s - lse) out_s, with lse = log2 sum_s 2^lse_s, and then the prompt branch, once."""
    group = heads_q // heads_kv
    tiles = tl.cdiv(seqlen_q * group, BLOCK_M)
    tile, head_kv, sequence = unravel(tl.program_id(0), tiles, heads_kv)
    sequences = tl.num_programs(0) // (tiles * heads_kv)
    tokens, heads, valid = _tile_rows(tile, head_kv, group, seqlen_q, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for split in range(0, num_splits):
        slots = ((tl.cast(split, tl.int64) * sequences + sequence) * heads_q + heads) * seqlen_q + tokens
        lse = tl.load(partial_lse_ptr + slots, mask=valid, other=float("-inf"))
        weights, row_max, row_sum, rescale = online_softmax(lse[:, None], row_max, row_sum)
        partial = tl.load(partial_out_ptr + slots[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        acc = acc * rescale[:, None] + weights * partial
    safe_sum = tl.where(row_sum == 0, 1.0, row_sum)
    acc = acc / safe_sum[:, None]
    rotary_positions = tl.maximum(tl.load(cache_seqlens_ptr + sequence), 0) + (
        tokens if ADVANCE else tokens * 0
    )
    query = _load_rotated(
        row_ptr(query_ptr, query_strides, sequence, heads, tokens), valid, rotary_positions, cos_ptr, sin_ptr,
        rotary_rows,
        rotary_stride, HEAD_DIM, BLOCK_D, HALF, INTERLEAVED,
    )  # fmt: skip
    _finish(
        acc, row_max + tl.math.log2(safe_sum), query, heads, tokens, valid, prompt_key_ptr, prompt_value_ptr,
        gate_ptr,
        prompt_index_ptr, out_ptr, lse_ptr, prompt_key_strides, prompt_value_strides, out_strides, sequence,
        head_kv, heads_q,
        seqlen_q, prompt_length, prompt_rows, gate_stride, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_P, TANH,
        PRECISION,
    )  # fmt: skip
