"""Two runs of one commit on one machine: how far their ratios differ. `python -m bench agree attention`"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from .conditions import what_and_where
from .ledger import LedgerError, Row, read


class Pair(NamedTuple):
    """One ratio by two runs."""

    where: str
    provider: str
    other: str
    first: float
    second: float

    @property
    def difference(self) -> float:
        """As a share: 0.1 where one is 1.1 times the other."""
        return max(self.first, self.second) / min(self.first, self.second) - 1


def last_two(ledger: Path) -> Iterable[tuple[Row, Row]]:
    """Every row that at least two runs of one commit, machine and set of versions hold, of the last two of them."""
    alike: dict[tuple[str, ...], list[Row]] = {}
    found: dict[tuple[str, ...], tuple[Row, Row]] = {}
    for run in read(ledger):
        for row in run.rows:
            name = (*row.setting, row.provider)
            rows = alike.setdefault((*name, what_and_where(run.conditions)), [])
            rows.append(row)
            if len(rows) > 1:
                found[name] = (rows[-2], rows[-1])
    return found.values()


def pairs(ledger: Path) -> list[Pair]:
    """All ratios by both runs: the drop-ins and the clock's check go by other names than this package's."""
    return [
        Pair(", ".join(filter(None, row.setting[1:5])), row.provider, other, row.ratios[other], ratio)
        for row, later in last_two(ledger)
        for other, ratio in later.ratios.items()
        if other in row.ratios
    ]


def agreement(results: Path, suites: Sequence[str], within: float) -> tuple[Table, bool]:
    """A line for each chip's suite, and whether all ratios are `within` a share of each other."""
    table = Table("ledger", "ratios", f"within {100 * within:.0f} %", "median", "worst", "where", box=None)
    worst = -1.0
    for ledger in (path for suite in suites for path in sorted(results.glob(f"*/{suite}.jsonl"))):
        found = sorted(pairs(ledger), key=lambda pair: pair.difference)
        if not found:
            continue
        last = found[-1]
        worst = max(worst, last.difference)
        table.add_row(
            str(ledger.relative_to(results)), str(len(found)), str(sum(pair.difference <= within for pair in found)),
            f"{100 * statistics.median(pair.difference for pair in found):.1f} %", f"{100 * last.difference:.1f} %",
            f"{last.where}: {last.provider} / {last.other} {last.first:.3g}, {last.second:.3g}",
        )  # fmt: skip
    if worst < 0:
        raise LedgerError(f"no setting in {results} was measured twice: run the same suite again.")
    return table, worst <= within
