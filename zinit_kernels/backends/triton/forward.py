"""The forward kernel: both softmaxes, one accumulator, `out` and `lse` written once."""

import triton
import triton.language as tl

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
    load_key_tile,
    load_tile,
    locate_sequence,
    rows_from,
    store_tile,
    unravel,
)
from .softmax import add_prompt_branch, attend, attend_visible, exponent_scale, natural_lse, normalise, turn


@triton.jit(do_not_specialize=RUN_TIME)
def zinit_forward_kernel(
    query,  # View [B, Hq, T, D]
    key,  # View [B, Hkv, S, D]
    value,  # View [B, Hkv, S, D]
    prompt_key,  # View [N, Hkv, P, D]; no pointer: no prompt branch
    prompt_value,  # View [N, Hkv, P, D]
    gate_ptr,  # float32 [N or 1, Hq]
    prompt_index_ptr,  # int32 [B] or None: the table row of each sequence, -1 = none
    sinks_ptr,  # float32 [Hq] or None: a logit of each head, one more term of the token branch's denominator
    key_bias_ptr,  # float32 [B, S] or None: added to the scaled scores, -inf = masked
    cu_seqlens_q_ptr,  # int32 [B + 1] or None: packed sequences
    cu_seqlens_k_ptr,  # int32 [B + 1] or None
    out,  # View [B, Hq, T, D]
    lse_ptr,  # float32 [B, Hq, T]
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
    scale_log2,  # |scale| * log2(e) > 0
    cap_scale,  # scale / softcap, of the scale's size in forward and decode; None: no soft cap
    cap_size,  # softcap
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TANH: tl.constexpr,
    SCALE_SIGN: tl.constexpr,  # 1, -1, or 0 for scale = 0
):
    """out = softmax(scale q k^T + mask) v + act(gate) softmax(scale q pk^T) pv; lse = log sum exp of the first scores.

    One program owns BLOCK_M queries of one head. After the loop over the keys it divides its accumulator by the token
    branch's denominator and adds the gated prompt branch into the same accumulator.
    """
    HAS_BIAS: tl.constexpr = key_bias_ptr is not None
    HIDES: tl.constexpr = window_left is not None or window_right is not None
    CAREFUL: tl.constexpr = HIDES and always_careful(query.ptr.dtype.element_ty)
    window = Window(window_left, window_right)
    cap = Cap(cap_scale, cap_size)
    prompts = Prompts(
        prompt_key, prompt_value, gate_ptr, prompt_index_ptr, prompt_rows, prompt_length, gate_stride
    )
    tile, head, sequence = unravel(tl.program_id(0), tl.cdiv(seqlen_q, BLOCK_M), num_heads_q)
    kv_head = head // (num_heads_q // num_heads_kv)
    batch, first_q, num_q = locate_sequence(cu_seqlens_q_ptr, sequence, seqlen_q, total_q)
    _, first_k, num_k = locate_sequence(cu_seqlens_k_ptr, sequence, seqlen_k, total_k)
    if window_right is not None:
        # The last queries see the most keys. Starting with them leaves the short programs for the end.
        tile = tl.cdiv(num_q, BLOCK_M) - 1 - tile
    start = tile * BLOCK_M
    if (start < 0) | (start >= num_q):
        return

    query_rows = rows_from(query, batch, head, first_q + start)
    key_rows = rows_from(key, batch, kv_head, first_k)
    value_rows = rows_from(value, batch, kv_head, first_k)
    if HAS_BIAS:
        key_bias_ptr += batch.to(tl.int64) * seqlen_k
    q = turn(load_tile(query_rows, num_q - start, BLOCK_M, HEAD_DIM, True), SCALE_SIGN)

    position = start + num_k - num_q
    limits = key_limits(position + tl.arange(0, BLOCK_M), num_k, window)
    scoring = Scoring(limits, window, scale_log2, cap)
    stretches = key_stretches(position, num_k, window, BLOCK_M, BLOCK_N)
    acc = tl.zeros([BLOCK_M, block_of(HEAD_DIM)], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for phase in tl.static_range(3):
        if phase > 0 or window_left is not None:
            for first in range(stretches[phase][0], stretches[phase][1], BLOCK_N):
                k, v, bias = load_key_tile(
                    key_rows, value_rows, key_bias_ptr, first, num_k, BLOCK_N, HEAD_DIM, phase < 2
                )
                acc, m, l = attend(
                    acc, m, l, q, k, v, bias, first, scoring, phase < 2, HAS_BIAS, CAREFUL and phase < 2
                )
        if phase == 1 and HIDES and not CAREFUL:
            # NaN, perhaps of a value that not all of these queries see: the masked stretches again, with care.
            if has_nan(acc):
                acc = tl.zeros([BLOCK_M, block_of(HEAD_DIM)], tl.float32)
                for masked in tl.static_range(2):
                    for one in tl.range(stretches[masked][0], stretches[masked][1], num_stages=1):
                        k, v, bias = load_key_tile(
                            key_rows, value_rows, key_bias_ptr, one, num_k, 1, HEAD_DIM, True
                        )
                        acc = attend_visible(acc, m, q, k, v, bias, one, scoring, HAS_BIAS)

    sink = None  # not out of a function: Triton 3.6 cannot return None
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head)
    acc, lse = normalise(acc, m, l, exponent_scale(scale_log2, cap, HAS_BIAS), sink)
    acc = add_prompt_branch(
        acc, q, prompts, sequence, head, kv_head, scale_log2, cap, BLOCK_P, HEAD_DIM, TANH
    )

    out_rows = rows_from(out, batch, head, first_q + start)
    store_tile(out_rows, num_q - start, acc, BLOCK_M, HEAD_DIM)
    rows = tl.arange(0, BLOCK_M)
    lse_ptr += (batch.to(tl.int64) * num_heads_q + head) * total_q + first_q + start
    tl.store(lse_ptr + rows, natural_lse(lse, sink), mask=rows < num_q - start)
