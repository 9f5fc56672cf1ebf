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

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .call import CALL, CacheCall, Call, PromptCall, from_backward_arguments
from .operators import STAGES, operator

_COUNTER = "torch.utils.flop_counter"


def register_when_imported() -> None:
    """Registers the formulas now, or with the counter's own import: to import it costs half a second, and Triton."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    elif not any(type(finder).__name__ == _WhenImported.__name__ for finder in sys.meta_path):
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
            packet = operator(stage, backend).overloadpacket
            if packet not in counter.flop_registry:  # else by a package that was imported before
                counter.register_flop_formula(packet, get_raw=True)(formulas[stage])


def _forward(*arguments: Any, **ignored: Any) -> int:
    call = Call(*arguments)
    return 4 * call.query.shape[3] * call.query.shape[1] * (_token_pairs(call) + _prompt_pairs(call))


def _backward(*arguments: Any, **ignored: Any) -> int:
    _, call, needs = from_backward_arguments(arguments)
    wants = {name: bool(needs >> i & 1) for i, name in enumerate(CALL.differentiable)}
    token_wants = [wants.pop(name) for name in ("query", "key", "value")]
    wants_query, wants_key, _ = token_wants
    token_products = any(token_wants) + (wants_query or wants_key) + sum(token_wants)
    needs_row_sums = wants_query or wants_key or any(wants.values())
    prompt_products = 2 * needs_row_sums + wants_query + wants["prompt_key"] + wants["prompt_value"]
    products = token_products * _token_pairs(call) + prompt_products * _prompt_pairs(call)
    return 2 * call.query.shape[3] * call.query.shape[1] * products


def _decode(*arguments: Any, **ignored: Any) -> int:
    call = CacheCall(*arguments)
    batch, seqlen_q, heads_q, head_dim = call.query.shape
    capacity = call.key_cache.shape[1] * (1 if call.block_table is None else call.block_table.shape[1])
    appended = 0 if call.new_key is None else call.new_key.shape[1]
    prompt_length = 0 if call.prompt_key is None else call.prompt_key.shape[1]
    if _has_no_values(call.cache_seqlens):
        lengths = [capacity] * batch
    else:
        padding = [0] * batch if call.cache_leftpad is None else call.cache_leftpad.tolist()
        lengths = [
            min(length + appended, capacity) - hidden
            for length, hidden in zip(call.cache_seqlens.tolist(), padding, strict=True)
        ]
    pairs = sum(_pairs(seqlen_q, length, call.window_left, call.window_right) for length in lengths)
    return 4 * head_dim * heads_q * (pairs + batch * seqlen_q * prompt_length)


def _prompt(*arguments: Any, **ignored: Any) -> int:
    call = PromptCall(*arguments)
    return 4 * call.query.shape[3] * call.query.shape[1] * _prompt_pairs(call)


def _token_pairs(call: Call) -> int:
    return sum(_pairs(*lengths, call.window_left, call.window_right) for lengths in _lengths(call))


def _lengths(call: Call) -> Iterable[tuple[int, int]]:
    """(queries, keys) of every sequence."""
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        return [(call.query.shape[2], call.key.shape[2])] * call.batch_size
    if _has_no_values(call.cu_seqlens_q):
        return [(call.max_seqlen_q, call.max_seqlen_k)] * call.batch_size
    return zip(call.cu_seqlens_q.diff().tolist(), call.cu_seqlens_k.diff().tolist(), strict=True)


def _has_no_values(lengths: Tensor) -> bool:
    return isinstance(lengths, FakeTensor) or lengths.is_meta


@lru_cache(maxsize=4096)
def _pairs(queries: int, keys: int, left: int, right: int) -> int:
    """Pairs (i, j) with i + keys - queries - left <= j <= i + keys - queries + right, -1 = no limit."""
    if left < 0 and right < 0:
        return queries * keys
    shift = keys - queries
    last = (min(i + shift + right, keys - 1) if right >= 0 else keys - 1 for i in range(queries))
    first = (max(i + shift - left, 0) if left >= 0 else 0 for i in range(queries))
    return sum(max(b - a + 1, 0) for a, b in zip(first, last, strict=True))


def _prompt_pairs(call: Call | PromptCall) -> int:
    """(query, prompt) pairs of a head; a sequence whose index names no row counts as one that has prompts."""
    if call.prompt_key is None:
        return 0
    return call.query.shape[0] * call.query.shape[2] * call.prompt_key.shape[2]
