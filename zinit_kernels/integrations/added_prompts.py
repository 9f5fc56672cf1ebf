"""What a call adds to the prompts of a layer, sequence by sequence: the part of `per_sample` that attention asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .prompts import Prompts
from .scope import ForkLock, Scope, is_computed_again

_SEEN = "_zinit_saw_added_prompts"


class Added(NamedTuple):
    """What one block of `per_sample_prompts` adds."""

    by_adapter: Mapping[int, Tensor]  # an adapter's token -> [N, 1 or P, C]
    rows: (
        Tensor | None
    )  # int32 [B], 0 = nothing is added, i = entry i - 1; None: the one entry, for all sequences


added: Scope[Added] = Scope("zinit_added_prompts")
# Of each `continuous_batching` context: its adapters, and the blocks that it was entered in. It computes in a thread
# that is in none.
_served: list[tuple[frozenset[int], tuple[Added, ...]]] = []
_lock = ForkLock()
_serving: Scope[frozenset[int]] = Scope(
    "zinit_served_adapters"
)  # the adapters of the contexts that a call is in


@contextmanager
def serving_added(tokens: frozenset[int]) -> Iterator[None]:
    """In it, continuous batching adds what the blocks around it add to these adapters.

    Raises ValueError where that would depend on the request, since requests share their batches.
    """
    entries = tuple(entry for entry in added.values() if not tokens.isdisjoint(entry.by_adapter))
    if any(entry.rows is not None for entry in entries[-1:]):
        raise ValueError(
            "continuous batching in per_sample_prompts: requests share their batches, so all of them must take the "
            "same entry; make one block for the requests about each image, or call generate"
        )
    context = (tokens, entries)
    with _lock:
        for others, other_entries in _served:
            if not others.isdisjoint(tokens) and not _add_the_same(entries, other_entries):
                raise ValueError(
                    "continuous batching of this model has begun elsewhere "
                    + ("with other" if other_entries and entries else "with" if other_entries else "without")
                    + " per_sample_prompts, and would serve the requests of both contexts alike: leave that context "
                    "first, or enter this one with the same prompts"
                )
        _served.append(context)
    try:
        with _serving.holding(tokens):
            yield
    finally:
        with _lock:
            _served[:] = [other for other in _served if other is not context]


def _add_the_same(entries: tuple[Added, ...], others: tuple[Added, ...]) -> bool:
    """Whether two contexts, each of which serves what its innermost block adds, serve the same."""
    if not entries or not others:
        return not entries and not others
    mine, theirs = entries[-1].by_adapter, others[-1].by_adapter
    return mine.keys() == theirs.keys() and all(torch.equal(mine[token], theirs[token]) for token in mine)


def refuse_served(block: str, tokens: frozenset[int]) -> None:
    """ValueError if the calling code is in a continuous batching context of these adapters, which has begun without."""
    if any(not tokens.isdisjoint(other) for other in _serving.values()):
        raise ValueError(f"enter {block} first, and continuous batching in it: it has begun without")


def with_added(adapter: Any, prompts: Prompts, packed: bool) -> Prompts:
    """The prompts of a layer, with what the innermost block that concerns it adds. packed: by continuous batching."""
    entries = added.values()
    if packed:
        entries = (*(entry for _, blocks in list(_served) for entry in blocks), *entries)
    entry = next((entry for entry in reversed(entries) if adapter.token in entry.by_adapter), None)
    if adapter.training and not torch.compiler.is_compiling():
        _check_recomputation(adapter, entry is not None)
    if entry is None:
        return prompts
    return prompts._replace(rows=entry.rows, added=entry.by_adapter[adapter.token])


def _check_recomputation(adapter: Any, adds: bool) -> None:
    """RuntimeError where backward recomputes a layer whose block has ended, and nobody has remembered the block.

    That is where the user's code calls torch.utils.checkpoint itself. The layer would be recomputed with its own
    prompts, and the gradients would be wrong without a word.
    """
    if is_computed_again():
        return
    state = adapter.__dict__
    if torch._C._current_graph_task_id() == -1:
        state[_SEEN] = adds
    elif state.get(_SEEN) and not adds:
        raise RuntimeError(
            "backward recomputes a layer whose per_sample_prompts block has ended: call backward in the block, or "
            "checkpoint by model.gradient_checkpointing_enable(), which remembers it"
        )
