"""A suite: what it measures, the targets it must reach, and how its jobs are run.

Every file in bench/suites that defines SUITES is found by `suites`; adding a suite takes no other line.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from .ledger import BenchError, Ledger, LedgerError, Measured, Row, read
from .machine import conditions, folder_name, same_conditions, why_failed
from .problem import COMPILED

COMPILING = ("none", "few", "all")  # for which shapes providers that use torch.compile are measured
Note = Callable[[str], None]  # tells the user, once, what was left out and why


@dataclass(frozen=True)
class Options:
    """What to measure, and for how long."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    seconds: float = 2.0  # of rounds per setting
    smoke: bool = False  # tiny shapes
    compiled: str = "few"  # one of COMPILING
    cold: tuple[bool, ...] = (False,)
    only_shapes: tuple[str, ...] = ()  # parts of names; empty = all
    only_providers: tuple[str, ...] = ()
    only_jobs: tuple[str, ...] = ()
    resume: bool = False  # leave out the jobs that this commit has finished under the same conditions
    scratch: Path | None = None  # for large files; None = the system's folder for temporary files

    def compiles(self, shape: str, backward: bool) -> bool:
        if self.compiled == "few":  # on a GPU only forward: it has more modes than minutes
            return shape in COMPILED and not (backward and self.device.type == "cuda")
        return self.compiled == "all"

    def wants_shape(self, name: str) -> bool:
        return _matches(name, self.only_shapes)

    def wants_provider(self, name: str) -> bool:
        return _matches(name, self.only_providers)


def _matches(name: str, parts: Sequence[str]) -> bool:
    return not parts or any(part.lower() in name.lower() for part in parts)


class Job(NamedTuple):
    """One step of the progress bar."""

    title: str  # begins with the suite's name
    run: Callable[[Note], Iterator[Row]]


Figure = Callable[[Row, Sequence[Row]], "float | None"]  # a figure of a row, given all rows
Select = Callable[[Row], bool]


class Target(NamedTuple):
    """A bound on one figure of every row that `select` accepts; by default the figure must be at least the bound."""

    what: str
    select: Select
    figure: Figure
    bound: float
    at_most: bool = False

    def misses_by(self, figure: float) -> float:
        """Above 1 the target is missed: 1.2 = by 20 %."""
        return figure / self.bound if self.at_most else self.bound / max(figure, 1e-12)


class Comparison(NamedTuple):
    """A line of the summary: how many times as fast this package is as another, over the rows that `select` accepts."""

    what: str
    other: str
    select: Select
    speed: Figure
    readme_row: int = 0  # its place among the README's rows; 0 = only on the page

    def speeds(self, rows: Sequence[Measured]) -> list[tuple[Measured, float]]:
        plain = [m.row for m in rows]
        return [
            (m, speed) for m in rows if self.select(m.row) and (speed := self.speed(m.row, plain)) is not None
        ]


class Chart(NamedTuple):
    """A bar chart of one of a suite's figures: a bar per provider, a panel per setting.

    The title says what was found: its "{}" becomes the range of the figure of `ours` over that of `other`.
    """

    figure: str
    title: str
    ours: str
    other: str
    higher_is_better: bool = True
    reference: str = ""  # a figure in the same unit, drawn as a line: what no provider can do without

    def ratio(self, rows: Iterable[Row]) -> float | None:
        found = {row.provider: row.figures.get(self.figure) for row in rows}
        ours, other = found.get(self.ours), found.get(self.other)
        return ours / other if ours and other else None


@dataclass(frozen=True)
class Suite:
    """A suite and all that the page, the pictures and the commands need to know of it."""

    name: str
    about: str  # the paragraph above its tables
    jobs: Callable[[Options], list[Job]]
    targets: Mapping[str, Sequence[Target]] = field(default_factory=dict)  # by type of device
    comparisons: Mapping[str, Sequence[Comparison]] = field(default_factory=dict)  # likewise
    by_shape: bool = False  # its tables have a line per shape; else a line per shape and provider
    charts: Sequence[Chart] = ()
    # (title, call, least bytes that it moves) for `python -m bench profile`; None = it cannot be profiled
    profiled: Callable[[Options], tuple[str, Callable[[], object], int]] | None = None
    in_all: bool = True  # False: it runs only when named, because of what it needs


