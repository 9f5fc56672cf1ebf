"""The checks behind the error messages, of shapes, dtypes, devices and numbers.

They look at metadata alone, so they cost no synchronisation and trace under torch.compile. Those that read a tensor's
values are in `values.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from .call import FLOATS, MAX_SCALE, PLAIN_TYPES, SOFTCAPS
from .values import check_range, has_values, may_look_at

DTYPES = (*FLOATS, torch.float64)


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
    left = [(step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    reach = 0  # of the dimensions with shorter steps
    while left:
        shortest = 0
        for place, (step, _) in enumerate(left):  # torch.compile cannot sort sizes that may change
            if step < left[shortest][0]:
                shortest = place
        step, size = left.pop(shortest)
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


def as_prompt_index(prompt_index: Tensor | None, batch: int) -> Tensor | None:
    """int32 [B], the row of the prompt table of each sequence."""
    if prompt_index is None:
        return None
    prompt_index = as_int32("prompt_index", prompt_index, 1)
    check_shape("prompt_index", prompt_index, (batch,))
    return prompt_index


def as_rows(name: str, rows: Tensor, count: int, available: int, of: str) -> Tensor:
    """`count` numbers of rows of a tensor that has `available` ones, as int32; their values are checked on a CPU."""
    rows = as_int32(name, rows, 1)
    check_shape(name, rows, (count,))
    if may_look_at(rows) and count:
        check_range(rows, available, f"{name} must lie in", f"the rows of {of}")
    return rows


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


def as_length(name: str, length: int) -> int:
    if isinstance(length, Tensor):
        raise TypeError(f"{name} must be a Python int, got a tensor: reading it here would stall the device")
    if as_int(name, length) < 0:
        raise ValueError(f"{name} must not be negative, got {length}")
    return length


def as_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if not _is_number(scale):
        raise TypeError(
            "scale must be a Python number (no gradient flows into it, and a tensor would be read here), "
            f"got {type(scale).__name__}"
        )
    scale = float(scale)
    if not -MAX_SCALE <= scale <= MAX_SCALE:  # NaN too
        raise ValueError(f"scale must be a finite number between -3e38 and 3e38, got {scale}")
    return scale


def _is_number(value: object) -> bool:
    """Whether it is a Python number, or what float() makes one of."""
    # numbers first: torch.compile asks a dynamic float for its type, and cannot ask it for its attributes
    return isinstance(value, (int, float)) or (not isinstance(value, Tensor) and hasattr(value, "__float__"))


def as_softcap(softcap: float | None) -> float:
    """0.0 where there is none."""
    if softcap is None:
        return 0.0
    if not _is_number(softcap):
        raise TypeError(f"softcap must be a Python number, 0.0 for no cap, got {type(softcap).__name__}")
    softcap = float(softcap)
    if softcap and not SOFTCAPS[0] <= softcap <= SOFTCAPS[1]:
        raise ValueError(
            f"softcap must be 0.0 (no cap) or lie in 1e-30 .. 1e30, the largest score that is possible, got {softcap}"
        )
    return softcap


def as_window(window_size: tuple[int, int] | None, causal: bool) -> tuple[int, int]:
    """(left, right); a causal mask is a window without a right side."""
    if window_size is None or window_size == (-1, -1):
        left = right = -1
    else:
        if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
            raise TypeError(
                f"window_size must be (left, right) or None, -1 for no limit, got {window_size!r}"
            )
        left, right = (as_int("window_size", side) for side in window_size)
        if left < -1 or right < -1:
            raise ValueError(f"window_size must hold numbers >= -1 (-1 = no limit), got {tuple(window_size)}")
    return left, 0 if causal else right
