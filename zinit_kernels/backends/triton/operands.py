"""What the kernels take of a call: pointers with strides, sizes and windows by the kernels' own names, the chip."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ...call import CacheCall, Call
from .. import fused
from .configs import block_of

Operands: TypeAlias = dict[str, Any]  # what kernels take, by the names of their parameters
_LARGEST_TOKEN_STRIDE = 1 << 24  # offsets inside a tile of 128 rows stay int32
_LONGEST_WINDOW = 1 << 30  # as good as unlimited, and sums with positions stay int32


class View(NamedTuple):
    """A [batch, head, token, D] tensor and the strides of its first three dimensions; None is an absent tensor."""

    ptr: Tensor | None
    batch: int
    head: int
    token: int


def view_of(tensor: Tensor | None) -> View:
    return View(None, 0, 0, 0) if tensor is None else View(tensor, *tensor.stride()[:3])


def query_operands(call: Call) -> Operands:
    """The queries of whole sequences, and how many heads there are."""
    return {
        "query": view_of(addressable(call.query)),
        "cu_seqlens_q_ptr": call.cu_seqlens_q,
        "num_heads_q": call.query.shape[1],
        "num_heads_kv": call.key.shape[1],
        "seqlen_q": call.max_seqlen_q,
        "total_q": call.query.shape[2],
        "HEAD_DIM": call.query.shape[3],
    }


def key_operands(call: Call) -> Operands:
    """The keys and values of whole sequences, and who sees them."""
    return {
        "key": view_of(addressable(call.key)),
        "value": view_of(addressable(call.value)),
        "sinks_ptr": call.sinks,
        "key_bias_ptr": call.key_bias,
        "cu_seqlens_k_ptr": call.cu_seqlens_k,
        "seqlen_k": call.max_seqlen_k,
        "total_k": call.key.shape[2],
        **window_operands(call),
    }


def prompt_operands(call: Call | CacheCall) -> Operands:
    """The prompt table of a head-major call; without rows or prompts its pointers are None."""
    key, value, gate = call.prompt_key, call.prompt_value, call.gate
    if has_no_prompts(call):
        key = value = gate = None
    rows, length = (0, 0) if key is None else (key.shape[0], key.shape[2])
    return {
        "prompt_key": view_of(key),
        "prompt_value": view_of(value),
        "gate_ptr": gate,
        "prompt_index_ptr": call.prompt_index,
        "prompt_length": length,
        "prompt_rows": rows,
        "gate_rows": 0 if gate is None else gate.shape[0],
        "gate_stride": 0 if gate is None or gate.shape[0] == 1 else gate.shape[1],
        "BLOCK_P": block_of(length),
        "TANH": call.tanh_gate,
    }


def has_no_prompts(call: Call | CacheCall) -> bool:
    """Whether a head-major call has no prompt branch, or a table without rows or prompts."""
    key = call.prompt_key
    return key is None or call.prompt_value is None or call.gate is None or 0 in (key.shape[0], key.shape[2])


def window_operands(call: Call | CacheCall) -> Operands:
    """Both sides of the window; None where a side is unlimited."""
    sides = {"window_left": call.window_left, "window_right": call.window_right}
    return {name: None if side < 0 else min(side, _LONGEST_WINDOW) for name, side in sides.items()}


def cache_operands(call: CacheCall) -> Operands:
    """The caches of a head-major call, where their keys stand, and the rotary tables."""
    num_pages, num_heads_kv, page_size, head_dim = call.key_cache.shape
    table = call.block_table
    rotary_rows, half = (0, 0) if call.rotary_cos is None else call.rotary_cos.shape
    return {
        "key_cache": view_of(call.key_cache),
        "value_cache": view_of(call.value_cache),
        "sinks_ptr": call.sinks,
        "cache_seqlens_ptr": call.cache_seqlens,
        "cache_leftpad_ptr": call.cache_leftpad,
        "block_table_ptr": table,
        "cos_ptr": call.rotary_cos,
        "sin_ptr": call.rotary_sin,
        "num_heads_kv": num_heads_kv,
        "seqlen_new": 0 if call.new_key is None else call.new_key.shape[2],
        "capacity": page_size if table is None else page_size * table.shape[1],
        "num_pages": num_pages,
        "table_stride": 0 if table is None else table.stride(0),
        "rotary_rows": rotary_rows,
        "rotary_stride": half,
        "HEAD_DIM": head_dim,
        "PAGE_SIZE": 1
        if table is None
        else page_size,  # compiled in: a kernel per page size, none per capacity
        "HALF": half,
        "INTERLEAVED": call.rotary_interleaved,
        **window_operands(call),
    }


def addressable(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(2) < _LARGEST_TOKEN_STRIDE else tensor.contiguous()


def arch_of(tensor: Tensor) -> int:
    """10 * major + minor of the tensor's chip; 0 under the interpreter, and on AMD chips, which nobody has tried."""
    return fused.arch_of(tensor.device)


def num_processors(tensor: Tensor) -> int:
    """Streaming multiprocessors of the tensor's chip; of an imagined small one under the interpreter."""
    if tensor.device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
