"""What a data set is like, said before training: lengths, duplicates, and the share of padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .samples import Sample, passes
from .views import sample_digests, token_lengths

_STEPS = 64  # steps of the first epoch that the share of padding is taken from


class DataReport(NamedTuple):
    """Lengths in tokens."""

    shortest: int
    median: float
    mean: float
    percentile_95: float
    longest: int
    total: int
    duplicates: int  # samples that another one before them equals
    padding: float  # share of what goes through the model in padded rows
    filled: float  # share of --max-tokens that a packed pass holds

    def __str__(self) -> str:
        same = "no duplicates" if not self.duplicates else f"{self.duplicates:,} duplicates"
        return (
            f"lengths of {self.shortest} to {self.longest} tokens, median {self.median:.0f}, mean {self.mean:.1f}, "
            f"95 % within {self.percentile_95:.0f}, {self.total:,} in all; {same}; padded rows would hold "
            f"{self.padding:.1%} padding, packed passes hold none and are {self.filled:.0%} full"
        )


def report_on(
    samples: Sequence[Sample], order: Sequence[int], batch_size: int, max_tokens: int
) -> DataReport:
    """The report on some samples. order: those of the first epoch, of which a step takes `batch_size`."""
    lengths, digests = token_lengths(samples), sample_digests(samples)
    inputs = lengths - 1
    real = padded = room = 0
    for start in range(0, min(len(order), batch_size * _STEPS), batch_size):
        step = [int(inputs[place]) for place in order[start : start + batch_size]]
        real += sum(step)
        for row in passes(step, max_tokens, packed=False):
            padded += len(row) * max(step[index] for index in row)
        for row in passes(step, max_tokens):
            room += max(sum(step[index] for index in row), max_tokens)
    return DataReport(
        shortest=int(lengths.min()),
        median=float(np.median(lengths)),
        mean=float(lengths.mean()),
        percentile_95=float(np.percentile(lengths, 95)),
        longest=int(lengths.max()),
        total=int(lengths.sum()),
        duplicates=len(digests) - len(np.unique(digests)),
        padding=1 - real / padded,
        filled=real / room,
    )
