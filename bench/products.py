"""The matrix products of a call, alone: what it would take if all else took no time.

products = products_of(step)        # calls `step` once
products()                          # its products again: torch.mm on operands of the same shapes and layouts
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
_FEW_ROWS = 16  # of the left operand: prompts that are projected, and no tokens


class _Recorder(TorchDispatchMode):
    """Notes the operands of every product; of a parameter the parameter itself, of an activation its layout."""

    def __init__(self, weights: set[int]):
        super().__init__()
        self.weights = weights
        self.calls: list[tuple[Tensor, Tensor]] = []
        self._spare: dict[tuple[Any, ...], Tensor] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in _PRODUCTS and args[-2].shape[0] > _FEW_ROWS:
            self.calls.append((self._operand(args[-2]), self._operand(args[-1])))
        return function(*args, **(kwargs or {}))

    def _operand(self, given: Tensor) -> Tensor:
        if given.untyped_storage().data_ptr() in self.weights:
            return given.detach()
        layout = (given.shape, given.stride(), given.dtype, given.device)
        if (
            layout not in self._spare
        ):  # activations of one shape share their memory, which is not kept alive twice
            spare = torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)
            self._spare[layout] = spare.normal_()
        return self._spare[layout]


def products_of(call: Callable[[], object], model: torch.nn.Module) -> Callable[[], object]:
    """A call that computes the products of `call` again and nothing else. model: whose weights are used as they are."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with _Recorder(weights) as recorder:
        call()
    products = recorder.calls

    @torch.no_grad()
    def run() -> None:
        for left, right in products:
            torch.matmul(left, right)

    return run
