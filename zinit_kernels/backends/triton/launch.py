"""From canonical tensors to kernel launches: allocations, grids, strides. Torch on the host side, no arithmetic."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import configs
from .backward import grad_key_value_kernel, grad_query_kernel
from .decode import append_kernel, combine_kernel, decode_kernel
from .forward import forward_kernel
from .primitives import LOG2E
from .prompt_gradients import add_partials_kernel, partial_sums_kernel

_LONGEST_WINDOW = 1 << 30  # as good as unlimited, and sums with positions stay int32
_PARTIAL_ELEMENTS = 8192  # of dpk and of dpv that one program accumulates: 64 KB of registers together
_BLOCK_E = 128
_BLOCK_T = 16
_MOST_SPLITS = 64
_LARGEST_TOKEN_STRIDE = 1 << 24  # offsets inside a tile of 128 rows stay int32


def forward(
    query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor | None, prompt_value: Tensor | None,
    gate: Tensor | None, prompt_index: Tensor | None, key_bias: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, scale: float, window_left: int,
    window_right: int, tanh_gate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`zinit::forward_triton`, see schemas.py."""
    query, key, value = (_addressable(t) for t in (query, key, value))
    out = token_major_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    sequences = num_sequences(query, cu_seqlens_q)
    prompt = Prompt(prompt_key, prompt_value, gate)
    block_d, block_p = block_of(query.shape[3]), block_of(prompt.length)
    config = configs.choose("forward", block_d, block_p, query.element_size(), arch_of(query))
    grid = (triton.cdiv(max_seqlen_q, config.block_m) * query.shape[1] * sequences,)
    if 0 in grid:
        return out, lse
    with torch.cuda.device_of(query):
        forward_kernel[grid](
            query, key, value, prompt.key, prompt.value, prompt.gate, prompt_index, key_bias, cu_seqlens_q,
            cu_seqlens_k,
            out, lse,
            strides_of(query), strides_of(key), strides_of(value), prompt.key_strides, prompt.value_strides,
            strides_of(out),
            query.shape[1], key.shape[1], max_seqlen_q, max_seqlen_k, query.shape[2], key.shape[2],
            min(window_left, _LONGEST_WINDOW), min(window_right, _LONGEST_WINDOW), prompt.length, prompt.rows,
            prompt.gate_stride, scale * LOG2E.value,
            HEAD_DIM=query.shape[3], BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_P=block_p,
            HAS_LEFT=window_left >= 0, HAS_RIGHT=window_right >= 0, TANH=tanh_gate,
            PRECISION=precision_of(query),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    prompt_key: Tensor | None, prompt_value: Tensor | None, gate: Tensor | None, prompt_index: Tensor | None,
    key_bias: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int, scale: float, window_left: int, window_right: int, tanh_gate: bool, needs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`zinit::backward_triton`, see schemas.py. What is not wanted is neither allocated nor computed."""
    token_grads = [token_major_like(t) if needs >> i & 1 else None for i, t in enumerate((query, key, value))]
    prompt_grads = [
        torch.zeros_like(t, memory_format=torch.contiguous_format)
        if t is not None and needs >> i & 1
        else None
        for i, t in enumerate((prompt_key, prompt_value, gate), 3)
    ]
    grad_query, grad_key, grad_value = token_grads
    query, key, value, grad_out = (_addressable(t) for t in (query, key, value, grad_out))
    prompt = Prompt(prompt_key, prompt_value, gate)
    sequences = num_sequences(query, cu_seqlens_q)
    heads_q, heads_kv, head_dim = query.shape[1], key.shape[1], query.shape[3]
    block_d, block_p = block_of(head_dim), block_of(prompt.length)
    arch, itemsize, precision = arch_of(query), query.element_size(), precision_of(query)
    windows = min(window_left, _LONGEST_WINDOW), min(window_right, _LONGEST_WINDOW)
    flags = {"HAS_LEFT": window_left >= 0, "HAS_RIGHT": window_right >= 0, "PRECISION": precision}
    lengths = (heads_q, heads_kv, max_seqlen_q, max_seqlen_k, query.shape[2], key.shape[2], *windows)
    scale_log2 = scale * LOG2E.value

    wants_delta = grad_query is not None or grad_key is not None
    wants_prompt = prompt.key is not None and any(grad is not None for grad in prompt_grads)
    delta = torch.empty_like(lse) if wants_delta else None
    with torch.cuda.device_of(query):
        if wants_delta or wants_prompt:
            config = configs.choose("prompt_gradients", block_d, block_p, itemsize, arch)
            tiles = triton.cdiv(max_seqlen_q, config.block_m)
            parts = num_parts(tiles, heads_q * sequences)
            slots, table = (sequences, heads_q, parts), (prompt.length, head_dim)
            partials = [
                None
                if not wants_prompt or grad is None
                else query.new_empty(slots + shape, dtype=torch.float32)
                for grad, shape in zip(prompt_grads, (table, table, ()), strict=True)
            ]
            wants_table = any(partial is not None for partial in partials[:2])
            chunk_d = min(block_d, _PARTIAL_ELEMENTS // block_p) if wants_table else block_d
            grid = (parts * (block_d // chunk_d) * heads_q * sequences,)
            if grid[0]:
                partial_sums_kernel[grid](
                    query, prompt.key, prompt.value, prompt.gate, prompt_index, cu_seqlens_q, out, grad_out,
                    grad_lse, delta, *partials,
                    strides_of(query), prompt.key_strides, prompt.value_strides, strides_of(out),
                    strides_of(grad_out),
                    heads_q, heads_kv, max_seqlen_q, query.shape[2], prompt.length, prompt.rows, prompt.gate_stride,
                    parts, scale_log2,
                    HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_P=block_p,
                    CHUNK_D=chunk_d, TANH=tanh_gate, PRECISION=precision,
                    num_warps=config.num_warps, num_stages=config.num_stages,
                )  # fmt: skip
            if wants_prompt:
                tiles = triton.cdiv(prompt.length * head_dim, _BLOCK_E) if wants_table else 1
                add_partials_kernel[(tiles * heads_kv * prompt.rows,)](
                    *partials, prompt.gate, prompt_index, *prompt_grads,
                    heads_q, heads_kv, sequences, prompt.length, prompt.rows, prompt.gate_rows, parts, scale,
                    HEAD_DIM=head_dim, BLOCK_E=_BLOCK_E, BLOCK_S=16, TANH=tanh_gate, num_warps=4,
                )  # fmt: skip
        if grad_key is not None or grad_value is not None:
            config = configs.choose("grad_key_value", block_d, 16, itemsize, arch)
            grid = (triton.cdiv(max_seqlen_k, config.block_n) * heads_kv * sequences,)
            if grid[0]:
                grad_key_value_kernel[grid](
                    query, key, value, grad_out, lse, delta, key_bias, cu_seqlens_q, cu_seqlens_k, grad_key,
                    grad_value,
                    strides_of(query), strides_of(key), strides_of(value), strides_of(grad_out),
                    strides_of(grad_key), strides_of(grad_value), *lengths, scale, scale_log2,
                    HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n, **flags,
                    num_warps=config.num_warps, num_stages=config.num_stages,
                )  # fmt: skip
        if grad_query is not None:
            config = configs.choose("grad_query", block_d, block_p, itemsize, arch)
            grid = (triton.cdiv(max_seqlen_q, config.block_m) * heads_q * sequences,)
            if grid[0]:
                grad_query_kernel[grid](
                    query, key, value, prompt.key, prompt.value, prompt.gate, prompt_index, grad_out, lse,
                    delta, key_bias,
                    cu_seqlens_q, cu_seqlens_k, grad_query,
                    strides_of(query), strides_of(key), strides_of(value), prompt.key_strides,
                    prompt.value_strides,
                    strides_of(grad_out), strides_of(grad_query), *lengths, prompt.length, prompt.rows,
                    prompt.gate_stride,
                    scale, scale_log2,
                    HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                    BLOCK_P=block_p,
                    TANH=tanh_gate, **flags, num_warps=config.num_warps, num_stages=config.num_stages,
                )  # fmt: skip
    unwanted = query.new_empty((0,), dtype=torch.float32)
    return tuple(unwanted.clone() if grad is None else grad for grad in (*token_grads, *prompt_grads))


def decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, new_key: Tensor | None, new_value: Tensor | None,
    prompt_key: Tensor | None, prompt_value: Tensor | None, gate: Tensor | None, prompt_index: Tensor | None,
    cache_seqlens: Tensor, block_table: Tensor | None, rotary_cos: Tensor | None, rotary_sin: Tensor | None,
    rotary_interleaved: bool, scale: float, window_left: int, window_right: int, tanh_gate: bool,
    num_splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`zinit::decode_triton`, see schemas.py. Reads nothing back from the device: safe to capture in a graph."""
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
    pages = 1 if block_table is None else page_size  # compile-time: no kernel per capacity
    table_stride = 0 if block_table is None else block_table.stride(0)
    prompt = Prompt(prompt_key, prompt_value, gate)
    if rotary_cos is not None and rotary_sin is not None:
        rotary_cos, rotary_sin = rotary_cos.contiguous(), rotary_sin.contiguous()
    rotary_rows, half = (0, 0) if rotary_cos is None else rotary_cos.shape
    block_d, block_p = block_of(head_dim), block_of(prompt.length)
    config = configs.choose("decode", block_d, block_p, query.element_size(), arch_of(query))
    tiles = triton.cdiv(seqlen_q * (heads_q // heads_kv), config.block_m)
    programs = tiles * heads_kv * sequences
    num_splits = num_splits or choose_splits(
        programs, triton.cdiv(capacity, config.block_n), num_processors(query)
    )
    partial_out = partial_lse = None
    if num_splits > 1:
        partial_out = query.new_empty((num_splits, *query.shape), dtype=torch.float32)
        partial_lse = query.new_empty((num_splits, *query.shape[:3]), dtype=torch.float32)
    rotary_flags = {"HALF": half, "INTERLEAVED": rotary_interleaved}
    flags = {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "TANH": tanh_gate, "PRECISION": precision_of(query)}
    with torch.cuda.device_of(query):
        if new_key is not None:
            append_kernel[(triton.cdiv(seqlen_new, _BLOCK_T) * heads_kv * sequences,)](
                new_key, new_value, key_cache, value_cache, cache_seqlens, block_table, rotary_cos, rotary_sin,
                strides_of(new_key), strides_of(new_value), strides_of(key_cache), strides_of(value_cache),
                heads_kv, seqlen_new, capacity, num_pages, table_stride, rotary_rows, half,
                HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_T=_BLOCK_T, PAGE_SIZE=pages, num_warps=4,
                **rotary_flags,
            )  # fmt: skip
        if programs:
            decode_kernel[(num_splits * programs,)](
                query, key_cache, value_cache, prompt.key, prompt.value, prompt.gate, prompt_index,
                cache_seqlens, block_table,
                rotary_cos, rotary_sin, out, lse, partial_out, partial_lse,
                strides_of(query), strides_of(key_cache), strides_of(value_cache), prompt.key_strides,
                prompt.value_strides,
                strides_of(out),
                heads_q, heads_kv, seqlen_q, seqlen_new, capacity, num_pages, table_stride, rotary_rows, half,
                min(window_left, _LONGEST_WINDOW), min(window_right, _LONGEST_WINDOW), prompt.length,
                prompt.rows,
                prompt.gate_stride, num_splits, scale * LOG2E.value,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_P=block_p,
                PAGE_SIZE=pages, HAS_LEFT=window_left >= 0, HAS_RIGHT=window_right >= 0, **flags,
                **rotary_flags,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
        if programs and partial_out is not None:
            combine = configs.choose("combine", block_d, block_p, query.element_size(), arch_of(query))
            combine_programs = (
                triton.cdiv(seqlen_q * (heads_q // heads_kv), combine.block_m) * heads_kv * sequences
            )
            combine_kernel[(combine_programs,)](
                partial_out, partial_lse, query, prompt.key, prompt.value, prompt.gate, prompt_index,
                cache_seqlens,
                rotary_cos, rotary_sin, out, lse,
                strides_of(query), prompt.key_strides, prompt.value_strides, strides_of(out),
                heads_q, heads_kv, seqlen_q, rotary_rows, half, prompt.length, prompt.rows,
                prompt.gate_stride, num_splits,
                scale * LOG2E.value,
                BLOCK_M=combine.block_m, BLOCK_P=block_p, ADVANCE=window_left >= 0 or window_right >= 0,
                **flags, **rotary_flags, num_warps=combine.num_warps, num_stages=combine.num_stages,
            )  # fmt: skip
    return out.transpose(1, 2), lse


class Prompt:
    """A prompt table as kernels take it; without rows or prompts its pointers are None."""

    def __init__(self, key: Tensor | None, value: Tensor | None, gate: Tensor | None) -> None:
        self.key = self.value = self.gate = None
        self.key_strides = self.value_strides = (0, 0, 0)
        self.length = self.rows = self.gate_rows = self.gate_stride = 0
        if key is None or value is None or gate is None or 0 in (key.shape[0], key.shape[2]):
            return
        self.key, self.value, self.gate = key, value, gate.contiguous()
        self.key_strides, self.value_strides = strides_of(key), strides_of(value)
        self.rows, self.length = key.shape[0], key.shape[2]
        self.gate_rows = gate.shape[0]
        self.gate_stride = gate.shape[1] if gate.shape[0] > 1 else 0


def token_major_like(tensor: Tensor) -> Tensor:
    batch, heads, seqlen, head_dim = tensor.shape
    return tensor.new_empty((batch, seqlen, heads, head_dim)).transpose(1, 2)


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


def strides_of(tensor: Tensor | None) -> tuple[int, int, int]:
    if tensor is None:
        return (0, 0, 0)
    return tensor.stride()[:3]  # type: ignore[return-value]


def num_sequences(query: Tensor, cu_seqlens: Tensor | None) -> int:
    return query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def block_of(size: int) -> int:
    """The power of two that holds `size`, at least what one tensor core product takes."""
    return max(16, triton.next_power_of_2(size))


def arch_of(tensor: Tensor) -> int:
    """10 * major + minor of the tensor's chip; 0 under the interpreter."""
    if tensor.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def num_processors(tensor: Tensor) -> int:
    """Streaming multiprocessors of the tensor's chip; of an imagined small one under the interpreter."""
    if tensor.device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def precision_of(tensor: Tensor) -> str:
    """float32 products stay float32, as eager PyTorch's are by default."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


def _addressable(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(2) < _LARGEST_TOKEN_STRIDE else tensor.contiguous()