def suites() -> dict[str, Suite]:
    """Every suite in bench/suites by name, in the order of the files' names."""
    folder = Path(__file__).resolve().parent / "suites"
    modules = [importlib.import_module(f"bench.suites.{m.name}") for m in pkgutil.iter_modules([str(folder)])]
    return {suite.name: suite for module in modules for suite in module.SUITES}


def targets_of(device: str) -> list[Target]:
    """All suites' targets for a type of device."""
    return [target for suite in suites().values() for target in suite.targets.get(device, ())]


def comparisons_of(device: str, in_readme: bool = False) -> list[Comparison]:
    """All suites' comparisons for a type of device, or the README's in their order."""
    found = [line for suite in suites().values() for line in suite.comparisons.get(device, ())]
    return sorted((c for c in found if c.readme_row), key=lambda c: c.readme_row) if in_readme else found


def rows_of(
    provider: str, suite: str, mode: str, *shapes: str, launch: str = "eager", dtype: str = "bfloat16"
) -> Select:
    """Rows with warm caches whose shape's name ends with one of these."""
    wanted = (provider, suite, mode, launch, "warm", dtype)
    return lambda row: (
        (row.provider, row.suite, row.mode, row.launch, row.cache, row.dtype) == wanted
        and row.shape.endswith(shapes)
    )


def speed_over(*others: str) -> Figure:
    """How many times as fast as the fastest of these providers, of those that were measured."""

    def figure(row: Row, rows: Sequence[Row]) -> float | None:
        return min((speed for other in others if (speed := row.speed_over(other))), default=None)

    return figure


def speed_of(ours: str) -> Figure:
    """For rows of another provider: how many times as fast as it `ours` is."""
    return lambda row, rows: row.ratios.get(ours)


class Verdict(NamedTuple):
    """The figures of a target's rows and their settings, worst first; how many meet it; what the worst misses by."""

    figures: list[tuple[float, str]]
    met: int
    worst: float

    def __str__(self) -> str:
        if not self.figures:
            return "not measured"
        if self.met == len(self.figures):
            return "met"
        by = f"by {100 * (self.worst - 1):.0f} %" if self.worst >= 1.005 else "by less than 1 %"
        if len(self.figures) == 1:
            return f"missed {by}"
        return f"missed {by} at worst ({self.figures[0][1]}); {self.met} of {len(self.figures)} met"


def judged(target: Target, rows: Sequence[Row]) -> Verdict:
    found = [
        (figure, ", ".join(filter(None, (row.shape, row.layout))))
        for row in rows
        if target.select(row) and (figure := target.figure(row, rows)) is not None
    ]
    found.sort(reverse=target.at_most)
    misses = [target.misses_by(figure) for figure, _ in found]
    return Verdict(found, sum(miss <= 1 for miss in misses), max(misses, default=0.0))


TARGET_HEADER = ("target", "bound", "measured", "verdict")


def target_cells(target: Target, verdict: Verdict) -> list[str]:
    """A line under TARGET_HEADER; what was measured is a range over all settings."""
    values = [figure for figure, _ in verdict.figures]
    span = dict.fromkeys(f"{figure:.3g}" for figure in (min(values), max(values))) if values else {}
    sign = "at most" if target.at_most else "at least"
    return [target.what, f"{sign} {target.bound:.3g}", " to ".join(span), str(verdict)]


def targets_table(
    targets: Sequence[Target], rows: Sequence[Row], title: str = "targets", found: str = "measured"
) -> Table:
    """A line for each target, also for those that were not measured. found: what the rows' figures are."""
    header = [found if name == "measured" else name for name in TARGET_HEADER]
    table = Table(*header, title=title, box=None, title_justify="left", caption_justify="left")
    verdicts = [judged(target, rows) for target in targets]
    for target, verdict in zip(targets, verdicts, strict=True):
        table.add_row(*target_cells(target, verdict))
    table.caption = targets_met(verdicts)
    return table


