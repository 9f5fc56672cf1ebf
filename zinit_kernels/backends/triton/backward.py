"""The token part of backward: one kernel for the gradients of key and value, one for that of the query.

    A = 2^(S - lse)     dv = A^T dO     dA = dO v^T     dS = A (dA - delta)     dq = scale dS k     dk = scale dS^T q

Scores S and lse are in base 2, delta comes from prompt_gradients.py. Two kernels instead of one with atomic additions:
every sum has one order, so that backward gives the same bits every time.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import (
    LOG2E,
    RUN_TIME,
    Cap,
    Prompts,
    Rows,
    Scoring,
    Window,
    always_careful,
    block_of,
    cap_scores,
    cap_slopes,
    dot,
    has_nan,
    is_visible,
    key_limits,
    key_stretches,
    load_gate,
    load_key_tile,
    load_prompts,
    load_tile,
    locate_sequence,
    prompt_row,
    row_ptr,
    rows_from,
    skip_rows,
    store_tile,
    unravel,
)
from .softmax import finite_part, prompt_softmax


class Heads(NamedTuple):
    """The rows of several heads: those of the first one, and the elements from one head to the next."""

    ptr: Any
    head: Any
    token: Any


class KeyTile(NamedTuple):
    """[BLOCK_N, D] keys and values, and their bias [BLOCK_N]; None without one."""

    k: Any
    v: Any
    bias: Any


class GroupQueries(NamedTuple):
    """The queries of the heads that share a key head."""

    query: Any  # Heads
    grad_out: Any  # Heads
    lse_ptr: Any  # of the first head, with total elements from one head to the next
    delta_ptr: Any  # None: dk is not wanted
    num: Any  # of the sequence
    total: Any  # of all sequences
    group: Any  # heads


class QueryTile(NamedTuple):
    """[BLOCK_M, D] queries and gradients of their outputs, with lse and delta [BLOCK_M]."""

    q: Any
    do: Any
    lse: Any
    delta: Any


class SequenceKeys(NamedTuple):
    """The keys of a head of a sequence in memory."""

    key_rows: Any  # Rows
    value_rows: Any  # Rows
    bias_ptr: Any  # None: no bias
    num: Any


@triton.jit
def _rows_of(heads, member, row):
    """The rows of one of the heads from `row` on."""
    return skip_rows(Rows(heads.ptr + tl.cast(member, tl.int64) * heads.head, heads.token), row)


@triton.jit
def _load_lse(lse_ptr, rows, num_rows, cap, MAY_BE_EMPTY: tl.constexpr):
    """log-sum-exp of some queries, in base 2 unless there is a soft cap.

    With MAY_BE_EMPTY it is +inf where a query does not exist or has no key: all its weights 2^(s - lse) are then 0.
    """
    if MAY_BE_EMPTY:
        lse = tl.load(lse_ptr + rows, mask=rows < num_rows, other=float("-inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
    else:
        lse = tl.load(lse_ptr + rows)
    if cap.size is None:
        lse *= LOG2E
    return lse


@triton.jit
def _weights(s, lse, bias, cap):
    """2^(s - lse), with the bias (or None) added to s; e^(s - lse) with a soft cap. lse and bias fit the shape of s.

    Where every key of a row has the lowest bias, lse is -2e38 and too coarse for the difference: at most 1 then.
    """
    if cap.size is not None:
        if bias is not None:
            s += bias
        return tl.math.exp2(tl.minimum(s - lse, 0.0, propagate_nan=tl.PropagateNan.ALL) * LOG2E)
    elif bias is not None:
        return tl.math.exp2(tl.minimum(s + bias * LOG2E - lse, 0.0, propagate_nan=tl.PropagateNan.ALL))
    else:
        return tl.math.exp2(s - lse)


@triton.jit
def _add_queries(
    dk,
    dv,
    keys,
    queries,
    stretch,
    scoring,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
    CAREFUL: tl.constexpr,
    WANTS_VALUE: tl.constexpr,
):
    """dk and dv after a stretch of the queries of every head of the group; scores are transposed, [BLOCK_N, BLOCK_M].

    keys: KeyTile. queries: GroupQueries. stretch: (first, last). The limits of `scoring` are those of the queries that
    each key is seen by. Without MASKED every query sees every key.

    CAREFUL: where MASKED, a query with NaN (in itself or its gradient) adds nothing to the keys that it does not see.
    The products would add 0 * NaN. To those that it sees it adds NaN.

    All heads in one loop: nested loops kept the addresses of three stretches alive and spilled. Its counters advance by
    hand, because a division by the number of tiles costs 40 instructions.
    """
    HAS_BIAS: tl.constexpr = keys.bias is not None
    EXACT: tl.constexpr = CAREFUL and MASKED
    WANTS_KEY: tl.constexpr = queries.delta_ptr is not None
    k, v, bias = keys
    query_heads, grad_out_heads, lse_ptr, delta_ptr, num_q, total_q, group = queries
    limits, window, scale_log2, cap = scoring
    first, last = stretch
    rows = tl.arange(0, BLOCK_M)
    num_tiles = tl.cdiv(tl.maximum(last - first, 0), BLOCK_M)
    tile_end = first + num_tiles * BLOCK_M
    start = first
    member = first * 0
    for _ in tl.range(0, group * num_tiles, num_stages=1 if EXACT else None):
        left = num_q - start
        row_offset = tl.cast(member, tl.int64) * total_q + start
        q = load_tile(_rows_of(query_heads, member, start), left, BLOCK_M, HEAD_DIM, MASKED)
        do = load_tile(_rows_of(grad_out_heads, member, start), left, BLOCK_M, HEAD_DIM, MASKED)
        lse = _load_lse(lse_ptr + row_offset, rows, left, cap, MASKED or HAS_BIAS)
        if EXACT:
            # Where q is NaN, so is lse, and with it every weight of the row. Where do is, lse is made NaN.
            q = finite_part(tl.where((lse == lse)[:, None], q, 0.0).to(q.dtype))
            zero = tl.sum(do.to(tl.float32) * 0.0, 1)
            do = tl.where((zero == zero)[:, None], do, 0.0).to(do.dtype)
            lse += zero
        s = dot(k, tl.trans(q))
        if cap.size is not None:
            s = cap_scores(s, cap)
        else:
            s = s * scale_log2
        p = _weights(s, lse[None, :], bias[:, None] if HAS_BIAS else None, cap)
        if MASKED:
            visible = is_visible(start, BLOCK_M, limits, window)
            p = tl.where(visible, p, 0.0)
        if WANTS_VALUE:
            dv = dot(p.to(q.dtype), do, dv)
        if WANTS_KEY:
            if MASKED:
                delta = tl.load(delta_ptr + row_offset + rows, mask=rows < left, other=0.0)
            else:
                delta = tl.load(delta_ptr + row_offset + rows)
            ds = p * (dot(v, tl.trans(do)) - delta[None, :])
            if cap.size is not None:
                ds *= cap_slopes(s, cap)
            if EXACT:
                ds = tl.where(visible, ds, 0.0)
            dk = dot(ds.to(q.dtype), q, dk)
        start += BLOCK_M
        is_last = start >= tile_end
        start = tl.where(is_last, first, start)
        member += is_last.to(tl.int32)
    return dk, dv


@triton.jit(do_not_specialize=RUN_TIME)
def zinit_grad_key_value_kernel(
    query,  # View [B, Hq, T, D]
    key,  # View [B, Hkv, S, D]
    value,  # View [B, Hkv, S, D]
    grad_out,  # View [B, Hq, T, D]
    lse_ptr,  # float32 [B, Hq, T], as forward wrote it
    delta_ptr,  # float32 [B, Hq, T]; not read where dk is not wanted
    key_bias_ptr,  # float32 [B, S] or None
    cu_seqlens_q_ptr,  # int32 [B + 1] or None
    cu_seqlens_k_ptr,  # int32 [B + 1] or None
    grad_key,  # View [B, Hkv, S, D]; no pointer: not wanted
    grad_value,  # View [B, Hkv, S, D]; no pointer: not wanted
    num_heads_q,
    num_heads_kv,
    seqlen_q,  # T; the longest one where packed
    seqlen_k,  # S; the longest one where packed
    total_q,  # rows of the query tensor
    total_k,
    window_left,  # None: no limit
    window_right,
    scale,
    scale_log2,  # scale * log2(e)
    cap_scale,  # scale / softcap; None: no soft cap
    cap_size,  # softcap
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk = scale dS^T q and dv = A^T dO, summed over the queries and the query heads of one key head.

    One program owns BLOCK_N keys and walks over tiles of BLOCK_M queries. Keys behind the last one are zero rows of
    their own, which nothing reads.
    """
    HAS_BIAS: tl.constexpr = key_bias_ptr is not None
    HIDES: tl.constexpr = window_left is not None or window_right is not None
    CAREFUL: tl.constexpr = HIDES and always_careful(query.ptr.dtype.element_ty)
    WANTS_KEY: tl.constexpr = grad_key.ptr is not None
    WANTS_VALUE: tl.constexpr = grad_value.ptr is not None
    tile, kv_head, sequence = unravel(tl.program_id(0), tl.cdiv(seqlen_k, BLOCK_N), num_heads_kv)
    batch, first_q, num_q = locate_sequence(cu_seqlens_q_ptr, sequence, seqlen_q, total_q)
    _, first_k, num_k = locate_sequence(cu_seqlens_k_ptr, sequence, seqlen_k, total_k)
    start = tile * BLOCK_N
    if start >= num_k:
        return

    key_rows = rows_from(key, batch, kv_head, first_k)
    value_rows = rows_from(value, batch, kv_head, first_k)
    if HAS_BIAS:
        key_bias_ptr += batch.to(tl.int64) * seqlen_k
    k, v, bias = load_key_tile(key_rows, value_rows, key_bias_ptr, start, num_k, BLOCK_N, HEAD_DIM, True)

    group = num_heads_q // num_heads_kv
    query_heads = Heads(row_ptr(query, batch, kv_head * group, first_q), query.head, query.token)
    grad_out_heads = Heads(row_ptr(grad_out, batch, kv_head * group, first_q), grad_out.head, grad_out.token)
    row_offset = (batch.to(tl.int64) * num_heads_q + kv_head * group) * total_q + first_q
    lse_ptr += row_offset
    if WANTS_KEY:
        delta_ptr += row_offset
    keys = KeyTile(k, v, bias if HAS_BIAS else None)
    queries = GroupQueries(
        query_heads, grad_out_heads, lse_ptr, delta_ptr if WANTS_KEY else None, num_q, total_q, group
    )

    # A key sees queries as a query sees keys, with the sides of the window exchanged.
    window = Window(window_right, window_left)
    cap = Cap(cap_scale, cap_size)
    position = start - (num_k - num_q)
    limits = key_limits(position + tl.arange(0, BLOCK_N), num_q, window)
    scoring = Scoring(limits, window, scale_log2, cap)
    stretches = key_stretches(position, num_q, window, BLOCK_N, BLOCK_M)
    dk = tl.zeros([BLOCK_N, block_of(HEAD_DIM)], tl.float32)
    dv = tl.zeros([BLOCK_N, block_of(HEAD_DIM)], tl.float32)
    for phase in tl.static_range(3):
        if phase > 0 or window_right is not None:
            stretch = stretches[phase]
            dk, dv = _add_queries(
                dk, dv, keys, queries, stretch, scoring, BLOCK_M, HEAD_DIM, phase < 2, CAREFUL, WANTS_VALUE
            )
        if phase == 1 and HIDES and not CAREFUL:
            # NaN, perhaps of a query that not all of these keys see: the masked stretches again, with care. A NaN in
            # the gradient of a query makes dk NaN too.
            if has_nan(dk if WANTS_KEY else dv):
                dk = tl.zeros([BLOCK_N, block_of(HEAD_DIM)], tl.float32)
                dv = tl.zeros([BLOCK_N, block_of(HEAD_DIM)], tl.float32)
                for masked in tl.static_range(2):
                    stretch = stretches[masked]
                    dk, dv = _add_queries(
                        dk, dv, keys, queries, stretch, scoring, 16, HEAD_DIM, True, True, WANTS_VALUE
                    )

    if HAS_BIAS:  # a masked key gets no gradient, from a query with NaN either
        keep = (bias != float("-inf"))[:, None]
        dk = tl.where(keep, dk, 0.0)
        dv = tl.where(keep, dv, 0.0)
    if WANTS_KEY:
        rows_out = rows_from(grad_key, batch, kv_head, first_k + start)
        store_tile(rows_out, num_k - start, dk * scale, BLOCK_N, HEAD_DIM)
    if WANTS_VALUE:
        rows_out = rows_from(grad_value, batch, kv_head, first_k + start)
        store_tile(rows_out, num_k - start, dv, BLOCK_N, HEAD_DIM)


