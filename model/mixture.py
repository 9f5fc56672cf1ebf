"""Which samples of several files an epoch has: every file counts with a weight, or with a number of samples.

mixture = Mixture.of([52_000, 158_000], [Share(), Share(weight=0.5)])
mixture.size                  # 131,000 samples an epoch
mixture.order(seed, epoch)    # which ones, in which order
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from .data import epoch_order
from .errors import UserError

_SHARE = re.compile(
    r"(.+):(?:n=(-?\d{1,9})|(-?\d{0,9}\.?\d{0,9}(?:e[+-]?\d{1,3})?|[+-]?(?:nan|inf)))",
    re.DOTALL | re.IGNORECASE,
)


@dataclass(frozen=True)
class Share:
    """How much a file counts: `count` of its samples an epoch, or each of them `weight` times."""

    weight: float = 1.0
    count: int | None = None

    def of(self, available: int) -> int:
        """Samples an epoch, of a file that has so many."""
        if not available:
            return 0
        return max(round(available * self.weight), 1) if self.count is None else self.count


@dataclass(frozen=True)
class Mixture:
    """The samples of several files, one file's after the other's; an epoch has `counts[i]` of the `available[i]`."""

    available: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, available: Iterable[int], shares: Sequence[Share] | None = None) -> Mixture:
        """available: of each file, how many samples there are. shares: None = every sample once an epoch."""
        available = tuple(available)
        shares = [Share()] * len(available) if shares is None else shares
        return cls(
            available, tuple(share.of(number) for share, number in zip(shares, available, strict=True))
        )

    @property
    def size(self) -> int:
        """Samples an epoch."""
        return sum(self.counts)

    def order(self, seed: int, epoch: int) -> list[int]:
        """The samples of an epoch in their order: a function of its arguments, so that a resumed run goes on in it.

        A file whose samples do not all fit goes on in the next epoch where it stopped in this one: every sample has
        been seen before one is seen again.
        """
        chosen: list[int] = []
        first = 0
        for part, (available, count) in enumerate(zip(self.available, self.counts, strict=True)):
            chosen += [first + i for i in _turn(part, available, count, seed, epoch)]
            first += available
        return [chosen[place] for place in epoch_order(len(chosen), seed, epoch)]


def _turn(part: int, available: int, count: int, seed: int, epoch: int) -> list[int]:
    """The `count` samples of one file that are due in an epoch."""
    if count == available:
        return list(range(available))
    position, found = epoch * count, []
    while len(found) < count:
        round_, start = divmod(position + len(found), available)
        order = list(range(available))
        Random(f"mixture {seed} {part} {round_}").shuffle(order)
        found += order[start : start + count - len(found)]
    return found


def read_share(argument: str) -> tuple[Path, Share]:
    """FILE, FILE:WEIGHT or FILE:n=COUNT, as --data takes them. A file whose name reads so is the file."""
    match = _SHARE.fullmatch(argument)
    if Path(argument).exists() or match is None or match[3] == "":
        return Path(argument), Share()
    if match[2] is not None:
        share = Share(count=int(match[2]))
    elif not any(character.isalnum() for character in match[3]):  # "." or "-": a file's name
        return Path(argument), Share()
    else:
        try:
            share = Share(weight=float(match[3]))
        except ValueError:  # ":e5"
            return Path(argument), Share()
    if (share.count is not None and share.count < 1) or not 0 < share.weight < math.inf:
        raise UserError(
            f"--data {argument}: a file counts with a weight above 0, or with at least one sample."
        )
    return Path(match[1]), share
