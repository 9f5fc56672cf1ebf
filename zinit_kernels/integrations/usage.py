"""Whether a layer's prompts were used: checked after every pass of an attention module that has some.

The prompts come in by the attention function that transformers looks up for each pass. Whatever makes it take another
one (`set_attn_implementation`, a configuration that is shared or written to, a serving engine that switches to
flash-attention, a kernel that replaces the module's forward) would give the base's answers without a word. There is one
place where all of these can be seen: the end of the layer's pass.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import nn

_HANDLES = "_zinit_usage_handles"


# Of this thread: `used`, what was marked, and `weighed`, see `asks_for_weights`. It is no subclass with defaults:
# torch.compile (2.13) would read the defaults, and leave nothing behind of what it sets.
_pass = threading.local()


def begin(weighed: bool = False) -> None:
    """The pass of an attention module begins in this thread; whether it was called with output_attentions."""
    _pass.used, _pass.weighed = None, weighed


def asks_for_weights() -> bool:
    """Whether the watched module that is being called was called with output_attentions."""
    weighed: bool = getattr(_pass, "weighed", False)
    return weighed


def mark_used(module: nn.Module) -> None:
    """This pass has asked for prompts: those of an attention module, or an adapter's whose parameters were read."""
    _pass.used = module


def take_used() -> nn.Module | None:
    """What was marked since `begin`."""
    used: nn.Module | None = getattr(_pass, "used", None)
    _pass.used, _pass.weighed = None, False
    return used


def ignored(attention: Any) -> RuntimeError:
    """The error for a pass that did not ask for the prompts of this attention module."""
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if implementation == "zinit":
        reason = (
            f"the forward of its {type(attention).__name__} has been replaced by one that does not know them"
        )
    else:
        reason = f"its attention implementation is now {implementation!r}"
    return RuntimeError(
        f"the model has zero-init prompts, and this pass ignored them: {reason}. "
        "model.set_attn_implementation('zinit') brings them back; continuous_batching(model) serves them; "
        "disable_zero_init_attention(model) asks for the base, and remove_zero_init_attention(model) returns to it"
    )


def watch(attention: nn.Module, with_kwargs: bool) -> None:
    """Checks every pass of the module from now on; with_kwargs, which costs 4 us a pass, is for `asks_for_weights`."""
    handles = (
        attention.register_forward_pre_hook(_begin_with, with_kwargs=True)
        if with_kwargs
        else attention.register_forward_pre_hook(_begin),
        attention.register_forward_hook(_end),
    )
    # kept in the module: a handle that is unpickled keeps hooks of that process from getting its number
    attention.__dict__[_HANDLES] = handles


def unwatch(attention: nn.Module) -> None:
    for handle in attention.__dict__.pop(_HANDLES, ()):
        handle.remove()


def _begin(module: nn.Module, args: Any) -> None:
    _pass.used, _pass.weighed = None, False


def _begin_with(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    begin(bool(kwargs.get("output_attentions")))


def _end(module: nn.Module, args: Any, output: Any) -> None:
    used, own = take_used(), module._modules.get("zinit")
    if own is None or used is own or used is module:
        return
    adapter: Any = (
        own  # or a wrapper around it, PEFT's modules_to_save for example, which hands attributes on
    )
    if adapter.is_on and all(used is not part for part in own.modules()):
        raise ignored(module)