@triton.jit
def _add_keys(
    dq,
    queries,
    keys,
    stretch,
    scoring,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """dq after a stretch of the keys.

    queries: QueryTile. keys: SequenceKeys. stretch: (first, last). Without MASKED every query sees every key.

    CAREFUL: where MASKED, a key with NaN adds nothing to the queries that do not see it. The product would add 0 * NaN.
    """
    EXACT: tl.constexpr = CAREFUL and MASKED
    q, do, lse, delta = queries
    key_rows, value_rows, key_bias_ptr, num_k = keys
    limits, window, scale_log2, cap = scoring
    first, last = stretch
    for start in tl.range(first, last, BLOCK_N, num_stages=1 if EXACT else None):
        k, v, bias = load_key_tile(
            key_rows, value_rows, key_bias_ptr, start, num_k, BLOCK_N, HEAD_DIM, MASKED
        )
        s = dot(q, tl.trans(k))
        if cap.size is not None:
            s = cap_scores(s, cap)
        else:
            s = s * scale_log2
        p = _weights(s, lse[:, None], bias[None, :] if key_bias_ptr is not None else None, cap)
        if MASKED:
            visible = is_visible(start, BLOCK_N, limits, window)
            p = tl.where(visible, p, 0.0)
        ds = p * (dot(do, tl.trans(v)) - delta[:, None])
        if cap.size is not None:
            ds *= cap_slopes(s, cap)
        if EXACT:  # a NaN or infinity in k is also in the scores of those that see it
            ds = tl.where(visible, ds, 0.0)
            k = finite_part(k)
        dq = dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=RUN_TIME)
