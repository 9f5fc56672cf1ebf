"""Keys of calls: what a kept launch depends on, read off the arguments in one expression.

Two calls with the same key are launched alike, but for the addresses of their tensors. A key holds of each tensor its
dtype, shape, strides and device, and whether its address is a multiple of 16, since Triton compiles other code for
those. Where autograd matters, it also holds whether the tensor requires grad. It says which tensors lie at one address.
Of each number it holds the type as well: 1, 1.0 and True are equal, but not to a compiler. A loop over the arguments
takes 7 us for a forward, the generated function 4.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import is_autocast_enabled
from torch.autograd import forward_ad

from .call import PLAIN_TYPES

Key = tuple[Any, ...]
_included = torch._C._dispatch_tls_local_include_set
_KEYS = torch._C.DispatchKey
# what the dispatcher includes in every thread, and in inference mode; torch.func, tracing and dispatch modes add to it
_DEFAULT = torch._C.DispatchKeySet(_KEYS.BackendSelect)
_PLAIN_STATES = frozenset(
    (_DEFAULT.raw_repr(), (_DEFAULT | torch._C.DispatchKeySet(_KEYS.ADInplaceOrView)).raw_repr())
)


def is_plain_state() -> bool:
    """Whether nobody has to see the operators of this thread: no mode, no transform, no tracing, no forward-mode AD."""
    return _included().raw_repr() in _PLAIN_STATES and forward_ad._current_level < 0


def autocast_dtype() -> torch.dtype | None:
    """What autocast turns the tensors of a GPU into; None where it is off."""
    return torch.get_autocast_dtype("cuda") if is_autocast_enabled("cuda") else None


def key_function(
    tensors: Sequence[str], optional: Collection[str], numbers: Sequence[str], with_autograd: bool
) -> Callable[..., tuple[Key, list[int]] | None]:
    """A function of these arguments, in this order: their key, and the addresses of the tensors, None for absent ones.

    None instead of both where an address does not stand for its tensor: one of a subclass, one that is negated by a
    bit of its own, and one whose memory was given back.
    """
    lines, facts = [f"def key({', '.join((*tensors, *numbers))}):"], []
    for i, name in enumerate(tensors):
        indent = " "
        if name in optional:
            lines += [f" if {name} is None: a{i} = f{i} = None", " else:"]
            indent = "  "
        lines += [
            f"{indent}if type({name}) not in PLAIN_TYPES or {name}.is_neg(): return None",
            f"{indent}a{i} = {name}.data_ptr()",
            f"{indent}if not a{i} and {name}.numel(): return None",
            f"{indent}f{i} = {name}.dtype, {name}.shape, {name}.stride(), {name}.device, not a{i} & 15"
            + (f", {name}.requires_grad" if with_autograd else ""),
        ]
        facts.append(f"f{i}")
    facts += [f"type({name}), {name}" for name in numbers]
    lines += [
        f" addresses = [{', '.join(f'a{i}' for i in range(len(tensors)))}]",
        f" key = ({', '.join(facts)},)",
        " present = [a for a in addresses if a]",
        " if len(set(present)) < len(present): key += (tuple([addresses.index(a) for a in addresses]),)",
        " return key, addresses",
    ]
    names: dict[str, Any] = {"PLAIN_TYPES": PLAIN_TYPES}
    exec("\n".join(lines), names)
    function: Callable[..., tuple[Key, list[int]] | None] = names["key"]
    return function
