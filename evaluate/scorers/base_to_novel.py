"""Base-to-novel generalisation (Zhou et al., arXiv 2203.05557): train on half the classes, test on each half."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar

SHOTS, SEEDS = 16, (1, 2, 3)
_Label = TypeVar("_Label", bound=Hashable)


class Score(NamedTuple):
    """In percent, means over the seeds; harmonic_mean is that of the two means."""

    base: float
    novel: float
    harmonic_mean: float


def split(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """(base, novel): the first half of the sorted labels, with the middle one of an odd number, and the rest.

    Raises:
        ValueError: fewer than two labels.
    """
    known = sorted(set(labels))
    if len(known) < 2:
        raise ValueError(f"base and novel classes need at least 2 classes, got {len(known)}")
    half = -(-len(known) // 2)
    return known[:half], known[half:]


def validation_shots(shots: int) -> int:
    """Validation images a class for so many training images: as many, at most 4."""
    return min(shots, 4)


def harmonic_mean(base: float, novel: float) -> float:
    """2bn / (b + n); 0 where both are."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def score(seeds: Sequence[tuple[float, float]]) -> Score:
    """Args: (base, novel) accuracy in percent of each seed.

    Raises:
        ValueError: no seeds.
    """
    if not seeds:
        raise ValueError("expected the accuracies of at least one seed")
    base, novel = (sum(values) / len(seeds) for values in zip(*seeds, strict=True))
    return Score(base, novel, harmonic_mean(base, novel))
