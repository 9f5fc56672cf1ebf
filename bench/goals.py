"""Goals, and what measured rows say to each: met, or by how much missed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.table import Table

from .ledger import Row

Figure = Callable[[Row, Sequence[Row]], "float | None"]  # of a row, with all rows at hand
Select = Callable[[Row], bool]


class Goal(NamedTuple):
    """A bound on one figure of every row that `select` picks."""

    what: str
    select: Select
    figure: Figure
    bound: float
    at_least: bool = False


class Verdict(NamedTuple):
    """The figures that were found, worst first, and where; `excess` above 1: by how much the worst one misses."""

    figures: list[tuple[float, str]]
    met: int
    excess: float

    def __str__(self) -> str:
        if not self.figures:
            return "not measured"
        if self.met == len(self.figures):
            return "met"
        missed = f"missed by {100 * (self.excess - 1):.0f} %" if self.excess >= 1.005 else "missed by a hair"
        if len(self.figures) == 1:
            return missed
        return f"{missed} at worst ({self.figures[0][1]}); {self.met} of {len(self.figures)} met"


def ratio(*names: str) -> Figure:
    """The greatest of a row's ratios to these providers, of those it has."""
    return lambda row, rows: max((row.ratios[name] for name in names if name in row.ratios), default=None)


def faster_than(name: str) -> Figure:
    """How many times: the provider's time over the row's."""
    return lambda row, rows: 1 / row.ratios[name] if name in row.ratios else None


def rows_of(
    provider: str, suite: str, mode: str, *shapes: str, launch: str = "eager", dtype: str = "bfloat16"
) -> Select:
    """Rows with warm caches whose shape's name ends in one of these."""
    return lambda row: (
        (row.provider, row.suite, row.mode, row.launch, row.cache, row.dtype)
        == (provider, suite, mode, launch, "warm", dtype)
        and row.shape.endswith(shapes)
    )


def judged(goal: Goal, rows: Sequence[Row]) -> Verdict:
    found = [
        (figure, ", ".join(filter(None, (row.shape, row.layout))))
        for row in rows
        if goal.select(row) and (figure := goal.figure(row, rows)) is not None
    ]
    found.sort(reverse=not goal.at_least)
    excesses = [goal.bound / figure if goal.at_least else figure / goal.bound for figure, _ in found]
    return Verdict(found, sum(excess <= 1 for excess in excesses), max(excesses, default=0.0))


HEADER = ("goal", "bound", "measured", "")


def cells(goal: Goal, verdict: Verdict) -> list[str]:
    """Under `HEADER`: the range over all settings."""
    values = [figure for figure, _ in verdict.figures]
    span = dict.fromkeys(f"{figure:.3g}" for figure in (min(values), max(values))) if values else {}
    return [goal.what, f"{'>=' if goal.at_least else '<='} {goal.bound:g}", " - ".join(span), str(verdict)]


def goals_table(goals: Sequence[Goal], rows: Sequence[Row]) -> Table:
    """A line for each goal, those that were not measured too."""
    table = Table(*HEADER, title="goals", box=None, title_justify="left")
    verdicts = [judged(goal, rows) for goal in goals]
    for goal, verdict in zip(goals, verdicts, strict=True):
        table.add_row(*cells(goal, verdict))
    table.caption = summary(verdicts)
    table.caption_justify = "left"
    return table


def summary(verdicts: Sequence[Verdict]) -> str:
    """How many goals, and how many figures, are as good as asked."""
    known = [verdict for verdict in verdicts if verdict.figures]
    goals = sum(verdict.met == len(verdict.figures) for verdict in known)
    figures, met = sum(len(v.figures) for v in known), sum(v.met for v in known)
    return f"{goals} of {len(known)} goals met; {met} of {figures} figures"
