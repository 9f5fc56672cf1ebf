"""The checks behind the error messages: of shapes, dtypes and devices, and of the values that point into memory.

All but `check_values` look at metadata alone, so they cost no synchronisation and trace under torch.compile.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .calls import CacheCall, Call

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ON_DEVICES_TOO = os.environ.get("ZINIT_CHECK") == "1"


def has_values(tensor: Tensor) -> bool:
    """Whether it can be read: not while torch.compile or a torch.func transform looks on, and fake and meta tensors
    hold nothing."""
    if torch.compiler.is_compiling() or is_transforming():
        return False
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def is_transforming() -> bool:
    """Whether a torch.func transform (vmap, grad, jvp) is on."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def check_values(call: Call | CacheCall) -> None:
    """The checks that must read tensors, for eager calls on host memory; the native kernels do the same ones.

    On a device they would wait for it, so there they run with ZINIT_CHECK=1 alone; without, kernels clamp.
    """
    if not has_values(call.query) or (call.query.device.type != "cpu" and not _ON_DEVICES_TOO):
        return
    if call.prompt_index is not None and call.prompt_key is not None and len(call.prompt_index):
        low, high, rows = int(call.prompt_index.min()), int(call.prompt_index.max()), call.prompt_key.shape[0]
        if low < -1 or high >= rows:
            raise ValueError(
                f"prompt_index must lie in -1 (no prompt) .. {rows - 1}, the rows of the prompt table, got "
                f"{low if low < -1 else high}"
            )
    if isinstance(call, CacheCall):
        _check_cache_values(call)
    elif call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        _check_cumulative(
            "cu_seqlens_q", call.cu_seqlens_q, call.query.shape[2], call.max_seqlen_q, "max_seqlen_q"
        )
        _check_cumulative(
            "cu_seqlens_k", call.cu_seqlens_k, call.key.shape[2], call.max_seqlen_k, "max_seqlen_k"
        )


def _check_cache_values(call: CacheCall) -> None:
    appended = 0 if call.new_key is None else call.new_key.shape[1]
    page_size = call.key_cache.shape[1]
    capacity = page_size if call.block_table is None else page_size * call.block_table.shape[1]
    for sequence, seqlen in enumerate(call.cache_seqlens.tolist()):
        if seqlen < 0 or seqlen + appended > capacity:
            raise ValueError(
                f"cache_seqlens[{sequence}] = {seqlen} plus {appended} new tokens must lie in 0 .. {capacity}, "
                "the capacity of the cache: make the cache longer (or give the sequence more pages)"
            )
        if call.block_table is not None:
            used = call.block_table[sequence, : -(-(seqlen + appended) // page_size)]
            if len(used) and (int(used.min()) < 0 or int(used.max()) >= call.key_cache.shape[0]):
                raise ValueError(
                    f"block_table[{sequence}] names pages {used.tolist()}, the pool has {call.key_cache.shape[0]} pages"
                )
        if (
            call.rotary_cos is not None
            and seqlen + max(appended, call.query.shape[1]) > call.rotary_cos.shape[0]
        ):
            raise ValueError(
                f"rotary_cos has {call.rotary_cos.shape[0]} positions, sequence {sequence} needs "
                f"{seqlen + max(appended, call.query.shape[1])}"
            )


def _check_cumulative(name: str, cu_seqlens: Tensor, total: int, longest: int, longest_name: str) -> None:
    lengths = cu_seqlens.diff().tolist()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total or min(lengths, default=0) < 0:
        raise ValueError(
            f"{name} must start at 0, never decrease and end at the {total} packed rows, got {cu_seqlens.tolist()}"
        )
    if max(lengths, default=0) > longest:
        raise ValueError(
            f"{longest_name} must be at least the longest sequence, {max(lengths)}, got {longest}"
        )


def check_tensor(name: str, tensor: Tensor, dims: int, layout: str, like: Tensor | None = None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided:
        came = "a nested one" if tensor.is_nested else tensor.layout
        raise TypeError(
            f"{name} must be a dense tensor {layout}, got {came}: use .to_dense(), or for sequences of several lengths "
            "zero_init_attention_varlen"
        )
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions {layout}, got shape {tuple(tensor.shape)}")
    if like is None:
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}: cast it with {name}.to(...)"
            )
        if tensor.shape[-1] == 0:
            raise ValueError(f"{name} must have a head_dim of at least 1, got shape {tuple(tensor.shape)}")
        return
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{name} must have the query's dtype {like.dtype}, got {tensor.dtype}: cast one of the two"
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on the query's device {like.device}, got {tensor.device}: move one of the two"
        )


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], free: tuple[int, ...] = ()) -> None:
    """free: dimensions whose size is the tensor's own, spelled * in the message."""
    if tensor.shape != expected:
        words = ["*" if i in free else size for i, size in enumerate(expected)]
        raise ValueError(f"{name} must have shape {spell(words)}, got {tuple(tensor.shape)}")


