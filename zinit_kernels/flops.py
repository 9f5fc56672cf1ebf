"""How many floating-point operations the operators need, for `torch.utils.flop_counter.FlopCounterMode`.

Products alone count, 2 operations per multiplication and addition, whatever the backend recomputes:

    pairs = (query, key) pairs that causal masks and windows leave; key-padding masks are not looked at
    forward   4 D (pairs + T P) per query head
    backward  2 D pairs (1 where dq, dk or dv is wanted, for S; 1 for dO v^T where dq or dk is; 1 for each of the three)
            + 2 D T P (2 for Sp and dO pv^T where anything but dv is wanted; 1 for dq, dpk, dpv each)

Half of what torch counts for a causal `scaled_dot_product_attention`, which ignores the mask. Lengths that live in
tensors are read where they have values; of fake tensors the longest possible ones are taken.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .ops import STAGES

_COUNTER = "torch.utils.flop_counter"


def register_when_imported() -> None:
    """Registers the formulas now, or with the counter's own import: to import it costs half a second, and Triton."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register(counter: ModuleType) -> None:
    formulas = {"forward": _forward, "backward": _backward, "decode": _decode, "prompt": _prompt}
    for backend, stages in STAGES.items():
        for stage in stages:
            operator = getattr(torch.ops.zinit, f"{stage}_{backend}")
            counter.register_flop_formula(operator, get_raw=True)(formulas[stage])


def _forward(
    query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor | None, prompt_value: Tensor | None,
    gate: Tensor | None, prompt_index: Tensor | None, key_bias: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, scale: float, window_left: int,
    window_right: int, tanh_gate: bool, **ignored: Any,
) -> int:  # fmt: skip
    lengths = _lengths(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    pairs = sum(_pairs(*length, window_left, window_right) for length in lengths)
    prompt_pairs = _prompt_pairs(query, prompt_key)
    return 4 * query.shape[3] * query.shape[1] * (pairs + prompt_pairs)


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    prompt_key: Tensor | None, prompt_value: Tensor | None, gate: Tensor | None, prompt_index: Tensor | None,
    key_bias: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int, scale: float, window_left: int, window_right: int, tanh_gate: bool, needs: int, **ignored: Any,
) -> int:  # fmt: skip
    lengths = _lengths(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    pairs = sum(_pairs(*length, window_left, window_right) for length in lengths)
    prompt_pairs = _prompt_pairs(query, prompt_key)
    wants = [bool(needs >> i & 1) for i in range(6)]
    wants_query, wants_key, _, wants_prompt_key, wants_prompt_value, _ = wants
    token_products = any(wants[:3]) + (wants_query or wants_key) + sum(wants[:3])
    needs_row_sums = any(wants[:2]) or any(wants[3:])
    prompt_products = 2 * needs_row_sums + wants_query + wants_prompt_key + wants_prompt_value
    return 2 * query.shape[3] * query.shape[1] * (token_products * pairs + prompt_products * prompt_pairs)


def _decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, new_key: Tensor | None, new_value: Tensor | None,
    prompt_key: Tensor | None, prompt_value: Tensor | None, gate: Tensor | None, prompt_index: Tensor | None,
    cache_seqlens: Tensor, block_table: Tensor | None, rotary_cos: Tensor | None, rotary_sin: Tensor | None,
    rotary_interleaved: bool, scale: float, window_left: int, window_right: int, *rest: Any, **ignored: Any,
) -> int:  # fmt: skip
    batch, seqlen_q, heads_q, head_dim = query.shape
    capacity = key_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    appended = 0 if new_key is None else new_key.shape[1]
    prompt_length = 0 if prompt_key is None else prompt_key.shape[1]
    if isinstance(cache_seqlens, FakeTensor) or cache_seqlens.is_meta:
        lengths = [capacity] * batch
    else:
        lengths = [min(length + appended, capacity) for length in cache_seqlens.tolist()]
    pairs = sum(_pairs(seqlen_q, length, window_left, window_right) for length in lengths)
    return 4 * head_dim * heads_q * (pairs + batch * seqlen_q * prompt_length)


def _prompt(out: Tensor, query: Tensor, prompt_key: Tensor, *rest: Any, **ignored: Any) -> int:
    return 4 * query.shape[3] * query.shape[1] * _prompt_pairs(query, prompt_key)


def _lengths(
    query: Tensor, key: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int,
) -> Iterable[tuple[int, int]]:  # fmt: skip
    """(queries, keys) of every sequence."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return [(query.shape[2], key.shape[2])] * query.shape[0]
    if isinstance(cu_seqlens_q, FakeTensor) or cu_seqlens_q.is_meta:
        return [(max_seqlen_q, max_seqlen_k)] * (cu_seqlens_q.shape[0] - 1)
    return zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)


@lru_cache(maxsize=4096)
def _pairs(queries: int, keys: int, left: int, right: int) -> int:
    """Pairs (i, j) with i + keys - queries - left <= j <= i + keys - queries + right, -1 = no limit."""
    if left < 0 and right < 0:
        return queries * keys
    shift = keys - queries
    last = (min(i + shift + right, keys - 1) if right >= 0 else keys - 1 for i in range(queries))
    first = (max(i + shift - left, 0) if left >= 0 else 0 for i in range(queries))
    return sum(max(b - a + 1, 0) for a, b in zip(first, last, strict=True))


def _prompt_pairs(query: Tensor, prompt_key: Tensor | None) -> int:
    """(query, prompt) pairs of a head; a sequence whose index names no row counts as one that has prompts."""
    return 0 if prompt_key is None else query.shape[0] * query.shape[2] * prompt_key.shape[2]
