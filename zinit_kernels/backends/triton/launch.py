"""From canonical tensors to kernel launches: allocations, grids, strides. Torch on the host side, no arithmetic."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import configs, tuning
from .backward import grad_key_value_kernel, grad_query_kernel
from .configs import Config, block_of
from .decode import append_kernel, combine_kernel, decode_kernel
from .forward import forward_kernel
from .operands import (
    Prompt,
    addressable,
    arch_of,
    num_processors,
    num_sequences,
    precision_of,
    strides_of,
    token_major_like,
)
from .primitives import LOG2E
from .prompt_gradients import add_partials_kernel, partial_sums_kernel
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
    gate: Tensor | None, prompt_index: Tensor | None, key_bias: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, scale: float, window_left: int,
    window_right: int, tanh_gate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`zinit::forward_triton`."""
    query, key, value = (addressable(t) for t in (query, key, value))
    out = token_major_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    prompt = Prompt(prompt_key, prompt_value, gate)
    block_d, block_p = block_of(query.shape[3]), block_of(prompt.length)
    columns = query.shape[1] * num_sequences(query, cu_seqlens_q)
    flags = _flags(query, window_left, window_right) | {
        "BLOCK_D": block_d,
        "BLOCK_P": block_p,
        "TANH": tanh_gate,
    }
    key_of = _key(query, key, flags, key_bias, cu_seqlens_q, max_seqlen_q, max_seqlen_k, columns)

    def launch(config: Config) -> None:
        forward_kernel[(triton.cdiv(max_seqlen_q, config.block_m) * columns,)](
            query, key, value, prompt.key, prompt.value, prompt.gate, prompt_index, key_bias, cu_seqlens_q,
            cu_seqlens_k, out, lse,
            strides_of(query), strides_of(key), strides_of(value), prompt.key_strides, prompt.value_strides,
            strides_of(out),
            query.shape[1], key.shape[1], max_seqlen_q, max_seqlen_k, query.shape[2], key.shape[2],
            min(window_left, _LONGEST_WINDOW), min(window_right, _LONGEST_WINDOW), prompt.length, prompt.rows,
            prompt.gate_stride, scale * LOG2E.value,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, **flags, **_resources(config),
        )  # fmt: skip

    if max_seqlen_q * columns:
        with torch.cuda.device_of(query), named("forward"):
            tuning.run(("forward", *key_of), _candidates("forward", query, block_d, block_p), launch)
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    prompt_key: Tensor | None, prompt_value: Tensor | None, gate: Tensor | None, prompt_index: Tensor | None,
    key_bias: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int, scale: float, window_left: int, window_right: int, tanh_gate: bool, needs: int,
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
    flags = _flags(query, window_left, window_right) | {"BLOCK_D": block_d}
    windows = min(window_left, _LONGEST_WINDOW), min(window_right, _LONGEST_WINDOW)
    lengths = (heads_q, heads_kv, max_seqlen_q, max_seqlen_k, query.shape[2], key.shape[2], *windows)
    scale_log2 = scale * LOG2E.value
    key_of = _key(
        query, key, flags, key_bias, cu_seqlens_q, max_seqlen_q, max_seqlen_k, heads_q * sequences, needs
    )
    has_queries, has_keys = (length * heads_q * sequences > 0 for length in (max_seqlen_q, max_seqlen_k))
    wants_delta = grad_query is not None or grad_key is not None
    delta = torch.empty_like(lse) if wants_delta else None

    def launch_key_value(config: Config) -> None:
        grad_key_value_kernel[(triton.cdiv(max_seqlen_k, config.block_n) * heads_kv * sequences,)](
            query, key, value, grad_out, lse, delta, key_bias, cu_seqlens_q, cu_seqlens_k, grad_key, grad_value,
            strides_of(query), strides_of(key), strides_of(value), strides_of(grad_out), strides_of(grad_key),
            strides_of(grad_value), *lengths, scale, scale_log2,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, **flags, **_resources(config),
        )  # fmt: skip

    def launch_query(config: Config) -> None:
        grad_query_kernel[(triton.cdiv(max_seqlen_q, config.block_m) * heads_q * sequences,)](
            query, key, value, prompt.key, prompt.value, prompt.gate, prompt_index, grad_out, lse, delta, key_bias,
            cu_seqlens_q, cu_seqlens_k, grad_query,
            strides_of(query), strides_of(key), strides_of(value), prompt.key_strides, prompt.value_strides,
            strides_of(grad_out), strides_of(grad_query), *lengths, prompt.length, prompt.rows, prompt.gate_stride,
            scale, scale_log2,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_P=block_p, TANH=tanh_gate, **flags,
            **_resources(config),
        )  # fmt: skip

    with torch.cuda.device_of(query):
        _prompt_gradients(
            grad_out, grad_lse, query, out, delta, prompt, prompt_index, cu_seqlens_q, prompt_grads, sequences,
            heads_kv, max_seqlen_q, scale, block_d, block_p, tanh_gate, key_of,
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
    return tuple(unwanted.clone() if grad is None else grad for grad in (*token_grads, *prompt_grads))


def _prompt_gradients(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, out: Tensor, delta: Tensor | None, prompt: Prompt,
    prompt_index: Tensor | None, cu_seqlens_q: Tensor | None, prompt_grads: list[Tensor | None], sequences: int,
    heads_kv: int, max_seqlen_q: int, scale: float, block_d: int, block_p: int, tanh_gate: bool,
    key_of: tuple[Any, ...],
) -> None:  # fmt: skip
    """Fills delta, where it is wanted, and the gradients of the prompts and the gate."""
    heads_q, head_dim = query.shape[1], query.shape[3]
    wants_prompt = prompt.key is not None and any(grad is not None for grad in prompt_grads)
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
        partial_sums_kernel[(parts * (block_d // chunk_d) * heads_q * sequences,)](
            query, prompt.key, prompt.value, prompt.gate, prompt_index, cu_seqlens_q, out, grad_out, grad_lse, delta,
            *partials,
            strides_of(query), prompt.key_strides, prompt.value_strides, strides_of(out), strides_of(grad_out),
            heads_q, heads_kv, max_seqlen_q, query.shape[2], prompt.length, prompt.rows, prompt.gate_stride, parts,
            scale * LOG2E.value,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_P=block_p, CHUNK_D=chunk_d,
            TANH=tanh_gate, PRECISION=precision_of(query), **_resources(config),
        )  # fmt: skip

    if heads_q * sequences:
        with named("backward.prompt_sums"):
            candidates = _candidates("prompt_gradients", query, block_d, block_p)
            tuning.run(("prompt_gradients", *key_of), candidates, launch)
    if wants_prompt:
        tiles = triton.cdiv(prompt.length * head_dim, _BLOCK_E) if wants_table else 1
        with named("backward.prompt_finish"):
            add_partials_kernel[(tiles * heads_kv * prompt.rows,)](
                *partials, prompt.gate, prompt_index, *prompt_grads,
                heads_q, heads_kv, sequences, prompt.length, prompt.rows, prompt.gate_rows, parts, scale,
                HEAD_DIM=head_dim, BLOCK_E=_BLOCK_E, BLOCK_S=16, TANH=tanh_gate, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip


def decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, new_key: Tensor | None, new_value: Tensor | None,
    prompt_key: Tensor | None, prompt_value: Tensor | None, gate: Tensor | None, prompt_index: Tensor | None,
    cache_seqlens: Tensor, block_table: Tensor | None, rotary_cos: Tensor | None, rotary_sin: Tensor | None,
    rotary_interleaved: bool, scale: float, window_left: int, window_right: int, tanh_gate: bool,
    num_splits: int,
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
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_T": _BLOCK_T, "HALF": half, "INTERLEAVED": rotary_interleaved,
        "PAGE_SIZE": 1 if block_table is None else page_size,  # compile-time: no kernel per capacity
    }  # fmt: skip
    flags = _flags(query, window_left, window_right) | cache_flags | {"BLOCK_P": block_p, "TANH": tanh_gate}
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
        decode_kernel[(splits * programs,)](
            query, key_cache, value_cache, fused_key, fused_value, prompt.key, prompt.value, prompt.gate, prompt_index,
            cache_seqlens, block_table, rotary_cos, rotary_sin, out, lse, partial_out, partial_lse,
            strides_of(query), strides_of(key_cache), strides_of(value_cache), strides_of(fused_key),
            strides_of(fused_value), prompt.key_strides, prompt.value_strides, strides_of(out),
            heads_q, heads_kv, seqlen_q, seqlen_new, capacity, num_pages, table_stride, rotary_rows, half,
            min(window_left, _LONGEST_WINDOW), min(window_right, _LONGEST_WINDOW), prompt.length, prompt.rows,
            prompt.gate_stride, splits, scale * LOG2E.value,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, **flags, **_resources(config),
        )  # fmt: skip
        if partial_out is not None:
            combine = _candidates("combine", query, block_d, block_p)[0]
            combine_kernel[(triton.cdiv(rows, combine.block_m) * columns,)](
                partial_out, partial_lse, query, prompt.key, prompt.value, prompt.gate, prompt_index, cache_seqlens,
                rotary_cos, rotary_sin, out, lse,
                strides_of(query), prompt.key_strides, prompt.value_strides, strides_of(out),
                heads_q, heads_kv, seqlen_q, rotary_rows, half, prompt.length, prompt.rows, prompt.gate_stride, splits,
                scale * LOG2E.value,
                HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=combine.block_m, BLOCK_P=block_p, HALF=half,
                INTERLEAVED=rotary_interleaved, ADVANCE=window_left >= 0 or window_right >= 0, TANH=tanh_gate,
                PRECISION=precision_of(query), **_resources(combine),
            )  # fmt: skip

    with torch.cuda.device_of(query):
        if new_key is not None and not is_fused:
            with named("decode.append"):
                append_kernel[(triton.cdiv(seqlen_new, _BLOCK_T) * columns,)](
                    new_key, new_value, key_cache, value_cache, cache_seqlens, block_table, rotary_cos, rotary_sin,
                    strides_of(new_key), strides_of(new_value), strides_of(key_cache), strides_of(value_cache),
                    heads_kv, seqlen_new, capacity, num_pages, table_stride, rotary_rows, half,
                    **cache_flags, num_warps=4, enable_fp_fusion=True,
                )  # fmt: skip
        if rows * columns:
            key_of = _key(
                query, key_cache, flags, block_table, fused_key, seqlen_q, capacity, columns, num_splits
            )
            with named("decode"):
                tuning.run(("decode", *key_of), _candidates("decode", query, block_d, block_p), launch)
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


def _flags(query: Tensor, window_left: int, window_right: int) -> dict[str, Any]:
    """Compile-time arguments that the token kernels share."""
    return {
        "HEAD_DIM": query.shape[3], "HAS_LEFT": window_left >= 0, "HAS_RIGHT": window_right >= 0,
        "PRECISION": precision_of(query),
    }  # fmt: skip


def _resources(config: Config) -> dict[str, Any]:
    """Compiler options; fused multiply-adds are named because Triton 3.10 turns its default around."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def _candidates(stage: str, query: Tensor, block_d: int, block_p: int) -> tuple[Config, ...]:
    return configs.candidates(stage, block_d, block_p, query.element_size(), arch_of(query))


def _key(
    query: Tensor, key: Tensor, flags: dict[str, Any], bias: Tensor | None, packing: Tensor | None, seqlen_q: int,
    seqlen_k: int, columns: int, *rest: int,
) -> tuple[Any, ...]:  # fmt: skip
    """What the fastest candidate depends on: chip, dtype, what is compiled in, and lengths to a factor of two."""
    if not tuning.ENABLED:
        return ()
    sizes = (triton.next_power_of_2(size) for size in (seqlen_q, seqlen_k, columns))
    group = query.shape[1] // key.shape[1]
    return query.device, query.dtype, *flags.values(), group, bias is None, packing is None, *sizes, *rest
