"""The prompt term alone, added to what another attention has computed of the tokens, for `backends/hybrid`.

    out += s softmax(scale q pk^T) pv                   dq += scale dSp pk,   dSp = s Ap (dAp - rowsum(Ap dAp))

with s = act(gate). Each kernel reads its tensor once and writes it once, in place or into another. Where the term is 0,
as at a gate of 0, the element stays what it was to the last bit.
"""

import triton
import triton.language as tl

from .primitives import (
    RUN_TIME,
    Cap,
    Prompts,
    block_of,
    dot,
    load_gate,
    load_prompts,
    load_tile,
    prompt_row,
    rows_from,
    store_tile,
    unravel,
)
from .softmax import add_prompt_branch, prompt_softmax


@triton.jit(do_not_specialize=RUN_TIME)
def zinit_add_prompts_kernel(
    query,  # View [B, Hq, T, D]
    prompt_key,  # View [N, Hkv, P, D]
    prompt_value,  # View [N, Hkv, P, D]
    gate_ptr,  # float32 [N or 1, Hq]
    prompt_index_ptr,  # int32 [B] or None
    source,  # View [B, Hq, T, D]: attention to the tokens
    target,  # View [B, Hq, T, D]; it may be the source
    num_heads_q,
    num_heads_kv,
    seqlen_q,
    prompt_length,
    prompt_rows,
    gate_stride,  # 0: one row of gates for all table rows
    scale_log2,  # scale * log2(e)
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TANH: tl.constexpr,
    SUBTRACT: tl.constexpr,
):
    """target = source + the prompt term, or source - it. One program owns BLOCK_M queries of one head."""
    tile, head, sequence = unravel(tl.program_id(0), tl.cdiv(seqlen_q, BLOCK_M), num_heads_q)
    kv_head = head // (num_heads_q // num_heads_kv)
    start = tile * BLOCK_M
    left = seqlen_q - start
    prompts = Prompts(
        prompt_key, prompt_value, gate_ptr, prompt_index_ptr, prompt_rows, prompt_length, gate_stride
    )
    q = load_tile(rows_from(query, sequence, head, start), left, BLOCK_M, HEAD_DIM, True)
    term = add_prompt_branch(
        tl.zeros([BLOCK_M, block_of(HEAD_DIM)], tl.float32),
        q,
        prompts,
        sequence,
        head,
        kv_head,
        scale_log2,
        Cap(None, None),
        BLOCK_P,
        HEAD_DIM,
        TANH,
    )
    if SUBTRACT:
        term = -term
    _store_sum(
        rows_from(source, sequence, head, start),
        rows_from(target, sequence, head, start),
        left,
        term,
        BLOCK_M,
        HEAD_DIM,
    )


@triton.jit(do_not_specialize=RUN_TIME)
def zinit_add_prompt_grad_query_kernel(
    query,  # View [B, Hq, T, D]
    prompt_key,  # View [N, Hkv, P, D]
    prompt_value,  # View [N, Hkv, P, D]
    gate_ptr,  # float32 [N or 1, Hq]
    prompt_index_ptr,  # int32 [B] or None
    grad_out,  # View [B, Hq, T, D]
    source,  # View [B, Hq, T, D]: the tokens' part of dq
    target,  # View [B, Hq, T, D]; it may be the source
    num_heads_q,
    num_heads_kv,
    seqlen_q,
    prompt_length,
    prompt_rows,
    gate_stride,  # 0: one row of gates for all table rows
    scale,
    scale_log2,  # scale * log2(e)
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TANH: tl.constexpr,
):
    """target = source + the prompts' part of dq. One program owns BLOCK_M queries of one head."""
    tile, head, sequence = unravel(tl.program_id(0), tl.cdiv(seqlen_q, BLOCK_M), num_heads_q)
    kv_head = head // (num_heads_q // num_heads_kv)
    start = tile * BLOCK_M
    left = seqlen_q - start
    prompts = Prompts(
        prompt_key, prompt_value, gate_ptr, prompt_index_ptr, prompt_rows, prompt_length, gate_stride
    )
    q = load_tile(rows_from(query, sequence, head, start), left, BLOCK_M, HEAD_DIM, True)
    do = load_tile(rows_from(grad_out, sequence, head, start), left, BLOCK_M, HEAD_DIM, True)
    term = tl.zeros([BLOCK_M, block_of(HEAD_DIM)], tl.float32)
    row = prompt_row(prompts, sequence)
    if row >= 0:
        gate = load_gate(prompts, row, head, TANH)
        prompt_k = load_prompts(prompt_key, row, kv_head, prompt_length, q.dtype, BLOCK_P, HEAD_DIM)
        prompt_v = load_prompts(prompt_value, row, kv_head, prompt_length, q.dtype, BLOCK_P, HEAD_DIM)
        p, _ = prompt_softmax(q, prompt_k, prompt_length, scale_log2, Cap(None, None), BLOCK_P)
        dp = dot(do, tl.trans(prompt_v))  # [BLOCK_M, BLOCK_P]
        ds = gate * p * (dp - tl.sum(p * dp, 1)[:, None])
        term = dot(ds.to(q.dtype), prompt_k, term) * scale
    _store_sum(
        rows_from(source, sequence, head, start),
        rows_from(target, sequence, head, start),
        left,
        term,
        BLOCK_M,
        HEAD_DIM,
    )


@triton.jit
def _store_sum(source_rows, target_rows, left, term, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The source's tile plus a term in float32, rounded once; -0 where the source has it and the term is 0."""
    before = load_tile(source_rows, left, BLOCK_M, HEAD_DIM, True).to(tl.float32)
    store_tile(target_rows, left, tl.where(term == 0, before, before + term), BLOCK_M, HEAD_DIM)
