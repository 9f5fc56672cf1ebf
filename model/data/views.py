"""Samples of several files as one sequence, without a copy, and what can be told of many samples at once."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import overload

import numpy as np

from .samples import Sample


class SampleSequence(Sequence[Sample]):
    """Samples that are made when they are asked for: `_at` makes the one at a place from 0 on."""

    @abstractmethod
    def _at(self, place: int) -> Sample: ...

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        places = range(len(self))[index]
        return self._at(places) if isinstance(places, int) else [self._at(place) for place in places]


class Joined(SampleSequence):
    """The samples of all parts, one part after the other."""

    def __init__(self, parts: Sequence[Sequence[Sample]]):
        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def part_of(self, index: int) -> int:
        """Which part a sample is of."""
        return bisect_right(self.ends, index)

    def _at(self, place: int) -> Sample:
        part = self.part_of(place)
        return self.parts[part][place - self.ends[part] + len(self.parts[part])]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample."""
        return np.concatenate([np.zeros(0, np.int64), *map(token_lengths, self.parts)])

    @property
    def digests(self) -> np.ndarray:
        """`sample_digest` of each sample."""
        return np.concatenate([np.zeros(0, np.uint64), *map(sample_digests, self.parts)])


class Subset(SampleSequence):
    """Some samples of a sequence, by their places in it."""

    def __init__(self, samples: Sequence[Sample], places: Sequence[int]):
        self.samples, self.places = samples, np.asarray(places, np.int64)

    def __len__(self) -> int:
        return len(self.places)

    def _at(self, place: int) -> Sample:
        return self.samples[int(self.places[place])]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample."""
        return token_lengths(self.samples)[self.places]

    @property
    def digests(self) -> np.ndarray:
        """`sample_digest` of each sample."""
        return sample_digests(self.samples)[self.places]


def token_lengths(samples: Sequence[Sample]) -> np.ndarray:
    """The tokens of each sample, int64; samples on disk are not read for it."""
    known = getattr(samples, "lengths", None)
    return np.array([len(sample.tokens) for sample in samples], np.int64) if known is None else known


def sample_digests(samples: Sequence[Sample]) -> np.ndarray:
    """The digest of each sample, uint64."""
    known = getattr(samples, "digests", None)
    return np.array([sample_digest(sample) for sample in samples], np.uint64) if known is None else known


def sample_digest(sample: Sample) -> int:
    """64 bits of a sample's tokens and images: equal for duplicates."""
    content = np.asarray(sample.tokens, "<i4").tobytes() + repr(sample.images).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
