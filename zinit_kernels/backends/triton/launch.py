"""From canonical tensors to kernel launches: allocations, grids, strides. Torch on the host side, no arithmetic."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import configs, tuning
from .backward import zinit_grad_key_value_kernel, zinit_grad_query_kernel
from .cache import zinit_append_kernel
from .configs import Config, block_of
from .decode import zinit_combine_kernel, zinit_decode_kernel
from .forward import zinit_forward_kernel
from .operands import (
    Prompt,
    addressable,
    arch_of,
    num_processors,
    num_sequences,
    token_major_like,
    view_of,
)
from .primitives import LOG2E
from .prompt_gradients import zinit_add_partials_kernel, zinit_partial_sums_kernel
from .ranges import named

_LONGEST_WINDOW = 1 << 30  # as good as unlimited, and sums with positions stay int32
_PARTIAL_ELEMENTS = 8192  # of dpk and of dpv that one program accumulates: 64 KB of registers together
_PARTIAL_ROWS = 64  # queries in the unit that the partial sums are dealt in
_BLOCK_E = 128
_BLOCK_T = 16  # new tokens of a tile
_MOST_FUSED = _BLOCK_T  # new tokens that the decode kernel appends by itself
_MOST_SPLITS = 64


def forward(
    query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor | None, prompt_value: Tensor | None,
    gate: Tensor | None, sinks: Tensor | None, prompt_index: Tensor | None, key_bias: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, scale: float,
    softcap: float, window_left: int, window_right: int, tanh_gate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`zinit::forward_triton`."""
    query, key, value = (addressable(t) for t in (query, key, value))
    out = token_major_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    prompt = Prompt(prompt_key, prompt_value, gate)
    block_d, block_p = block_of(query.shape[3]), block_of(prompt.length)
    columns = query.shape[1] * num_sequences(query, cu_seqlens_q)
    sign, scale_log2 = _sign_and_size(scale)
    flags = {"HEAD_DIM": query.shape[3], "BLOCK_P": block_p, "TANH": tanh_gate, "SCALE_SIGN": sign}
    windows = _limit(window_left), _limit(window_right)
    key_of = _key(query, key, flags, windows, key_bias, cu_seqlens_q, max_seqlen_q, max_seqlen_k, columns)

    def launch(config: Config) -> None:
        zinit_forward_kernel[(triton.cdiv(max_seqlen_q, config.block_m) * columns,)](
            view_of(query), view_of(key), view_of(value), prompt.key, prompt.value, prompt.gate, prompt_index, key_bias,
            cu_seqlens_q, cu_seqlens_k, view_of(out), lse,
            query.shape[1], key.shape[1], max_seqlen_q, max_seqlen_k, query.shape[2], key.shape[2],
            *windows, prompt.length, prompt.rows, prompt.gate_stride, scale_log2, *_cap(abs(scale), softcap),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, **flags, **_resources(config),
        )  # fmt: skip

    if max_seqlen_q * columns:
        with torch.cuda.device_of(query), named("forward"):
            tuning.run(("forward", *key_of), _candidates("forward", query, block_d, block_p), launch)
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    prompt_key: Tensor | None, prompt_value: Tensor | None, gate: Tensor | None, sinks: Tensor | None,
    prompt_index: Tensor | None, key_bias: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, scale: float, softcap: float, window_left: int, window_right: int,
    tanh_gate: bool, needs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`zinit::backward_triton`. What is not wanted is neither allocated nor computed."""
    token_grads = [token_major_like(t) if needs >> i & 1 else None for i, t in enumerate((query, key, value))]
    prompt_grads = [
        torch.zeros_like(t, memory_format=torch.contiguous_format)
        if t is not None and needs >> i & 1
        else None
        for i, t in enumerate((prompt_key, prompt_value, gate), 3)
    ]
    grad_query, grad_key, grad_value = token_grads
    query, key, value, grad_out = (addressable(t) for t in (query, key, value, grad_out))
    prompt = Prompt(prompt_key, prompt_value, gate)
    sequences = num_sequences(query, cu_seqlens_q)
    heads_q, heads_kv = query.shape[1], key.shape[1]
    block_d, block_p = block_of(query.shape[3]), block_of(prompt.length)
    flags = {"HEAD_DIM": query.shape[3]}
    windows = _limit(window_left), _limit(window_right)
    lengths = (heads_q, heads_kv, max_seqlen_q, max_seqlen_k, query.shape[2], key.shape[2], *windows)
    scale_log2 = scale * LOG2E.value
    key_of = _key(
        query,
        key,
        flags,
        windows,
        key_bias,
        cu_seqlens_q,
        max_seqlen_q,
        max_seqlen_k,
        heads_q * sequences,
        needs,
    )
    has_queries, has_keys = (length * heads_q * sequences > 0 for length in (max_seqlen_q, max_seqlen_k))
    wants_delta = grad_query is not None or grad_key is not None
    delta = torch.empty_like(lse) if wants_delta else None

    def launch_key_value(config: Config) -> None:
        zinit_grad_key_value_kernel[(triton.cdiv(max_seqlen_k, config.block_n) * heads_kv * sequences,)](
            view_of(query), view_of(key), view_of(value), view_of(grad_out), lse, delta, key_bias, cu_seqlens_q,
            cu_seqlens_k, view_of(grad_key), view_of(grad_value), *lengths, scale, scale_log2, *_cap(scale, softcap),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, **flags, **_resources(config),
        )  # fmt: skip

    def launch_query(config: Config) -> None:
        zinit_grad_query_kernel[(triton.cdiv(max_seqlen_q, config.block_m) * heads_q * sequences,)](
            view_of(query), view_of(key), view_of(value), prompt.key, prompt.value, prompt.gate, prompt_index,
            view_of(grad_out), lse, delta, key_bias, cu_seqlens_q, cu_seqlens_k, view_of(grad_query),
            *lengths, prompt.length, prompt.rows, prompt.gate_stride, scale, scale_log2, *_cap(scale, softcap),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_P=block_p, TANH=tanh_gate, **flags,
            **_resources(config),
        )  # fmt: skip

    with torch.cuda.device_of(query):
        _prompt_gradients(
            grad_out, grad_lse, query, out, delta, prompt, prompt_index, cu_seqlens_q, prompt_grads, sequences,
            heads_kv, max_seqlen_q, scale, softcap, block_d, block_p, tanh_gate, key_of,
        )  # fmt: skip
        if has_keys and (grad_key is not None or grad_value is not None):
            with named("backward.key_value"):
                candidates = _candidates("grad_key_value", query, block_d, 16)
                tuning.run(("grad_key_value", *key_of), candidates, launch_key_value)
        if has_queries and grad_query is not None:
            with named("backward.query"):
                candidates = _candidates("grad_query", query, block_d, block_p)
                tuning.run(("grad_query", *key_of), candidates, launch_query)
    unwanted = query.new_empty((0,), dtype=torch.float32)
    return tuple(unwanted.clone() if grad is None else grad for grad in (*token_grads, *prompt_grads, None))


def _prompt_gradients(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, out: Tensor, delta: Tensor | None, prompt: Prompt,
    prompt_index: Tensor | None, cu_seqlens_q: Tensor | None, prompt_grads: list[Tensor | None], sequences: int,
    heads_kv: int, max_seqlen_q: int, scale: float, softcap: float, block_d: int, block_p: int, tanh_gate: bool,
    key_of: tuple[Any, ...],
) -> None:  # fmt: skip
    """Fills delta, where it is wanted, and the gradients of the prompts and the gate."""
    heads_q, head_dim = query.shape[1], query.shape[3]
    wants_prompt = prompt.gate is not None and any(grad is not None for grad in prompt_grads)
    if delta is None and not wants_prompt:
        return
    parts = num_parts(triton.cdiv(max_seqlen_q, _PARTIAL_ROWS), heads_q * sequences)
    slots, table = (sequences, heads_q, parts), (prompt.length, head_dim)
    partials = [
        None if not wants_prompt or grad is None else query.new_empty(slots + shape, dtype=torch.float32)
        for grad, shape in zip(prompt_grads, (table, table, ()), strict=True)
    ]
    wants_table = any(partial is not None for partial in partials[:2])
    chunk_d = min(block_d, _PARTIAL_ELEMENTS // block_p) if wants_table else block_d

    def launch(config: Config) -> None:
        zinit_partial_sums_kernel[(parts * (block_d // chunk_d) * heads_q * sequences,)](
            view_of(query), prompt.key, prompt.value, prompt.gate, prompt_index, cu_seqlens_q, view_of(out),
            view_of(grad_out), grad_lse, delta, *partials,
            heads_q, heads_kv, max_seqlen_q, query.shape[2], prompt.length, prompt.rows, prompt.gate_stride, parts,
            scale * LOG2E.value, *_cap(scale, softcap),
            HEAD_DIM=head_dim, BLOCK_M=config.block_m, BLOCK_P=block_p, CHUNK_D=chunk_d, TANH=tanh_gate,
            **_resources(config),
        )  # fmt: skip

    if heads_q * sequences:
        with named("backward.prompt_sums"):
            candidates = _candidates("prompt_gradients", query, block_d, block_p)
            tuning.run(("prompt_gradients", *key_of), candidates, launch)
    if wants_prompt:
        tiles = triton.cdiv(prompt.length * head_dim, _BLOCK_E)  # the kernel counts them so, wanted or not
        with named("backward.prompt_finish"):
            zinit_add_partials_kernel[(tiles * heads_kv * prompt.rows,)](
                *partials, prompt.gate, prompt_index, *prompt_grads,
                heads_q, heads_kv, sequences, prompt.length, prompt.rows, prompt.gate_rows, parts, scale,
                HEAD_DIM=head_dim, BLOCK_E=_BLOCK_E, BLOCK_S=16, TANH=tanh_gate, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip


def decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, new_key: Tensor | None, new_value: Tensor | None,
    prompt_key: Tensor | None, prompt_value: Tensor | None, gate: Tensor | None, sinks: Tensor | None,
    prompt_index: Tensor | None, cache_seqlens: Tensor, block_table: Tensor | None, rotary_cos: Tensor | None,
    rotary_sin: Tensor | None, rotary_interleaved: bool, scale: float, softcap: float, window_left: int,
    window_right: int, tanh_gate: bool, num_splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`zinit::decode_triton`. Reads nothing back from the device: safe to capture in a graph."""
    out = token_major_like(query := query.transpose(1, 2))
    key_cache, value_cache = key_cache.transpose(1, 2), value_cache.transpose(1, 2)
    new_key, new_value, prompt_key, prompt_value = (
        None if tensor is None else tensor.transpose(1, 2)
        for tensor in (new_key, new_value, prompt_key, prompt_value)
    )
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    sequences, heads_q, seqlen_q, head_dim = query.shape
    heads_kv = key_cache.shape[1]
    if new_key is not None and 0 in new_key.shape:
        new_key = new_value = None
    seqlen_new = 0 if new_key is None else new_key.shape[2]
    num_pages, page_size = key_cache.shape[0], key_cache.shape[2]
    capacity = page_size if block_table is None else page_size * block_table.shape[1]
    table_stride = 0 if block_table is None else block_table.stride(0)
    prompt = Prompt(prompt_key, prompt_value, gate)
    if rotary_cos is not None and rotary_sin is not None:
        rotary_cos, rotary_sin = rotary_cos.contiguous(), rotary_sin.contiguous()
    rotary_rows, half = (0, 0) if rotary_cos is None else rotary_cos.shape
    block_d, block_p = block_of(head_dim), block_of(prompt.length)
    cache_flags = {
        "HEAD_DIM": head_dim, "BLOCK_T": _BLOCK_T, "HALF": half, "INTERLEAVED": rotary_interleaved,
        "PAGE_SIZE": 1 if block_table is None else page_size,  # compile-time: no kernel per capacity
    }  # fmt: skip
    sign, scale_log2 = _sign_and_size(scale)
    flags = cache_flags | {
        "BLOCK_P": block_p,
        "TANH": tanh_gate,
        "SCALE_SIGN": sign,
        "ONE_TOKEN": seqlen_q == 1,
    }
    windows = _limit(window_left), _limit(window_right)
    rows = seqlen_q * (heads_q // heads_kv)
    columns = heads_kv * sequences
    # A long chunk is rotated once, by a launch of its own: in the decode kernel every tile of queries would do it.
    is_fused = new_key is not None and seqlen_new <= _MOST_FUSED and rows > 0
    fused_key, fused_value = (new_key, new_value) if is_fused else (None, None)

    def launch(config: Config) -> None:
        programs = triton.cdiv(rows, config.block_m) * columns
        splits = num_splits or choose_splits(
            programs, triton.cdiv(capacity, config.block_n), num_processors(query)
        )
        partial_out = partial_lse = None
        if splits > 1:
            partial_out = query.new_empty((splits, *query.shape), dtype=torch.float32)
            partial_lse = query.new_empty((splits, *query.shape[:3]), dtype=torch.float32)
        zinit_decode_kernel[(splits * programs,)](
            view_of(query), view_of(key_cache), view_of(value_cache), view_of(fused_key), view_of(fused_value),
            prompt.key, prompt.value, prompt.gate, prompt_index, cache_seqlens, block_table, rotary_cos, rotary_sin,
            view_of(out), lse, partial_out, partial_lse,
            heads_q, heads_kv, seqlen_q, seqlen_new, capacity, num_pages, table_stride, rotary_rows, half,
            *windows, prompt.length, prompt.rows, prompt.gate_stride, splits, scale_log2, *_cap(abs(scale), softcap),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, **flags, **_resources(config),
        )  # fmt: skip
        if partial_out is not None:
            combine = _candidates("combine", query, block_d, block_p)[0]
            zinit_combine_kernel[(triton.cdiv(rows, combine.block_m) * columns,)](
                partial_out, partial_lse, view_of(query), prompt.key, prompt.value, prompt.gate, prompt_index,
                cache_seqlens, rotary_cos, rotary_sin, view_of(out), lse,
                heads_q, heads_kv, seqlen_q, rotary_rows, half, prompt.length, prompt.rows, prompt.gate_stride, splits,
                scale * LOG2E.value, *_cap(scale, softcap),
                HEAD_DIM=head_dim, BLOCK_M=combine.block_m, BLOCK_P=block_p, HALF=half, INTERLEAVED=rotary_interleaved,
                ADVANCE=window_left >= 0 or window_right >= 0, TANH=tanh_gate, **_resources(combine),
            )  # fmt: skip

    with torch.cuda.device_of(query):
        if new_key is not None and not is_fused:
            with named("decode.append"):
                zinit_append_kernel[(triton.cdiv(seqlen_new, _BLOCK_T) * columns,)](
                    view_of(new_key), view_of(new_value), view_of(key_cache), view_of(value_cache), cache_seqlens,
                    block_table, rotary_cos, rotary_sin,
                    heads_kv, seqlen_new, capacity, num_pages, table_stride, rotary_rows, half,
                    **cache_flags, num_warps=4, enable_fp_fusion=True,
                )  # fmt: skip
        if rows * columns:
            key_of = _key(
                query,
                key_cache,
                flags,
                windows,
                block_table,
                fused_key,
                seqlen_q,
                capacity,
                columns,
                num_splits,
            )
            with named("decode"):
                stage = "decode" if seqlen_q == 1 else "extend"
                tuning.run((stage, *key_of), _candidates(stage, query, block_d, block_p), launch)
    return out.transpose(1, 2), lse


def num_parts(tiles: int, columns: int) -> int:
    """Into how many parts the query tiles are dealt for the partial sums; a function of the shape alone.

    Enough programs for every chip (512), and partials a thousandth of the queries they sum.
    """
    return max(1, min(tiles, triton.cdiv(512, max(columns, 1))))


def choose_splits(programs: int, key_blocks: int, processors: int) -> int:
    """Pieces of the keys: enough programs for two per multiprocessor, each with four blocks of keys or more.

    From the capacity of the cache alone: the lengths are on the device, and a captured graph keeps its grid.
    """
    return max(1, min(2 * processors // max(programs, 1), key_blocks // 4, _MOST_SPLITS))


def _limit(window: int) -> int | None:
    """One side of a window as the kernels take it: None where it is unlimited."""
    return None if window < 0 else min(window, _LONGEST_WINDOW)


def _sign_and_size(scale: float) -> tuple[int, float]:
    """The scale as forward and decode take it: its sign, and its size times log2(e), which is never 0."""
    if abs(scale) < 1e-37:  # 0, or so small that float32 may flush it
        return 0, 1.0
    return (1 if scale > 0 else -1), abs(scale) * LOG2E.value


def _cap(scale: float, softcap: float) -> tuple[float | None, float | None]:
    """A soft cap as the kernels take it: scale / softcap in float32's range, and softcap."""
    if not softcap:
        return None, None
    return max(-3e38, min(scale / softcap, 3e38)), softcap


def _resources(config: Config) -> dict[str, Any]:
    """Compiler options; fused multiply-adds are named because Triton 3.10 turns its default around."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return options | ({"maxnreg": config.max_registers} if config.max_registers else {})


def _candidates(stage: str, query: Tensor, block_d: int, block_p: int) -> tuple[Config, ...]:
    return configs.candidates(stage, block_d, block_p, query.element_size(), arch_of(query))


def _key(
    query: Tensor, key: Tensor, flags: dict[str, Any], windows: tuple[int | None, ...], bias: Tensor | None,
    packing: Tensor | None, seqlen_q: int, seqlen_k: int, columns: int, *rest: int,
) -> tuple[Any, ...]:  # fmt: skip
    """What the fastest candidate depends on: chip, dtype, what is compiled in, and lengths to a factor of two."""
    if not tuning.ENABLED:
        return ()
    sizes = (triton.next_power_of_2(size) for size in (seqlen_q, seqlen_k, columns))
    group = query.shape[1] // key.shape[1]
    limited = (window is None for window in windows)
    return (
        query.device,
        query.dtype,
        *flags.values(),
        *limited,
        group,
        bias is None,
        packing is None,
        *sizes,
        *rest,
    )
