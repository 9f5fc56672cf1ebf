"""The keywords of the public functions, for type checkers: the overloads in `api.py` name each set once.

test_api_types.py compares them with the real signatures.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from torch import Tensor

# What a ported call may keep: see `ported.py`.


class SdpaPorted(TypedDict, total=False):
    dropout_p: float
    enable_gqa: bool


class FlashPorted(TypedDict, total=False):
    dropout_p: float
    alibi_slopes: None
    deterministic: bool
    return_attn_probs: Literal[False]


class SdpaOptions(SdpaPorted, total=False):
    attn_mask: Tensor | None
    is_causal: bool
    window_size: tuple[int, int] | None
    scale: float | None
    softcap: float | None
    gate_activation: str
    prompt_index: Tensor | None
    sinks: Tensor | None
    backend: str


class FlashOptions(TypedDict, total=False):
    softmax_scale: float | None
    window_size: tuple[int, int] | None
    softcap: float | None
    gate_activation: str
    prompt_index: Tensor | None
    sinks: Tensor | None
    backend: str


class VarlenOptions(FlashOptions, FlashPorted, total=False):
    causal: bool
    block_table: Tensor | None


class CacheRequired(TypedDict):
    prompt_k: Tensor | None
    prompt_v: Tensor | None
    gate: Tensor | float | None
    cache_seqlens: Tensor | int
    causal: bool


class CacheOptions(CacheRequired, FlashOptions, FlashPorted, total=False):
    cache_leftpad: Tensor | None
    cache_batch_idx: Tensor | None
    block_table: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_interleaved: bool | None
    num_splits: int
