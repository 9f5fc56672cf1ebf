"""Kept launches of backward, for the tensors of the public function.

Backward runs in a thread of autograd's engine, where every line of Python takes about 1.4 times as long as elsewhere:
the caches of the processor belong to the other thread's data. So it finds its launches by one key and nothing else.
The key holds all facts of all tensors, since a tensor may be another one by then: `saved_tensors_hooks` and
checkpoints bring copies, and `tensor.data = other` exchanges one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...call import CALL, PUBLIC_TENSORS, SAVED
from ...call_keys import Key, is_plain_state, key_function
from . import kept

_key_of = key_function(
    (*SAVED.specs, *PUBLIC_TENSORS), SAVED.optional | CALL.optional, ("wanted",), with_autograd=False
)


class Gradients:
    """What is kept of the backwards that follow one kept forward.

    without_rows: the places, among the public function's tensors, of those that the operator takes with one more
    dimension in front. Their gradients come without it.
    """

    def __init__(self, without_rows: tuple[int, ...]) -> None:
        self._without_rows = without_rows
        self._plans: dict[Key, kept.Plan] = {}

    def find(
        self, saved: tuple[Any, ...], wanted: tuple[bool, ...]
    ) -> tuple[tuple[Tensor | None, ...] | None, Key | None]:
        """(the gradients of the differentiable tensors or None, the key to `learn` under or None).

        saved: those of `Saved`, then the public function's tensors. wanted: which gradients.
        """
        if not (is_plain_state() and kept.may_be_kept(saved[2])):
            return None, None
        found = _key_of(*saved, wanted)
        if found is None:
            return None, None
        key, addresses = found
        plan = self._plans.get(key)
        if plan is None:
            return None, key
        return (None, None) if plan.has_hooks() else (plan.run(addresses), None)

    def learn(self, key: Key, saved: tuple[Tensor | None, ...], arguments: tuple[Any, ...]) -> None:
        """Keeps what the operator has launched for its `arguments`.

        Nothing where it was not given a tensor of `saved` itself: a copy lies elsewhere each time.
        """
        if any(given is not ours for given, ours in zip(arguments[: len(SAVED.specs)], saved, strict=False)):
            return
        plan = kept.plan_of("backward", arguments)
        if plan is not None:
            if len(self._plans) >= kept.MOST:
                self._plans.clear()
            self._plans[key] = plan.for_public_tensors(self._without_rows)
