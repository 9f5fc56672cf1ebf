"""Attention of new queries against a cache: split over the keys, and combine.

The rows of a tile are the (token, query head) pairs of one key head, so that a group of query heads reads its keys
once. Exactly one place adds the prompt branch: the kernel that writes `out`, which is the decode kernel where the keys
are not split and the combine kernel where they are. Lengths, pages and prompt rows are read on the device.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .cache import CachedHead, Pages, Rotary, load_cached, load_new, load_rotated, store_new
from .primitives import (
    RUN_TIME,
    Cap,
    Prompts,
    Scoring,
    Window,
    always_careful,
    block_of,
    has_nan,
    key_limits,
    key_stretches,
    row_ptr,
    unravel,
)
from .softmax import (
    add_prompt_branch,
    attend,
    attend_visible,
    exponent_scale,
    natural_lse,
    normalise,
    turn,
)


class Result(NamedTuple):
    """Where out and lse of the rows of a tile go."""

    out: Any  # View [B, Hq, T, D]
    lse_ptr: Any  # float32 [B, Hq, T]
    num_heads_q: Any
    seqlen_q: Any
    sequence: Any
    kv_head: Any
    tokens: Any  # of each row, as `_tile_rows` gives them
    heads: Any
    valid: Any


@triton.jit
def _tile_rows(tile, kv_head, group, seqlen_q, BLOCK_M: tl.constexpr):
    """(token, query head, exists) of the rows of a tile; rows that do not exist name the last one that does."""
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < seqlen_q * group
    rows = tl.minimum(rows, seqlen_q * group - 1)
    return rows // group, kv_head * group + rows % group, valid


@triton.jit
def _finish(
    acc,
    lse,
    q,
    prompts,
    result,
    scale_log2,
    cap,
    BLOCK_P: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TANH: tl.constexpr,
):
    """Adds the gated prompt branch to the token branch and writes out and lse: the only place that does."""
    out, lse_ptr, num_heads_q, seqlen_q, sequence, kv_head, tokens, heads, valid = result
    acc = add_prompt_branch(
        acc, q, prompts, sequence, heads, kv_head, scale_log2, cap, BLOCK_P, HEAD_DIM, TANH, valid
    )
    dims = tl.arange(0, block_of(HEAD_DIM))
    out_ptrs = row_ptr(out, sequence, heads, tokens)[:, None] + dims[None, :]
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out_ptrs, acc.to(out.ptr.dtype.element_ty), mask=mask)
    index = (sequence.to(tl.int64) * num_heads_q + heads) * seqlen_q + tokens
    tl.store(lse_ptr + index, lse, mask=valid)


@triton.jit(do_not_specialize=RUN_TIME)
def zinit_decode_kernel(
    query,  # View [B, Hq, T, D]
    key_cache,  # View [B, Hkv, capacity, D], or pages [num_pages, Hkv, page size, D]
    value_cache,
    new_key,  # View [B, Hkv, T_new, D], T_new <= BLOCK_T; no pointer: the cache holds all keys
    new_value,
    prompt_key,  # View [N, Hkv, P, D]; no pointer: no prompt branch
    prompt_value,  # View [N, Hkv, P, D]
    gate_ptr,  # float32 [N or 1, Hq]
    prompt_index_ptr,  # int32 [B] or None
    sinks_ptr,  # float32 [Hq] or None: a logit of each head, one more term of the token branch's denominator
    cache_seqlens_ptr,  # int32 [B]: keys in the cache before the call
    cache_leftpad_ptr,  # int32 [B] or None: the first slots of a sequence that no query sees
    block_table_ptr,  # int32 [B, pages of a sequence] or None
    cos_ptr,  # [rotary_rows, HALF] or None
    sin_ptr,
    out,  # View [B, Hq, T, D]
    lse_ptr,  # float32 [B, Hq, T]
    partial_out_ptr,  # float32 [splits, B, Hq, T, D], or None where the keys are not split
    partial_lse_ptr,  # float32 [B, Hq, T, splits], base 2
    num_heads_q,
    num_heads_kv,
    seqlen_q,  # T
    seqlen_new,  # new keys of a sequence, by whichever kernel they are appended
    capacity,
    num_pages,
    table_stride,
    rotary_rows,
    rotary_stride,
    window_left,  # None: no limit
    window_right,
    prompt_length,
    prompt_rows,
    gate_stride,  # 0: one row of gates for all table rows
    num_splits,
    scale_log2,  # |scale| * log2(e) > 0
    cap_scale,  # scale / softcap, of the scale's size in forward and decode; None: no soft cap
    cap_size,  # softcap
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TANH: tl.constexpr,
    SCALE_SIGN: tl.constexpr,  # 1, -1, or 0 for scale = 0
    ONE_TOKEN: tl.constexpr,  # T == 1: all rows see the same keys
):
    """One split of the keys for one tile of rows: out and lse, or with partial_out_ptr a partial result in float32.

    A partial result is divided by the denominator of its own keys. Every tile's last split takes new keys from the
    call's arguments, so that nobody waits for the one program of a head that writes them into the cache.
    """
    HIDES: tl.constexpr = (window_left is not None or window_right is not None) and not ONE_TOKEN
    CAREFUL: tl.constexpr = HIDES and always_careful(query.ptr.dtype.element_ty)
    window = Window(window_left, None if ONE_TOKEN else window_right)
    cap = Cap(cap_scale, cap_size)
    rotary = Rotary(cos_ptr, sin_ptr, rotary_rows, rotary_stride)
    group = num_heads_q // num_heads_kv
    num_tiles = tl.cdiv(seqlen_q * group, BLOCK_M)
    piece, kv_head, sequence = unravel(tl.program_id(0), num_splits * num_tiles, num_heads_kv)
    split, tile = piece % num_splits, piece // num_splits
    tokens, heads, valid = _tile_rows(tile, kv_head, group, seqlen_q, BLOCK_M)
    cached = tl.maximum(tl.load(cache_seqlens_ptr + sequence), 0)
    num_k = tl.minimum(cached + seqlen_new, capacity)
    rotary_positions = cached + tokens
    if window_left is None and window_right is None:
        # flash-attn's rule: without a mask all queries are rotated by the first new position
        rotary_positions = cached + tokens * 0
    q = load_rotated(
        query, sequence, heads, tokens, valid, rotary_positions, rotary, HEAD_DIM, HALF, INTERLEAVED
    )
    q = turn(q, SCALE_SIGN)

    if new_key.ptr is None:
        cached = num_k
    else:
        cached = tl.minimum(cached, capacity)
    new_positions = cached + tl.arange(0, BLOCK_T)
    leftpad = None
    if cache_leftpad_ptr is not None:  # from here on keys are counted from the first that is not padding
        leftpad = tl.minimum(tl.maximum(tl.load(cache_leftpad_ptr + sequence), 0), cached)
        cached -= leftpad
        num_k -= leftpad
    pages = Pages(block_table_ptr, table_stride, num_pages, leftpad)
    cache = CachedHead(key_cache, value_cache, pages, sequence, kv_head)
    position = num_k - seqlen_q
    scoring = Scoring(key_limits(position + tokens, cached, window), window, scale_log2, cap)
    new_scoring = Scoring(key_limits(position + tokens, num_k, window), window, scale_log2, cap)
    stretches = key_stretches(position + tile * BLOCK_M // group, cached, window, BLOCK_M, BLOCK_N)
    lowest = stretches[0][0]  # no row sees a key before it
    if window_left is not None:
        lowest = position + tile * BLOCK_M // group - window_left
    # This split's share of the keys is a whole number of tiles, cut to the three stretches.
    all_first, all_last = stretches[0][0], stretches[1][1]
    share = tl.cdiv(tl.cdiv(tl.maximum(all_last - all_first, 0), BLOCK_N), num_splits) * BLOCK_N
    split_first = all_first + split * share
    split_last = split_first + share
    acc = tl.zeros([BLOCK_M, block_of(HEAD_DIM)], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for phase in tl.static_range(3):
        if phase > 0 or window_left is not None:
            first = tl.maximum(split_first, stretches[phase][0])
            last = tl.minimum(split_last, stretches[phase][1])
            for start in range(first, last, BLOCK_N):
                k, v = load_cached(cache, start, lowest, cached, BLOCK_N, HEAD_DIM, PAGE_SIZE, phase < 2)
                acc, m, l = attend(
                    acc, m, l, q, k, v, None, start, scoring, phase < 2, False, CAREFUL and phase < 2
                )
        if phase == 1 and HIDES and not CAREFUL:
            # NaN, perhaps of a value that not all of these rows see: the masked stretches again, with care.
            if has_nan(acc):
                acc = tl.zeros([BLOCK_M, block_of(HEAD_DIM)], tl.float32)
                for masked in tl.static_range(2):
                    first = tl.maximum(split_first, stretches[masked][0])
                    last = tl.minimum(split_last, stretches[masked][1])
                    for one in tl.range(first, last, num_stages=1):
                        k, v = load_cached(cache, one, lowest, cached, 1, HEAD_DIM, PAGE_SIZE, True)
                        acc = attend_visible(acc, m, q, k, v, None, one, scoring, False)
    if new_key.ptr is not None:
        if split == num_splits - 1:
            new = tl.arange(0, BLOCK_T)
            present = (new < seqlen_new) & (cached + new < num_k)
            k, v = load_new(
                new_key,
                new_value,
                sequence,
                kv_head,
                new,
                new_positions,
                present,
                rotary,
                HEAD_DIM,
                HALF,
                INTERLEAVED,
            )
            if tile == 0:
                store_new(k, v, cache, cached + new, present, HEAD_DIM, PAGE_SIZE)
            if window_left is not None:
                v = tl.where((cached + new >= lowest)[:, None], v, 0.0)
            acc, m, l = attend(acc, m, l, q, k, v, None, cached, new_scoring, True, False, HIDES)

    # Where the keys are split, the combine kernel adds the sink, once.
    sink = None
    if sinks_ptr is not None and partial_out_ptr is None:
        sink = tl.load(sinks_ptr + heads)
    acc, lse = normalise(acc, m, l, exponent_scale(scale_log2, cap, False), sink)
    if partial_out_ptr is None:
        prompts = Prompts(
            prompt_key, prompt_value, gate_ptr, prompt_index_ptr, prompt_rows, prompt_length, gate_stride
        )
        result = Result(out, lse_ptr, num_heads_q, seqlen_q, sequence, kv_head, tokens, heads, valid)
        lse = natural_lse(lse, sink)
        _finish(acc, lse, q, prompts, result, scale_log2, cap, BLOCK_P, HEAD_DIM, TANH)
    else:
        num_sequences = tl.num_programs(0) // (num_splits * num_tiles * num_heads_kv)
        rows = (sequence.to(tl.int64) * num_heads_q + heads) * seqlen_q + tokens
        slots = split.to(tl.int64) * num_sequences * num_heads_q * seqlen_q + rows
        dims = tl.arange(0, block_of(HEAD_DIM))
        mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
        tl.store(partial_out_ptr + slots[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
        tl.store(partial_lse_ptr + rows * num_splits + split, lse, mask=valid)


@triton.constexpr_function
def splits_together(head_dim, bits):
    """How many splits' partial results are loaded at once: their loads wait for memory together.

    bits: of an element of the query. Half as many with float32, whose products need the registers: Triton 3.6 spills.
    """
    return max(512 // block_of(head_dim), 4) // (2 if bits == 32 else 1)


@triton.jit(do_not_specialize=RUN_TIME)
def zinit_combine_kernel(
    partial_out_ptr,  # float32 [splits, B, Hq, T, D]
    partial_lse_ptr,  # float32 [B, Hq, T, splits], base 2
    query,  # View [B, Hq, T, D]
    prompt_key,  # View [N, Hkv, P, D]; no pointer: no prompt branch
    prompt_value,  # View [N, Hkv, P, D]
    gate_ptr,  # float32 [N or 1, Hq]
    prompt_index_ptr,  # int32 [B] or None
    sinks_ptr,  # float32 [Hq] or None: a logit of each head, one more term of the token branch's denominator
    cache_seqlens_ptr,  # int32 [B]: keys in the cache before the call
    cos_ptr,  # [rotary_rows, HALF] or None
    sin_ptr,
    out,  # View [B, Hq, T, D]
    lse_ptr,  # float32 [B, Hq, T]
    num_heads_q,
    num_heads_kv,
    seqlen_q,  # T
    rotary_rows,
    rotary_stride,
    prompt_length,
    prompt_rows,
    gate_stride,  # 0: one row of gates for all table rows
    num_splits,
    scale_log2,  # scale * log2(e)
    cap_scale,  # scale / softcap, of the scale's size in forward and decode; None: no soft cap
    cap_size,  # softcap
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ADVANCE: tl.constexpr,  # whether the rotary position advances with the token
    TANH: tl.constexpr,
):
    """out = sum_s 2^(lse_s - lse) out_s, with lse = log2 sum_s 2^lse_s, and then the prompt branch, once."""
    SPLITS: tl.constexpr = splits_together(HEAD_DIM, query.ptr.dtype.element_ty.primitive_bitwidth)
    prompts = Prompts(
        prompt_key, prompt_value, gate_ptr, prompt_index_ptr, prompt_rows, prompt_length, gate_stride
    )
    rotary = Rotary(cos_ptr, sin_ptr, rotary_rows, rotary_stride)
    cap = Cap(cap_scale, cap_size)
    group = num_heads_q // num_heads_kv
    num_tiles = tl.cdiv(seqlen_q * group, BLOCK_M)
    tile, kv_head, sequence = unravel(tl.program_id(0), num_tiles, num_heads_kv)
    num_sequences = tl.num_programs(0) // (num_tiles * num_heads_kv)
    tokens, heads, valid = _tile_rows(tile, kv_head, group, seqlen_q, BLOCK_M)
    dims = tl.arange(0, block_of(HEAD_DIM))
    acc = tl.zeros([BLOCK_M, block_of(HEAD_DIM)], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    rows = (sequence.to(tl.int64) * num_heads_q + heads) * seqlen_q + tokens
    for first in range(0, num_splits, SPLITS):
        splits = first + tl.arange(0, SPLITS)
        slots = (tl.cast(splits, tl.int64) * num_sequences * num_heads_q * seqlen_q)[:, None] + rows[None, :]
        present = (splits < num_splits)[:, None] & valid[None, :]
        partial_lse = tl.load(
            partial_lse_ptr + rows[None, :] * num_splits + splits[:, None], mask=present, other=float("-inf")
        )
        partial_out = tl.load(
            partial_out_ptr + slots[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=present[:, :, None] & (dims < HEAD_DIM)[None, None, :],
            other=0.0,
        )
        new_m = tl.maximum(m, tl.max(partial_lse, 0))
        pivot = tl.where(new_m == float("-inf"), 0.0, new_m)
        p, alpha = tl.math.exp2(partial_lse - pivot[None, :]), tl.math.exp2(m - pivot)
        m, l = new_m, l * alpha + tl.sum(p, 0)
        acc = acc * alpha[:, None] + tl.sum(p[:, :, None] * partial_out, 0)
    sink = None
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + heads)
    acc, lse = normalise(acc, m, l, 1.0, sink)
    rotary_positions = tl.maximum(tl.load(cache_seqlens_ptr + sequence), 0) + (
        tokens if ADVANCE else tokens * 0
    )
    q = load_rotated(
        query, sequence, heads, tokens, valid, rotary_positions, rotary, HEAD_DIM, HALF, INTERLEAVED
    )
    result = Result(out, lse_ptr, num_heads_q, seqlen_q, sequence, kv_head, tokens, heads, valid)
    lse = natural_lse(lse, sink)
    _finish(acc, lse, q, prompts, result, scale_log2, cap, BLOCK_P, HEAD_DIM, TANH)
