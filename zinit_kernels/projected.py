"""Projected prompts, kept between calls that would compute the same ones again.

A layer's prompt keys and values depend on its prompts, its gates and its projections, none of which change while a
model generates. Projecting them for every token would cost more than the prompt branch itself. This module keeps what
was computed and tells whether it is still what a new projection would give.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_state
from torch.optim.optimizer import register_optimizer_step_post_hook

from .values import has_autocast

_Value = TypeVar("_Value")
_Layout = tuple[int, torch.Size, tuple[int, ...]]  # address, shape, strides
_steps = 0  # of every optimizer in this process


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


# Fused optimizers, the default of transformers' Trainer, change parameters but not their versions (torch 2.13).
register_optimizer_step_post_hook(_count_step)


class Source(NamedTuple):
    """One tensor that a value was computed from, as it was.

    It is unchanged while it is the same object with the same version, address and layout, and the storage that it had
    still exists. An in-place change raises the version; `tensor.data = ...` (as in `module.to`) changes the address or
    the layout, or frees the storage, whose address may then be given to the new one. Objects are referenced weakly, so
    that nothing is kept alive: an `id` or an address alone may belong to something else by the next call.
    """

    tensor: ReferenceType[Tensor]
    storage: ReferenceType[torch.UntypedStorage]
    version: int
    layout: _Layout

    @classmethod
    def of(cls, tensor: Tensor) -> Source:
        layout = tensor.data_ptr(), tensor.shape, tensor.stride()
        return cls(ref(tensor), ref(tensor.untyped_storage()), tensor._version, layout)


class Stamp(NamedTuple):
    """The state of everything that a kept value was computed from."""

    settings: Hashable
    autocast: torch.dtype | None
    steps: int
    sources: tuple[Source, ...]

    def is_current(self, settings: Hashable, sources: Sequence[Tensor]) -> bool:
        """Asked for every layer and token, hence one plain loop: half of what it takes by methods and generators."""
        if self.settings != settings or self.steps != _steps or len(self.sources) != len(sources):
            return False
        for (was, storage, version, (address, shape, stride)), tensor in zip(
            self.sources, sources, strict=True
        ):
            if (
                was() is not tensor
                or tensor._version != version
                or storage() is None
                or tensor.data_ptr() != address
                or tensor.shape != shape
                or tensor.stride() != stride
            ):
                return False
        return self.autocast == _autocast(sources)


class KeptProjections(Generic[_Value]):
    """One value for each owner, returned again while its stamp is current. Copies and pickles are empty."""

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[nn.Module, tuple[Stamp, _Value]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[KeptProjections[_Value]], tuple[()]]:
        return type(self), ()

    def __getitem__(self, owner: nn.Module) -> _Value:
        """The value kept for the owner, current or not. KeyError where there is none."""
        return self._kept[owner][1]

    def __len__(self) -> int:
        return len(self._kept)

    def recall(self, owner: nn.Module, settings: Hashable, sources: Sequence[Tensor] | None) -> _Value | None:
        """The value that was kept with the same settings and sources, unless one of them has changed since."""
        kept = self._kept.get(owner)
        if kept is None or sources is None or not kept[0].is_current(settings, sources):
            return None
        return kept[1]

    def keep(self, owner: nn.Module, stamp: Stamp | None, value: _Value) -> None:
        """Keeps the value in the place of the owner's last one.

        The stamp was taken before the value was computed, so that a change meanwhile, by an optimizer in another
        thread for example, makes the value outdated instead of unnoticed.
        """
        if stamp is not None:
            self._kept[owner] = stamp, value

    def clear(self) -> None:
        """Drops everything. Only needed after a write that no version shows, such as `tensor.data.mul_(2)`."""
        self._kept.clear()


def stamp(settings: Hashable, sources: Sequence[Tensor] | None) -> Stamp | None:
    """The stamp of these sources as they are now; None where what comes of them is not to be kept."""
    if sources is None or any(source.is_inference() for source in sources):  # these have no version
        return None
    return Stamp(settings, _autocast(sources), _steps, tuple(map(Source.of, sources)))


def sources_of(
    tensors: Iterable[Tensor], modules: Iterable[nn.Module], hooks_observe: bool = False
) -> list[Tensor] | None:
    """Every tensor that a projection by these modules depends on, or None where its changes would not be seen.

    That is so with gradients on (a kept graph would train nothing), while compiling, within torch.func's transforms,
    and for modules whose answer may depend on more than their tensors: those of other packages, hooked or wrapped ones.
    Of a quantised or sharded tensor, the tensors that it consists of are taken. `hooks_observe` is for modules whose
    forward hooks are known to change nothing.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or in_transform():
        return None
    if not hooks_observe and (module_state._global_forward_hooks or module_state._global_forward_pre_hooks):
        return None
    sources: list[Tensor] = []
    for tensor in tensors:
        if type(tensor) is nn.Parameter:
            sources.append(tensor)
        elif not _collect_plain(tensor, sources):
            return None
    for module in modules:
        state = module.__dict__
        if not _is_plain(type(module)) or "forward" in state or state["_modules"]:
            return None
        if not hooks_observe and (state["_forward_hooks"] or state["_forward_pre_hooks"]):
            return None
        for held in (state["_parameters"], state["_buffers"]):
            for part in held.values():
                if type(part) is nn.Parameter:
                    sources.append(part)
                elif part is not None and not _collect_plain(part, sources):
                    return None
    return sources


def _collect_plain(tensor: Tensor, into: list[Tensor]) -> bool:
    """Appends the tensor, or those that a subclass wraps; False for a subclass that does not name them."""
    if type(tensor) in (Tensor, nn.Parameter):
        into.append(tensor)
        return True
    if not hasattr(tensor, "__tensor_flatten__"):
        return False
    names, _ = tensor.__tensor_flatten__()
    return all(_collect_plain(getattr(tensor, name), into) for name in names)


def in_transform() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) is active: tensors may then stand for several."""
    return torch._C._functorch.maybe_current_level() is not None


def _autocast(sources: Sequence[Tensor]) -> torch.dtype | None:
    device = sources[0].device.type
    if not has_autocast(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _is_plain(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith(("torch.nn.modules.", "transformers.", "zinit_kernels.packed"))
