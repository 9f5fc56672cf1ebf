"""Interleaved timing: every function once a round, in a fresh order; only ratios within a round are compared."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from .clock import Clock

MIN_ROUNDS, MAX_ROUNDS = 3, 101


class Times:
    """Seconds per function and round."""

    def __init__(self, seconds: Mapping[str, list[float]]):
        self.seconds = seconds

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def quantile(self, name: str, share: float) -> float:
        """The value below which `share` of the rounds lie, interpolated."""
        return torch.tensor(self.seconds[name], dtype=torch.float64).quantile(share).item()

    def ratio(self, name: str, *others: str) -> float:
        """Median over the rounds of time(name) / the least of the others' times."""
        least = [min(self.seconds[other][i] for other in others) for i in range(self.rounds)]
        return statistics.median(a / b for a, b in zip(self.seconds[name], least, strict=True))

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))


def measure(
    functions: Mapping[str, Callable[[], object]], seconds: float, clock: Callable[..., float] | None = None
) -> Times:
    """Rounds for about `seconds`, at least 3; every timed call follows an untimed one of itself."""
    clock = clock or Clock(torch.device("cpu"))
    order, shuffled = list(functions), random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in functions}
    stop = time.perf_counter() + seconds
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() > stop:
            break
        shuffled.shuffle(order)
        for name in order:
            found[name].append(clock(functions[name]))
    return Times(found)