def spell(sizes: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"


def check_groups(heads_q: int, heads_kv: int, seqlen_q: int, name: str, layout: str) -> None:
    if heads_kv == 0 or heads_q % heads_kv != 0:
        hint = ""
        if heads_kv and seqlen_q % heads_kv == 0 and seqlen_q:
            hint = f"; are heads and tokens swapped? The layout here is {layout}"
        raise ValueError(
            f"the {heads_q} heads of {name} must be a multiple of the {heads_kv} key/value heads{hint}"
        )


def check_written(name: str, cache: Tensor) -> None:
    """What writing into a cache in place needs of it."""
    if cache.stride(3) != 1 and cache.shape[3] > 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, because it is written in place; got strides "
            f"{cache.stride()}"
        )
    if cache.requires_grad:
        raise ValueError(f"{name} requires grad, but the cache function writes in place and has no backward")


def overlaps(tensor: Tensor) -> bool:
    """Whether it is an expanded tensor: one place in memory stands for several of its elements."""
    return any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def as_rotary(cos: Tensor | None, sin: Tensor | None, q: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    if cos is None or sin is None:
        raise ValueError("rotary_cos and rotary_sin must be given together, or neither")
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not isinstance(table, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(table).__name__}")
        if (
            table.dim() != 2
            or table.shape != cos.shape
            or 2 * table.shape[1] > head_dim
            or not table.is_floating_point()
        ):
            raise ValueError(
                f"{name} must be a floating-point table [max positions, rotary_dim / 2] with rotary_dim <= {head_dim}, "
                f"the same shape as its pair, got {tuple(table.shape)} of {table.dtype}"
            )
        if table.device != q.device:
            raise ValueError(f"{name} must be on the query's device {q.device}, got {table.device}")
    # kernels read tables of one dtype, and of none that is wider than what they compute in
    dtype = torch.promote_types(q.dtype, torch.float32)
    if cos.dtype == sin.dtype and cos.dtype in DTYPES[:3]:
        dtype = cos.dtype
    return cos.to(dtype).contiguous(), sin.to(dtype).contiguous()


def as_int32(name: str, tensor: Tensor, dims: int, like: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
        came = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be an int32 tensor, got {came}")
    if tensor.dim() != dims:
        raise ValueError(
            f"{name} must have {dims} dimension{'s' * (dims > 1)}, got shape {tuple(tensor.shape)}"
        )
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the query's device {like.device}, got {tensor.device}")
    if tensor.dtype == torch.int32:
        return tensor.contiguous()
    if tensor.device.type == "cpu" and tensor.numel() and has_values(tensor):
        low, high = int(tensor.min()), int(tensor.max())
        if low < -(2**31) or high >= 2**31:
            raise ValueError(f"{name} must fit into int32, got {low if low < -(2**31) else high}")
    return tensor.to(torch.int32).contiguous()


def as_int(name: str, number: SupportsIndex) -> int:
    if torch.compiler.is_compiling():
        return number  # type: ignore[return-value]  # may be symbolic
    try:
        integer = operator.index(number)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {number!r}") from None
    if not -(2**63) <= integer < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got {number}")
    return integer
