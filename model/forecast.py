"""What a run would take, without one: parameters, memory and time.

print(forecast(base, adapter, training, mixture, recipe))
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .data import Batch, Sample, batches
from .llama import Llama
from .mixture import Mixture
from .quantised import num_weights, stored_bytes, stored_weights
from .recipe import Recipe
from .train_loop import batch_loss

_STATE = 4  # numbers for each one that is trained: itself, its gradient, and AdamW's two means


class Forecast(NamedTuple):
    """Bytes and seconds."""

    base_parameters: int
    trained_parameters: int
    weights: int  # bytes of the base
    training_state: int  # bytes of the adapter, its gradients and the optimizer
    activations: int  # bytes that the largest pass of the first step keeps for its backward pass
    pass_tokens: int  # of that pass
    tokens_per_second: float
    num_steps: int
    seconds: float  # of all steps; validation comes on top

    def __str__(self) -> str:
        total = self.weights + self.training_state + self.activations
        return (
            f"parameters: {self.base_parameters:,} of the base, frozen, and {self.trained_parameters:,} that are "
            f"trained; memory: {_size(total)} ({_size(self.weights)} of weights, {_size(self.training_state)} of "
            f"training state, {_size(self.activations)} of activations in a pass of {self.pass_tokens} tokens), "
            f"without the libraries' own; time: {timedelta(seconds=round(self.seconds))} for {self.num_steps} steps "
            f"at {self.tokens_per_second:,.0f} tokens/s as that pass had"
        )


def forecast(
    base: Llama, adapter: nn.Module, samples: Sequence[Sample], mixture: Mixture, recipe: Recipe
) -> Forecast:
    """Measures the largest pass of the first step, twice, of which the second counts. Nothing is trained."""
    order = mixture.order(recipe.seed, 0)
    first = list(
        batches(
            [samples[place] for place in order[: recipe.batch_size]], recipe.max_tokens, packed=recipe.packed
        )
    )
    largest = max(first, key=lambda batch: batch.tokens.numel())
    activations, _ = _measure(base, adapter, largest, recipe)
    _, seconds = _measure(base, adapter, largest, recipe)
    rate = largest.num_tokens / seconds
    mean = sum(batch.num_tokens for batch in first) / min(len(order), recipe.batch_size)
    trained = sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad)
    return Forecast(
        base_parameters=num_weights(base),
        trained_parameters=trained,
        weights=sum(map(stored_bytes, stored_weights(base))),
        training_state=4 * _STATE * trained,
        activations=activations,
        pass_tokens=largest.num_tokens,
        tokens_per_second=rate,
        num_steps=recipe.num_steps(mixture.size),
        seconds=recipe.epochs * mixture.size * mean / rate,
    )


def _measure(base: Llama, adapter: nn.Module, batch: Batch, recipe: Recipe) -> tuple[int, float]:
    """(bytes that are kept for the backward pass, seconds of both passes)."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*base.parameters(), *adapter.parameters())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    began = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = batch_loss(base, adapter, batch, recipe.autocast)  # type: ignore[arg-type]
    loss.backward()
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)
    seconds = time.perf_counter() - began
    adapter.zero_grad(set_to_none=True)
    return sum(kept.values()), seconds


def _size(number: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024  # type: ignore[assignment]
    raise AssertionError
