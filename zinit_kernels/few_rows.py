"""The linear layers of a decoding step on a GPU, five launches a layer instead of 29.

    norm, query, key and value products      1
    rotary embedding, cache and attention    1, or 2 where the cache is split (the caller's)
    output product, residual                 1
    norm, gate and up products, SwiGLU       1
    down product, residual                   1

No GPU has run the kernel (`backends/few_rows.py`). So it is taken on a chip after it was right there (`proof`), and for
a shape of layers and a number of rows where it was faster than PyTorch's operators. Both are found out at the first
step, and kept beside the verdicts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, proof
from .backends import few_rows, triton
from .backends.few_rows import MOST_ROWS, Product
from .call_keys import is_plain_state
from .proof import chip

Multiply = Callable[[Product], tuple[Tensor, ...]]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
_LAYERS_TIMED = 4  # of a model: together they are larger than the chip's caches


class Weights(NamedTuple):
    """Of one layer: norms [C], projections [N, C], output [C, N], down [C, F]. Contiguous, of one dtype and device."""

    input_norm: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    post_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def runs_on(device: torch.device) -> bool:
    """Whether a device is of a type that the kernel is for. It is asked at every step, on CPUs too."""
    return device.type == "cuda" or (device.type == "cpu" and triton.INTERPRETED)


class Layers:
    """The layers of a model, and what is known of them on this chip."""

    def __init__(self, weights: Sequence[Weights], eps: float):
        self.weights, self.eps = [*weights], eps
        shapes = {tuple(weight.shape for weight in layer) for layer in weights}
        # of each weight of a layer, by its name; empty where the layers differ
        self._shapes = dict(zip(Weights._fields, *shapes, strict=True)) if len(shapes) == 1 else {}
        self._known: dict[tuple[object, ...], str] = {}  # what is settled

    def run(self, x: Tensor, number: int, attend: Attend) -> Tensor:
        """Layer `number` of x [M, C], M up to 32.

        attend: (query, key, value), each [M, its weight's N], -> [M, the output weight's columns], contiguous.
        """
        return _run(x, self.weights[number], self.eps, attend, few_rows.launched)

    def why_not(self, x: Tensor, backend: str) -> str:
        """The reason why `run` is not taken for x [M, C]; '' where it is.

        backend: "auto" asks for a trial and for times, which may run here; "triton" for neither.
        """
        if not self._shapes:
            return "the layers have different sizes"
        if not is_plain_state():
            return "a mode, a transform or a tracer has to see the operators"
        if not all(few_rows.fits(len(x), shape[-1]) for shape in self._shapes.values()):
            return f"the kernel takes 1 to {MOST_ROWS} rows, got {len(x)}, and weights of up to 2^24 columns"
        if reason := few_rows.why_not(x.device, x.dtype):
            return reason
        if backend == "triton":
            return ""
        if x.device.type not in dispatch.PROVED:
            return "auto takes it on NVIDIA GPUs alone"
        num_rows = 1 << (len(x) - 1).bit_length()
        key = proof.generation, proof.MODE, num_rows
        if key not in self._known:
            if reason := proof.why_not_few_rows(x.device, x.dtype):
                return reason
            if not (times := self._times(x, num_rows)):
                return "a CUDA graph is being captured, and it was not timed on this chip yet"
            is_faster = proof.fastest_first(times, ("composed",), ("triton",))[0] == "triton"
            reason = "" if is_faster else "PyTorch's operators take less time for these layers on this chip"
            key = proof.generation, proof.MODE, num_rows
            self._known[key] = reason
        return self._known[key]

    def _times(self, x: Tensor, num_rows: int) -> Mapping[str, float]:
        """Way -> milliseconds of some layers, from the file or measured now; empty where this is no moment for it."""
        widths = [x.shape[1], *(self._shapes[name][0] for name in ("query", "key", "value", "gate"))]
        dtype = str(x.dtype).removeprefix("torch.")
        shape_class = f"few_rows {dtype} {', '.join(map(str, widths))}, {num_rows} rows"
        if (times := proof.times_of(shape_class, x.device)) or chip.is_capturing(x.device):
            return times
        times = self._measured(x, num_rows)
        with contextlib.suppress(proof.Busy):
            proof.keep_times(shape_class, x.device, times)
        return times

    def _measured(self, x: Tensor, num_rows: int) -> dict[str, float]:
        """Both ways through some of the layers, without their attention."""
        some = self.weights[:_LAYERS_TIMED]
        given, attended = (
            torch.linspace(-1, 1, num_rows * width, device=x.device).to(x.dtype).view(num_rows, width)
            for width in (x.shape[1], some[0].output.shape[1])
        )

        def run(multiply: Multiply) -> None:
            for weights in some:
                _run(given, weights, self.eps, lambda query, key, value: attended, multiply)

        ways = {"triton": few_rows.launched, "composed": few_rows.composed}
        return {
            name: chip.milliseconds(x.device, chip.repeatable(x.device, functools.partial(run, way)))
            for name, way in ways.items()
        }


def _run(x: Tensor, weights: Weights, eps: float, attend: Attend, multiply: Multiply) -> Tensor:
    projections = weights.query, weights.key, weights.value
    attended = attend(*multiply(Product(x, projections, weights.input_norm, eps)))
    (x,) = multiply(Product(attended, (weights.output,), residual=x))
    (hidden,) = multiply(Product(x, (weights.gate, weights.up), weights.post_norm, eps, gated=True))
    return multiply(Product(hidden, (weights.down,), residual=x))[0]
