"""Interleaved timing: every function once a round, in a fresh order; only ratios within a round are compared."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

MIN_ROUNDS, MAX_ROUNDS = 3, 41


class Times:
    """Seconds per function and round."""

    def __init__(self, seconds: Mapping[str, list[float]]):
        self.seconds = seconds

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """Median over the rounds of time(name) / time(other)."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True))

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))


def measure(functions: Mapping[str, Callable[[], object]], seconds: float) -> Times:
    """Rounds for about `seconds`, at least 3; every timed call follows an untimed one of itself."""
    order, shuffled = list(functions), random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in functions}
    stop = time.perf_counter() + seconds
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() > stop:
            break
        shuffled.shuffle(order)
        for name in order:
            functions[name]()  # untimed: a call is not charged for the caches that another one left behind
            start = time.perf_counter()
            functions[name]()
            found[name].append(time.perf_counter() - start)
    return Times(found)