def targets_met(verdicts: Sequence[Verdict]) -> str:
    """ "20 of 31 targets met (104 of 128 figures)": of those that were measured."""
    known = [verdict for verdict in verdicts if verdict.figures]
    whole = sum(verdict.met == len(verdict.figures) for verdict in known)
    figures, met = sum(len(v.figures) for v in known), sum(v.met for v in known)
    return f"{whole} of {len(known)} targets met ({met} of {figures} figures)"


def run(
    jobs: Mapping[str, Sequence[Job]], options: Options, results: Path, console: Console
) -> tuple[list[Row], list[str]]:
    """Runs the jobs of each suite; the rows of all, and the titles of the jobs that raised.

    A row is appended to results/<chip>/<suite>.jsonl before the next one is measured. A job that raises keeps its
    rows, and the jobs after it run. Ctrl-C ends the run and keeps what was measured.
    """
    facts = {
        **conditions(options.device), "providers": list(options.only_providers), "compile": options.compiled
    }  # fmt: skip
    folder = results / folder_name(str(facts["chip"]))
    jobs = {name: [job for job in of if _matches(job.title, options.only_jobs)] for name, of in jobs.items()}
    if options.resume:
        jobs = {name: unfinished(folder / f"{name}.jsonl", facts, of) for name, of in jobs.items()}
    rows: list[Row] = []
    failed: list[str] = []
    ledgers: dict[str, Ledger] = {}
    said: set[str] = set()
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:

        def note(text: str) -> None:
            if text not in said:
                said.add(text)
                progress.console.print(text, style="yellow", highlight=False, markup=False)

        total, began = sum(map(len, jobs.values())), time.monotonic()
        task = progress.add_task("", total=total)
        try:
            for name, job in ((name, job) for name, of in jobs.items() for job in of):
                progress.update(task, description=job.title)
                if not console.is_terminal:  # a log shows no progress bar
                    done, passed = int(progress.tasks[0].completed), time.monotonic() - began
                    left = f", about {passed / done * (total - done):.0f} s left" if done else ""
                    console.print(f"{done} of {total}, {passed:.0f} s{left}: {job.title}", style="dim")
                try:
                    for row in job.run(note):
                        if name not in ledgers:
                            ledgers[name] = Ledger(folder / f"{name}.jsonl", facts)
                        ledgers[name].add(row)
                        rows.append(row)
                    if name in ledgers:
                        ledgers[name].finish(job.title)
                except LedgerError:
                    raise
                except BenchError as error:
                    failed.append(job.title)
                    note(f"{job.title}: left out, {error}")
                except Exception as error:  # any: the jobs after it have figures to give
                    failed.append(job.title)
                    note(f"{job.title}: stopped, {why_failed(error)}")
                progress.advance(task)
        except KeyboardInterrupt:
            note(f"stopped: the {len(rows)} rows measured so far are kept")
    for ledger in ledgers.values():
        console.print(f"appended to {ledger.path}", highlight=False, soft_wrap=True)
    return rows, failed


def unfinished(path: Path, facts: Mapping[str, object], jobs: Sequence[Job]) -> list[Job]:
    """The jobs that no run under the same conditions has finished with as many providers."""
    done = {
        title
        for run in (read(path) if path.exists() else [])
        if same_conditions(run.conditions) == same_conditions(facts) and covers(run.conditions, facts)
        for title in run.jobs
    }
    return [job for job in jobs if job.title not in done]


def covers(done: Mapping[str, object], wanted: Mapping[str, object]) -> bool:
    """Whether a finished run measured every provider that is wanted now. Old ledgers without these facts did."""
    compiled = [COMPILING.index(str(facts.get("compile", "few"))) for facts in (done, wanted)]
    return done.get("providers", []) in ([], wanted["providers"]) and compiled[0] >= compiled[1]