def zinit_grad_query_kernel(
    query,  # View [B, Hq, T, D]
    key,  # View [B, Hkv, S, D]
    value,  # View [B, Hkv, S, D]
    prompt_key,  # View [N, Hkv, P, D]; no pointer: no prompt branch
    prompt_value,  # View [N, Hkv, P, D]
    gate_ptr,  # float32 [N or 1, Hq]
    prompt_index_ptr,  # int32 [B] or None
    grad_out,  # View [B, Hq, T, D]
    lse_ptr,  # float32 [B, Hq, T], as forward wrote it
    delta_ptr,  # float32 [B, Hq, T]
    key_bias_ptr,  # float32 [B, S] or None
    cu_seqlens_q_ptr,  # int32 [B + 1] or None
    cu_seqlens_k_ptr,  # int32 [B + 1] or None
    grad_query,  # View [B, Hq, T, D]
    num_heads_q,
    num_heads_kv,
    seqlen_q,  # T; the longest one where packed
    seqlen_k,  # S; the longest one where packed
    total_q,  # rows of the query tensor
    total_k,
    window_left,  # None: no limit
    window_right,
    prompt_length,
    prompt_rows,
    gate_stride,  # 0: one row of gates for all table rows
    scale,
    scale_log2,  # scale * log2(e)
    cap_scale,  # scale / softcap; None: no soft cap
    cap_size,  # softcap
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TANH: tl.constexpr,
):
    """dq = scale (dS k + dSp pk), dSp = s Ap (dAp - rowsum(Ap dAp)); one program owns BLOCK_M queries of one head.

    The prompt term is recomputed here (three products with P columns) rather than read: no rounding in between, and
    no pass over memory.
    """
    HIDES: tl.constexpr = window_left is not None or window_right is not None
    CAREFUL: tl.constexpr = HIDES and always_careful(query.ptr.dtype.element_ty)
    window = Window(window_left, window_right)
    cap = Cap(cap_scale, cap_size)
    tile, head, sequence = unravel(tl.program_id(0), tl.cdiv(seqlen_q, BLOCK_M), num_heads_q)
    kv_head = head // (num_heads_q // num_heads_kv)
    batch, first_q, num_q = locate_sequence(cu_seqlens_q_ptr, sequence, seqlen_q, total_q)
    _, first_k, num_k = locate_sequence(cu_seqlens_k_ptr, sequence, seqlen_k, total_k)
    if window_right is not None:  # the longest programs first, as in forward
        tile = tl.cdiv(num_q, BLOCK_M) - 1 - tile
    start = tile * BLOCK_M
    if (start < 0) | (start >= num_q):
        return

    rows = tl.arange(0, BLOCK_M)
    left = num_q - start
    key_rows = rows_from(key, batch, kv_head, first_k)
    value_rows = rows_from(value, batch, kv_head, first_k)
    if key_bias_ptr is not None:
        key_bias_ptr += batch.to(tl.int64) * seqlen_k
    row_offset = (batch.to(tl.int64) * num_heads_q + head) * total_q + first_q + start
    q = load_tile(rows_from(query, batch, head, first_q + start), left, BLOCK_M, HEAD_DIM, True)
    do = load_tile(rows_from(grad_out, batch, head, first_q + start), left, BLOCK_M, HEAD_DIM, True)
    lse = _load_lse(lse_ptr + row_offset, rows, left, cap, True)
    delta = tl.load(delta_ptr + row_offset + rows, mask=rows < left, other=0.0)

    position = start + num_k - num_q
    queries = QueryTile(q, do, lse, delta)
    keys = SequenceKeys(key_rows, value_rows, key_bias_ptr, num_k)
    scoring = Scoring(key_limits(position + rows, num_k, window), window, scale_log2, cap)
    stretches = key_stretches(position, num_k, window, BLOCK_M, BLOCK_N)
    dq = tl.zeros([BLOCK_M, block_of(HEAD_DIM)], tl.float32)
    for phase in tl.static_range(3):
        if phase > 0 or window_left is not None:
            dq = _add_keys(
                dq, queries, keys, stretches[phase], scoring, BLOCK_N, HEAD_DIM, phase < 2, CAREFUL
            )
        if phase == 1 and HIDES and not CAREFUL:
            # NaN, perhaps of a key that not all of these queries see: the masked stretches again, with care.
            if has_nan(dq):
                dq = tl.zeros([BLOCK_M, block_of(HEAD_DIM)], tl.float32)
                for masked in tl.static_range(2):
                    dq = _add_keys(dq, queries, keys, stretches[masked], scoring, 16, HEAD_DIM, True, True)

    if prompt_key.ptr is not None:
        prompts = Prompts(
            prompt_key, prompt_value, gate_ptr, prompt_index_ptr, prompt_rows, prompt_length, gate_stride
        )
        row = prompt_row(prompts, sequence)
        if row >= 0:
            gate = load_gate(prompts, row, head, TANH)
            prompt_k = load_prompts(prompt_key, row, kv_head, prompt_length, q.dtype, BLOCK_P, HEAD_DIM)
            prompt_v = load_prompts(prompt_value, row, kv_head, prompt_length, q.dtype, BLOCK_P, HEAD_DIM)
            p, s = prompt_softmax(q, prompt_k, prompt_length, scale_log2, cap, BLOCK_P)
            dp = dot(do, tl.trans(prompt_v))  # [BLOCK_M, BLOCK_P]
            ds = gate * p * (dp - tl.sum(p * dp, 1)[:, None])
            if cap.size is not None:
                ds *= cap_slopes(s, cap)
            dq = dot(ds.to(q.dtype), prompt_k, dq)

    rows_out = rows_from(grad_query, batch, head, first_q + start)
    store_tile(rows_out, left, dq * scale, BLOCK_M, HEAD_DIM)
