"""Shape classes: what `zinit tune` times once for many calls, and which class a call belongs to.

Which backend is fastest depends on the stage, the dtype, the head dimension, and roughly on the lengths. A class spans
a range of lengths and is timed at one of them. Calls with a soft cap, sinks, a window, padding, packed sequences or
pages belong to no class, because PyTorch's attention takes longer for them than for what is timed. For those the
written order stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import fused
from ..call import AnyCall, CacheCall, Call

# (name, longest length of the class, the length that is timed)
_LENGTHS = (("short", 512, 256), ("medium", 2048, 1024), ("long", 1 << 62, 4096))
_CAPACITIES = (("short", 2048, 1024), ("long", 1 << 62, 8192))
_NEW = (("one token", 1, 1), ("few tokens", 16, 8), ("a chunk", 1 << 62, 64))
_HEADS_Q, _HEADS_KV, _PROMPTS = 32, 8, 10
_TOKENS = 4096  # of all sequences of a timed call together
_SEQUENCES = 8  # that are decoded together


class ShapeClass(NamedTuple):
    """A class at one dtype and head dimension. stage: "forward", "training" or "cache"; sizes: by their names."""

    stage: str
    dtype: torch.dtype
    head_dim: int
    sizes: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its name in the file."""
        return (
            f"{self.stage} {str(self.dtype).removeprefix('torch.')} {self.head_dim} {', '.join(self.sizes)}"
        )


def class_of(call: AnyCall) -> ShapeClass | None:
    """The class of a call; None where `zinit tune` times nothing like it."""
    query = call.query
    if isinstance(call, CacheCall):
        if call.softcap or call.sinks is not None or call.window_left >= 0 or call.window_right > 0:
            return None
        if call.block_table is not None or call.cache_leftpad is not None:
            return None
        sizes = _named(_NEW, query.shape[1]), _named(_CAPACITIES, call.key_cache.shape[1])
        return ShapeClass("cache", query.dtype, query.shape[-1], sizes)
    if not isinstance(call, Call) or call.softcap or call.sinks is not None or call.window_left >= 0:
        return None
    if call.window_right > 0 or call.key_bias is not None or call.cu_seqlens_q is not None:
        return None
    stage = "training" if fused.requires_grad(call) else "forward"
    return ShapeClass(
        stage,
        query.dtype,
        query.shape[-1],
        (_named(_LENGTHS, max(query.shape[2], call.key.shape[2])),),
    )


def classes(dtype: torch.dtype, head_dim: int) -> Iterator[ShapeClass]:
    """All classes of a dtype and head dimension."""
    for stage in ("forward", "training"):
        for name, _, _ in _LENGTHS:
            yield ShapeClass(stage, dtype, head_dim, (name,))
    for new, _, _ in _NEW:
        for capacity, _, _ in _CAPACITIES:
            yield ShapeClass("cache", dtype, head_dim, (new, capacity))


def timed_arguments(shape_class: ShapeClass, device: torch.device) -> dict[str, Any]:
    """What is timed for a class: causal, 32 query heads on 8 key heads, 10 prompts, caches that are nearly full.

    Arguments of `zero_init_attention_with_kvcache` for the stage "cache", else of `zero_init_attention`.
    """
    dtype, head_dim = shape_class.dtype, shape_class.head_dim
    is_training = shape_class.stage == "training"

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_(is_training)

    gate = torch.full((1, _HEADS_Q), 0.5, dtype=torch.float32, device=device).requires_grad_(is_training)
    if shape_class.stage != "cache":
        length = _timed(_LENGTHS, shape_class.sizes[0])
        whole, prompts = (_TOKENS // length, _HEADS_KV, length, head_dim), (1, _HEADS_KV, _PROMPTS, head_dim)
        return {
            "query": normal(_TOKENS // length, _HEADS_Q, length, head_dim),
            "key": normal(*whole),
            "value": normal(*whole),
            "prompt_key": normal(*prompts),
            "prompt_value": normal(*prompts),
            "gate": gate,
            "is_causal": True,
        }
    tokens, capacity = _timed(_NEW, shape_class.sizes[0]), _timed(_CAPACITIES, shape_class.sizes[1])
    return {
        "q": normal(_SEQUENCES, tokens, _HEADS_Q, head_dim),
        "k_cache": normal(_SEQUENCES, capacity, _HEADS_KV, head_dim),
        "v_cache": normal(_SEQUENCES, capacity, _HEADS_KV, head_dim),
        "k": normal(_SEQUENCES, tokens, _HEADS_KV, head_dim),
        "v": normal(_SEQUENCES, tokens, _HEADS_KV, head_dim),
        "prompt_k": normal(1, _PROMPTS, _HEADS_KV, head_dim),
        "prompt_v": normal(1, _PROMPTS, _HEADS_KV, head_dim),
        "gate": gate,
        "cache_seqlens": torch.full((_SEQUENCES,), capacity - tokens, dtype=torch.int32, device=device),
        "causal": True,
    }


def _named(ranges: tuple[tuple[str, int, int], ...], size: int) -> str:
    return next(name for name, longest, _ in ranges if size <= longest)


def _timed(ranges: tuple[tuple[str, int, int], ...], name: str) -> int:
    return next(timed for found, _, timed in ranges if found == name)
