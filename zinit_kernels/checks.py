"""The checks behind the error messages: of shapes, dtypes and devices, and of the values that point into memory.

All but `check_values` look at metadata alone, so they cost no synchronisation and trace under torch.compile.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from .call import FLOATS, PLAIN_TYPES, AnyCall, CacheCall, PromptCall, has_values

DTYPES = (*FLOATS, torch.float64)
_ON_DEVICES_TOO = os.environ.get("ZINIT_CHECK") == "1"


def check_values(call: AnyCall) -> None:
    """The checks that must read tensors. The native CPU kernels make the same ones.

    On a device they would stall it, so there they run only with ZINIT_CHECK=1; without it, kernels clamp.
    """
    if not may_look_at(call.query):
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
    elif isinstance(call, PromptCall):
        _check_cumulative("cu_seqlens", call.cu_seqlens, call.query.shape[2], call.max_seqlen, "max_seqlen")
    else:
        _check_cumulative(
            "cu_seqlens_q", call.cu_seqlens_q, call.query.shape[2], call.max_seqlen_q, "max_seqlen_q"
        )
        _check_cumulative(
            "cu_seqlens_k", call.cu_seqlens_k, call.key.shape[2], call.max_seqlen_k, "max_seqlen_k"
        )


def may_look_at(tensor: Tensor) -> bool:
    """Whether a check may read the tensor: it has values, and no device stalls for them (ZINIT_CHECK=1: it may)."""
    return has_values(tensor) and (tensor.device.type == "cpu" or _ON_DEVICES_TOO)


def _check_cache_values(call: CacheCall) -> None:
    appended = 0 if call.new_key is None else call.new_key.shape[1]
    page_size = call.key_cache.shape[1]
    capacity = page_size if call.block_table is None else page_size * call.block_table.shape[1]
    # without a causal mask or a window all queries are rotated at one position
    queries = call.query.shape[1]
    rotated = max(appended, min(queries, 1) if call.window_left == call.window_right == -1 else queries)
    for sequence, seqlen in enumerate(call.cache_seqlens.tolist()):
        if seqlen < 0 or seqlen + appended > capacity:
            raise ValueError(
                f"cache_seqlens[{sequence}] = {seqlen} plus {appended} new tokens must lie in 0 .. {capacity}, "
                "the capacity of the cache: make the cache longer (or give the sequence more pages)"
            )
        if call.cache_leftpad is not None and not 0 <= int(call.cache_leftpad[sequence]) <= seqlen:
            raise ValueError(
                f"cache_leftpad[{sequence}] = {int(call.cache_leftpad[sequence])} must lie in 0 .. {seqlen}, the "
                "sequence's cache_seqlens, which count the padding too"
            )
        if call.block_table is not None:
            used = call.block_table[sequence, : -(-(seqlen + appended) // max(page_size, 1))]
            if len(used) and (int(used.min()) < 0 or int(used.max()) >= call.key_cache.shape[0]):
                raise ValueError(
                    f"block_table[{sequence}] names pages {used.tolist()}, the pool has {call.key_cache.shape[0]} pages"
                )
        if call.rotary_cos is not None and rotated and seqlen + rotated > call.rotary_cos.shape[0]:
            raise ValueError(
                f"rotary_cos has {call.rotary_cos.shape[0]} positions, sequence {sequence} needs {seqlen + rotated}"
            )


def _check_cumulative(
    name: str, cu_seqlens: Tensor | None, total: int, longest: int, longest_name: str
) -> None:
    if cu_seqlens is None:
        return
    lengths = cu_seqlens.diff().tolist()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total or min(lengths, default=0) < 0:
        raise ValueError(
            f"{name} must start at 0, never decrease and end at the {total} packed rows, got {cu_seqlens.tolist()}"
        )
    if max(lengths, default=0) > longest:
        raise ValueError(
            f"{longest_name} must be at least the longest sequence, {max(lengths)}, got {longest}"
        )


def check_storage(**given: Any) -> None:
    """Checks that each tensor is what its storage says, and that all are on the first one's device.

    A subclass that overrides what operators do may hold anything in its storage:
    `torch.nn.attention.bias.CausalBias` holds nothing. The names are those of the public function.
    """
    device = None
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_nested or tensor.layout != torch.strided:
            came = "a nested one" if tensor.is_nested else tensor.layout
            raise TypeError(
                f"{name} must be a dense tensor, got {came}: use .to_dense(), or for sequences of several lengths "
                "zero_init_attention_varlen"
            )
        kind = type(tensor)
        if kind not in PLAIN_TYPES and not _is_what_it_stores(kind):
            advice = _ADVICE.get(kind.__name__, "pass the plain torch.Tensor that it stands for")
            raise TypeError(
                f"{name} must be a plain tensor, got a {kind.__qualname__}, a subclass with its own meaning of what "
                f"operators do with it: {advice}"
            )
        device = device or tensor.device
        if tensor.device != device:
            raise ValueError(
                f"{name} must be on the query's device {device}, got {tensor.device}: move one of the two"
            )


_ADVICE = {
    "CausalBias": "it goes into zero_init_attention's attn_mask only",
    "DTensor": "pass .to_local(), the heads or the sequences of this process, or .full_tensor()",
    "MaskedTensor": "pass .get_data(), and its mask as attn_mask",
}
# Subclasses that stand in for a tensor everywhere: torch's own tracing, and results of collectives not waited for yet.
_STAND_INS = frozenset(("FakeTensor", "FunctionalTensor", "AsyncCollectiveTensor"))


def _is_what_it_stores(kind: type[Tensor]) -> bool:
    """Whether a Tensor subclass leaves operators as they are, as one that only carries a name or metadata does."""
    if kind.__module__.startswith("torch.") and kind.__name__ in _STAND_INS:
        return True
    leaves_functions = _function_of(kind.__torch_function__) in (
        _function_of(Tensor.__torch_function__),
        torch._C._disabled_torch_function_impl,
    )
    return leaves_functions and kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def _function_of(method: Any) -> Any:
    """The function of a class method, which makes a new bound object at each look."""
    return getattr(method, "__func__", method)


def check_tensor(name: str, tensor: Tensor, dims: int, layout: str, like: Tensor | None = None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(tensor).__name__}")
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions {layout}, got shape {tuple(tensor.shape)}")
    if like is None:
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}: cast it with {name}.to(...)"
            )
        if tensor.shape[-1] == 0:
            raise ValueError(f"{name} must have a head_dim of at least 1, got shape {tuple(tensor.shape)}")
    elif tensor.dtype != like.dtype:
        raise TypeError(
            f"{name} must have the query's dtype {like.dtype}, got {tensor.dtype}: cast one of the two"
        )


def check_shape(
    name: str, tensor: Tensor, expected: tuple[int, ...], free: tuple[int, ...] = (), hint: str = ""
) -> None:
    """free: dimensions whose size is the tensor's own, spelled * in the message, which ends in `hint`."""
    if tensor.shape != expected:
        words = ["*" if i in free else size for i, size in enumerate(expected)]
        raise ValueError(f"{name} must have shape {spell(words)}, got {tuple(tensor.shape)}{hint}")


