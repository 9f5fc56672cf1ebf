"""The fast path on a GPU: a call like an earlier one goes to the kernels at once.

Checking a call, choosing its backend and torch's dispatcher take 40 of a forward's 55 us. What comes of all three
depends on the call's key (`call_keys.py`), on the backend that was named, on autocast, and on what is proven on the
chip. So when a key is seen for the second time, this module keeps the backend, the operator's numbers, and for Triton
the launches. It keeps no tensor. The third call goes to the kernels at once.

A call takes the long way where a mode, a transform or a tracer has to see its operators, and where its tensors had to
be converted. `is_on_gpu` alone looks for a GPU; the tests put another function in its place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd.graph import increment_version

from . import arguments, dispatch, proof, values
from .backends import fused, triton
from .call import CACHE_CALL, CALL, PUBLIC_TENSORS, CacheCall, Call, Form
from .call_keys import Key, autocast_dtype, is_plain_state, key_function

MOST = 1024  # keys of each function
_SEEN = object()  # once; or what came of it may change
_NEVER = object()
_READ = (0, 3, 4, 5, 6)  # places of the tensors that a call with a cache reads beside the caches
_EXACT = frozenset((int, float, bool, str, type(None)))


class Kept(NamedTuple):
    """What is known of a key.

    plan: Triton's launches; None: the backend's operator is called. unsqueezed: the tensors that the operator takes
    with one more dimension in front. numbers: the operator's. reach: of a call that appends, the bytes that the longer
    cache spans, and the distance of the two; (0, 0) otherwise.
    """

    backend: str
    plan: Any
    unsqueezed: tuple[int, ...]
    numbers: tuple[Any, ...]
    reach: tuple[int, int]
    reads: tuple[
        tuple[int, int], ...
    ]  # of a call that appends: (place of a tensor that is read, the bytes it spans)
    gradients: Any  # the launches of backward; None: autograd records nothing, or there is no plan

    def operands(self, tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """The operator's arguments, of its tensors as the public function was given them."""
        given: list[Any] = [*tensors]
        for i in self.unsqueezed:
            given[i] = given[i].unsqueeze(0)
        return (*given, *self.numbers)

    def without_rows(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Gradients without the dimension that the operator takes some tensors with."""
        given = [*grads]
        for i in self.unsqueezed:
            grad = given[i]
            given[i] = None if grad is None else grad.squeeze(0)
        return given


def is_on_gpu(query: Any) -> bool:
    """Whether these calls are kept at all: tensors of an NVIDIA GPU, with nobody tracing or reading the log."""
    return getattr(query, "is_cuda", False) and not torch.compiler.is_compiling()


class Door:
    """The kept calls of one public function. form: the operator's; canonical: the function's checks.

    The operator's tensors stand for those of the public function in the order of its parameters `tensors`.
    """

    def __init__(
        self,
        form: Form,
        stage: str,
        canonical: Callable[..., Any],
        tensors: dict[str, str],
        numbers: tuple[str, ...],
        refused: tuple[str, ...],
    ) -> None:
        self.form, self.stage = form, stage
        names = tuple(inspect.signature(canonical).parameters)
        self._places = tuple(names.index(tensors[name]) if name in tensors else None for name in form.specs)
        self._absent = tuple(names.index(name) for name in refused)
        self._numbers = tuple(names.index(name) for name in numbers)
        self._known: dict[Key, Any] = {}
        key = key_function((*form.specs,), form.optional, numbers, True)
        picked = ", ".join(
            [f"g[{place}]" if place is not None else "None" for place in self._places]
            + [f"g[{place}]" for place in self._numbers]
        )
        absent = " or ".join(f"g[{place}] is not None" for place in self._absent)
        window = names.index("window_size")
        exact = " and ".join(f"type(g[{place}]) in EXACT" for place in self._numbers if place != window)
        exact += f" and (g[{window}] is None or is_window(g[{window}]))"
        self._key_of: Callable[[Any], tuple[Key, list[int]] | None] = eval(
            f"lambda g: None if {absent} or not ({exact}) else key({picked})",
            {"key": key, "EXACT": _EXACT, "is_window": _is_window},
        )
        self._tensors: Callable[[Any], tuple[Tensor | None, ...]] = eval(
            f"lambda g: ({', '.join(f'g[{p}]' if p is not None else 'None' for p in self._places)},)"
        )

    def find(self, backend: str, given: tuple[Any, ...]) -> tuple[Kept | None, Key | None, list[int]]:
        """(what is kept of a call or None, its key or None where none may be kept, the addresses)."""
        if dispatch.IS_LOGGED or values.ON_DEVICES_TOO or not is_plain_state():
            return None, None, []
        found = self._key_of(given)
        if found is None:
            return None, None, []
        key = (backend, is_grad_enabled(), autocast_dtype(), proof.generation, *found[0])
        kept = self._known.get(key)
        if kept is _SEEN:
            return None, key, []
        return (None, None, []) if kept is _NEVER else (kept, key, found[1])

    def learn(self, key: Key, backend: str, call: Any, given: tuple[Any, ...]) -> None:
        """Keeps what came of a call, the second time that its key is seen."""
        if key not in self._known:
            if len(self._known) >= MOST:
                self._known.clear()
            self._known[key] = _SEEN
        elif self._known[key] is _SEEN:
            self._known[key] = self._kept(backend, call, given)

    def _kept(self, backend: str, call: Any, given: tuple[Any, ...]) -> Any:
        name = dispatch.settled(backend, call)
        if name not in ("triton", "cuda", "hybrid"):
            return _NEVER if name else _SEEN
        tensors, numbers = self.form.split(self.form.arguments(call))
        unsqueezed = []
        for i, (ours, theirs) in enumerate(zip(self._tensors(given), tensors, strict=True)):
            if ours is theirs is None:
                continue
            if ours is None or theirs is None or ours.dtype != theirs.dtype:
                return _NEVER
            if ours.data_ptr() != theirs.data_ptr():
                return _NEVER  # a converted one
            if theirs.shape == ours.shape and theirs.stride() == ours.stride():
                continue
            if theirs.shape != (1, *ours.shape) or theirs.stride()[1:] != ours.stride():
                return _NEVER
            unsqueezed.append(i)
        plan = None
        if name == "triton" and (plan := triton.plan_of(call)) is None:
            return _SEEN
        reach: tuple[int, int] = (0, 0)
        reads: tuple[tuple[int, int], ...] = ()
        if isinstance(call, CacheCall) and call.new_key is not None:
            reach = max(_reach(call.key_cache), _reach(call.value_cache)), _distance(call)
            reads = tuple((i, _reach(tensors[i])) for i in _READ if tensors[i] is not None)
        records = plan is not None and not isinstance(call, CacheCall) and fused.requires_grad(call)
        gradients = triton.gradients_of(tuple(unsqueezed)) if records else None
        return Kept(name, plan, tuple(unsqueezed), numbers, reach, reads, gradients)

    def tensors(self, given: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        """Those of the operator, as the public function was given them."""
        return self._tensors(given)


def _is_window(window: Any) -> bool:
    """Whether it holds integers: (1.0, 0) has the key of (1, 0), and is refused."""
    return type(window) is tuple and len(window) == 2 and type(window[0]) is type(window[1]) is int


def _distance(call: CacheCall) -> int:
    return call.value_cache.data_ptr() - call.key_cache.data_ptr()


def _reach(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to behind its last one."""
    steps = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


_WHOLE = Door(
    CALL,
    "forward",
    arguments.from_sdpa,
    {name: name for name in PUBLIC_TENSORS},
    ("is_causal", "window_size", "scale", "softcap", "gate_activation"),
    ("attn_mask",),
)
_CACHED = Door(
    CACHE_CALL,
    "decode",
    arguments.from_cache,
    {
        "query": "q",
        "key_cache": "k_cache",
        "value_cache": "v_cache",
        "new_key": "k",
        "new_value": "v",
        "prompt_key": "prompt_k",
        "prompt_value": "prompt_v",
        **{
            name: name
            for name in CACHE_CALL.specs
            if name in ("gate", "sinks") or name.startswith(("prompt_index", "cache_", "block", "rotary"))
        },
    },
    (
        "rotary_interleaved",
        "softmax_scale",
        "causal",
        "window_size",
        "softcap",
        "num_splits",
        "gate_activation",
    ),
    ("cache_batch_idx",),
)
_QUERY, _KEY_CACHE, _VALUE_CACHE, _NEW_KEY = 0, 1, 2, 3  # places among the arguments of both functions
Found = tuple[tuple[Tensor, ...] | None, Key | None]


def attention(backend: str, given: tuple[Any, ...]) -> Found:
    """((out, lse) of the arguments of `zero_init_attention` or None, the key to `learn_attention` under or None)."""
    kept, key, addresses = _WHOLE.find(backend, given)
    if kept is None:
        return None, key
    plan = kept.plan
    if plan is None:
        return fused.attention_of(kept.backend, *kept.operands(_WHOLE.tensors(given))), None
    if not triton.may_be_kept(given[_QUERY]) or plan.has_hooks():
        return None, None
    if kept.gradients is not None:
        return fused.launched(kept, addresses, _WHOLE.tensors(given)[: len(PUBLIC_TENSORS)]), None
    return plan.run(addresses), None


def attention_with_cache(backend: str, given: tuple[Any, ...]) -> Found:
    """`attention` of the arguments of `zero_init_attention_with_kvcache`."""
    kept, key, addresses = _CACHED.find(backend, given)
    if kept is None:
        return None, key
    if kept.reach[0]:  # the rule that the caches share no memory is about addresses
        distance = addresses[_VALUE_CACHE] - addresses[_KEY_CACHE]
        if distance != kept.reach[1] and abs(distance) < kept.reach[0]:
            return None, None
        for place, size in kept.reads:
            first = addresses[place]
            for cache in (addresses[_KEY_CACHE], addresses[_VALUE_CACHE]):
                if first < cache + kept.reach[0] and cache < first + size:  # the long way looks closer
                    return None, None
    plan = kept.plan
    if plan is None:
        call = CacheCall(*kept.operands(_CACHED.tensors(given)))
        return fused.attention_with_cache(call, kept.backend), None
    if not triton.may_be_kept(given[_QUERY]) or plan.has_hooks():
        return None, None
    done = plan.run(addresses)
    if given[_NEW_KEY] is not None:
        increment_version((given[_KEY_CACHE], given[_VALUE_CACHE]))
    return done, None


def learn_attention(key: Key, backend: str, call: Call, given: tuple[Any, ...]) -> None:
    """Keeps what came of a call of `zero_init_attention`."""
    _WHOLE.learn(key, backend, call, given)


def learn_attention_with_cache(key: Key, backend: str, call: CacheCall, given: tuple[Any, ...]) -> None:
    """Keeps what came of a call of `zero_init_attention_with_kvcache`."""
    _CACHED.learn(key, backend, call, given)
