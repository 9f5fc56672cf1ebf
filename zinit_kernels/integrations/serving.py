"""transformers' continuous batching, which takes attention functions by a fixed list of names, with prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import NAME, attention_forward
from .layers import disabled_here, served_without
from .scope import ForkLock

# what continuous batching calls for a model that attends by "sdpa"; the second name before transformers 5.19
_NAMES = ("sdpa", "paged|sdpa")


class _Served(NamedTuple):
    contexts: int  # of this model
    implementation: str  # from before the first
    flash: bool | None  # the model's own _supports_flash_attn, where it had one
    without: frozenset[int]  # the adapters that it is served without


_lock = ForkLock()
_models: WeakKeyDictionary[Any, _Served] = WeakKeyDictionary()
_found: dict[str, Callable[..., Any]] = {}  # transformers' own functions, while any model is served


def attends_by_zinit(implementation: str) -> bool:
    """Whether a model that attends by this name asks for prompts now."""
    return implementation == NAME or implementation in _found


@contextmanager
def serving(model: Any) -> Iterator[None]:
    """Within it the model attends by "sdpa", and "sdpa" asks for prompts. Contexts may overlap, in threads too.

    Prompts that are disabled where the context is entered stay out of what it serves. Raises ValueError if a context
    of the same model that has not ended yet serves it the other way.
    """
    base: nn.Module = model.set_attn_implementation.__self__
    without = disabled_here(model)
    _enter(base, without)
    served_without.append(without)
    try:
        yield
    finally:
        _leave(base)
        served_without.remove(without)


def _enter(base: Any, without: frozenset[int]) -> None:
    with _lock:
        served = _models.get(base)
        if served is not None and served.without != without:
            raise ValueError(
                "continuous batching of this model has begun elsewhere "
                + ("with its prompts disabled" if served.without else "with its prompts")
                + ", and would serve the requests of both contexts alike: leave that context first, or enter this one "
                + ("within" if served.without else "outside of")
                + " disable_zero_init_attention too"
            )
        if not _models:
            for name in _NAMES:
                if name in ALL_ATTENTION_FUNCTIONS:
                    _found[name] = ALL_ATTENTION_FUNCTIONS[name]
                    ALL_ATTENTION_FUNCTIONS[name] = _with_prompts(_found[name])
        if served is None:
            own = vars(base).get("_supports_flash_attn")
            served = _Served(0, base.config._attn_implementation, own, without)
            try:
                base.set_attn_implementation("sdpa")
            except BaseException:
                _put_functions_back()
                raise
            base._supports_flash_attn = False  # else it switches to flash-attention where that is installed
        _models[base] = served._replace(contexts=served.contexts + 1)


def _leave(base: Any) -> None:
    """Whoever leaves last puts back what the first one found."""
    with _lock:
        served = _models.pop(base, None)
        if served is None:  # the garbage collector ends the context, together with the model
            pass
        elif served.contexts > 1:
            _models[base] = served._replace(contexts=served.contexts - 1)
        else:
            base.set_attn_implementation(served.implementation)
            if served.flash is None:
                del base._supports_flash_attn
            else:
                base._supports_flash_attn = served.flash
        _put_functions_back()


def _put_functions_back() -> None:
    """Gives transformers its own functions back, unless a model is still served."""
    if not _models:
        for name, function in _found.items():
            ALL_ATTENTION_FUNCTIONS[name] = function
        _found.clear()


def _with_prompts(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    return partial(attention_forward, zinit_tokens=function)
