"""What a `with` block says about the calls within it: for its own thread or asyncio task, and for no other."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch

_Value = TypeVar("_Value")


class ForkLock:
    """A lock that no fork() finds half-way: the forking thread waits for it, and parent and child have it free.

    A child has only the thread that forked. A plain lock that another thread held would never be free there.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._lock.acquire,
                after_in_parent=self._lock.release,
                after_in_child=self._lock.release,
            )

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class _Entry(Generic[_Value]):
    """A block that is being executed. Compared by identity: two blocks may hold equal values."""

    def __init__(self, value: _Value):
        self.value = value


# The blocks of a scope, by its id, that this thread stands in whatever it entered: `of`, or None.
_standing = threading.local()
_scopes: WeakSet[Scope[Any]] = WeakSet()


def blocks_here() -> dict[int, tuple[_Entry[Any], ...]]:
    """The blocks of every scope that the calling code stands in."""
    return {id(scope): scope._entries() for scope in list(_scopes)}


@contextmanager
def standing_in(blocks: dict[int, tuple[_Entry[Any], ...]]) -> Iterator[None]:
    """In it, the calling code stands in these blocks, though they may have ended, and in those that it enters."""
    before = getattr(_standing, "of", None)
    _standing.of = blocks
    try:
        yield
    finally:
        _standing.of = before


def is_computed_again() -> bool:
    """Whether the calling code stands in blocks that were remembered for it."""
    return getattr(_standing, "of", None) is not None


def _is_autograds_thread() -> bool:
    if torch._C._current_graph_task_id() == -1:
        return False
    return isinstance(threading.current_thread(), threading._DummyThread)


# A new name for an adapter, which blocks know it by. An `id` would do until the adapter is freed: the next adapter may
# get the same one, and would stand in the blocks of the freed one.
new_token = itertools.count(1).__next__


class Scope(Generic[_Value]):
    """The values of the blocks that a call stands in, outermost first.

    One model serves several threads. What concerns one call (which adapters its rows have, whether it wants the base)
    must not be written into the model, where every other call would see it.
    """

    def __init__(self, name: str):
        self._here: ContextVar[tuple[_Entry[_Value], ...]] = ContextVar(name, default=())
        # `entries` and their `values` in this thread: torch.compile cannot trace ContextVar (2.13), but reads
        # threading.local, if it is no subclass, and guards on what it read
        self._thread = threading.local()
        self._all: list[_Entry[_Value]] = []
        _scopes.add(self)

    @contextmanager
    def holding(self, value: _Value) -> Iterator[None]:
        """A block of this value."""
        entry = _Entry(value)
        self._all.append(entry)
        self._here.set((*self._here.get(), entry))
        self._set_thread((*getattr(self._thread, "entries", ()), entry))
        self._set_standing(lambda entries: (*entries, entry))
        try:
            yield
        finally:
            self._set_standing(lambda entries: tuple(other for other in entries if other is not entry))
            # not by a token: blocks of one thread may overlap, and end in another thread than they began in
            self._all.remove(entry)
            self._here.set(tuple(other for other in self._here.get() if other is not entry))
            self._set_thread(other for other in getattr(self._thread, "entries", ()) if other is not entry)

    def _set_thread(self, entries: Iterable[_Entry[_Value]]) -> None:
        self._thread.entries = tuple(entries)
        self._thread.values = tuple(entry.value for entry in self._thread.entries)

    def _set_standing(
        self, change: Callable[[tuple[_Entry[_Value], ...]], tuple[_Entry[_Value], ...]]
    ) -> None:
        """A block that begins or ends in a layer that is checkpointed."""
        standing: dict[int, tuple[_Entry[_Value], ...]] | None = getattr(_standing, "of", None)
        if standing is not None:
            _standing.of = {**standing, id(self): change(standing.get(id(self), ()))}

    def values(self, moved: bool = False) -> tuple[_Value, ...]:
        """The values in force for the calling code.

        PyTorch moves some calls to threads of its own: what backward recomputes to autograd's thread of the device,
        which Python did not start, and the replicas of nn.DataParallel (`moved`). Those threads have no blocks; the
        ones of all threads hold for them.
        """
        if not self._all and (torch.compiler.is_compiling() or getattr(_standing, "of", None) is None):
            return ()  # no thread is in a block
        if torch.compiler.is_compiling():
            values: tuple[_Value, ...] = getattr(self._thread, "values", ())
            return values
        return tuple(entry.value for entry in self._entries(moved))

    def _entries(self, moved: bool = False) -> tuple[_Entry[_Value], ...]:
        standing: dict[int, tuple[_Entry[_Value], ...]] | None = getattr(_standing, "of", None)
        if standing is not None:
            return standing.get(id(self), ())
        entries = self._here.get()
        if not entries and (moved or _is_autograds_thread()):
            return tuple(self._all)
        return tuple(entry for entry in entries if entry in self._all)