def spell(sizes: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"


class Layout(NamedTuple):
    """A public function's layout, and the one that is easily mistaken for it."""

    operands: str  # the names of the tensors that have it
    name: str
    heads: int  # the dimension that counts them
    tokens: int
    swapped: str
    turn: str  # what turns one into the other

    def swap(self, operands: str = "") -> str:
        """The sentence that says so of the operands."""
        return (
            f"{operands or self.operands} have heads and tokens swapped, {self.swapped}: this function takes "
            f"{self.name}, use {self.turn}"
        )


_SDPA = "[B, H, T, D]", -3, -2, "[B, T, H, D]", ".transpose(1, 2)"
_FLASH = "[B, T, H, D]", -2, -3, "[B, H, T, D]", ".transpose(1, 2)"
_PACKED = "[total, H, D]", -2, -3, "[H, total, D]", ".transpose(0, 1)"
WHOLE = Layout("query, key and value", *_SDPA)
VARLEN = Layout("q, k and v", *_PACKED)
CACHED = Layout("q, k_cache and v_cache", *_FLASH)
BRANCH = Layout("out and q", *_FLASH)
PACKED_BRANCH = Layout("out and q", *_PACKED)


def are_groups(heads_q: int, heads_kv: int) -> bool:
    return heads_kv > 0 and heads_q % heads_kv == 0


def check_groups(layout: Layout, query: Tensor, key: Tensor, names: tuple[str, str]) -> None:
    heads_q, heads_kv = query.shape[layout.heads], key.shape[layout.heads]
    if are_groups(heads_q, heads_kv):
        return
    tokens_q, tokens_kv = query.shape[layout.tokens], key.shape[layout.tokens]
    hint = ""
    # where there are as many queries as keys, these would always do as numbers of heads
    if tokens_q and are_groups(tokens_q, tokens_kv) and (tokens_q != tokens_kv or heads_q < heads_kv):
        hint = f"; it seems that {layout.swap(' and '.join(names))}"
    elif tokens_q and are_groups(tokens_q, heads_kv):
        hint = f"; are heads and tokens of {names[0]} swapped? This function takes {layout.name}"
    elif are_groups(heads_q, tokens_kv):
        hint = f"; are heads and tokens of {names[1]} swapped? This function takes {layout.name}"
    raise ValueError(
        f"the {heads_q} heads of {names[0]} must be a multiple of the {heads_kv} key/value heads{hint}"
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
    """Whether one place in memory stands for several elements: expanded tensors, sliding windows."""
    reach = 0  # of the dimensions with shorter steps
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += step * (size - 1)
    return False


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether an element of one lies where an element of the other does. As `csrc/memory.h`."""
    if not (has_values(a) and has_values(b)) or 0 in a.shape or 0 in b.shape:
        return a is b
    size = a.element_size()
    reach_a, reach_b = (
        size * sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) for t in (a, b)
    )
    distance = b.data_ptr() - a.data_ptr()
    if distance > reach_a or -distance > reach_b:
        return False
    walks = [
        (size * step, n - 1) for t in (a, b) for n, step in zip(t.shape, t.stride(), strict=True) if step
    ]
    return _reaches(sorted(walks, reverse=True), distance + reach_b)


def _reaches(walks: Sequence[tuple[int, int]], distance: int) -> bool:
    """Whether the distance is a sum of steps; walks: (step, how many at most), the longest steps first."""
    rest = sum(step * count for step, count in walks)
    if distance == 0 or not walks or distance > rest:
        return distance == 0
    (step, count), *others = walks
    least = max(0, -(-(distance - rest + step * count) // step))
    return any(_reaches(others, distance - n * step) for n in range(least, min(count, distance // step) + 1))


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
    # kernels read tables of one dtype, and of none that is wider than what they compute in
    dtype = torch.promote_types(q.dtype, torch.float32)
    if cos.dtype == sin.dtype and cos.dtype in DTYPES[:3]:
        dtype = cos.dtype
    return cos.to(dtype).contiguous(), sin.to(dtype).contiguous()


def as_sinks(sinks: Tensor | None, query: Tensor, heads_q: int) -> Tensor | None:
    """[Hq] in the softmax's precision."""
    if sinks is None:
        return None
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        came = sinks.dtype if isinstance(sinks, Tensor) else type(sinks).__name__
        raise TypeError(f"sinks must be a floating-point tensor [Hq], one score per query head, got {came}")
    check_shape("sinks", sinks, (heads_q,))
    return sinks.to(torch.float64 if query.dtype == torch.float64 else torch.float32).contiguous()


def as_int32(name: str, tensor: Tensor, dims: int) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
        came = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be an int32 tensor, got {came}")
    if tensor.dim() != dims:
        raise ValueError(
            f"{name} must have {dims} dimension{'s' * (dims > 1)}, got shape {tuple(tensor.shape)}"
        )
    if tensor.dtype == torch.int32:
        return tensor.contiguous()
    if tensor.device.type == "cpu" and tensor.numel() and has_values(tensor):
        low, high = int(tensor.min()), int(tensor.max())
        if low < -(2**31) or high >= 2**31:
            raise ValueError(f"{name} must fit into int32, got {low if low < -(2**31) else high}")
    return tensor.to(torch.int32).contiguous()


def as_rows(name: str, rows: Tensor, count: int, available: int, of: str) -> Tensor:
    """`count` numbers of rows of a tensor that has `available` ones, as int32; their values are checked on a CPU."""
    rows = as_int32(name, rows, 1)
    check_shape(name, rows, (count,))
    if may_look_at(rows) and count:
        check_range(rows, available, f"{name} must lie in", f"the rows of {of}")
    return rows


def check_range(numbers: Tensor, available: int, must: str, what: str) -> None:
    """That each of the numbers, at least one, is one of 0 .. available - 1. Reads them: see `may_look_at`."""
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= available:
        raise ValueError(f"{must} 0 .. {available - 1}, {what}, got {low if low < 0 else high}")


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
