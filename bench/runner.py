"""Runs jobs with a progress bar and an estimate of what is left; every row goes to the ledger the moment it exists."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

from .conditions import conditions, folder_name, what_and_where, why_failed
from .ledger import Ledger, LedgerError, Row, read
from .shapes import COMPILED

COMPILING = ("none", "few", "all")  # shapes at which providers that torch.compile first are timed too
Note = Callable[[str], None]  # tells the user, once, what was left out and why


@dataclass(frozen=True)
class Options:
    """What to measure, and how long."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    seconds: float = 3.0  # of rounds per setting
    smoke: bool = False  # tiny shapes
    compiled: str = "few"  # one of COMPILING
    cold: tuple[bool, ...] = (False,)
    only_shapes: tuple[str, ...] = ()  # parts of names; empty = all
    only_providers: tuple[str, ...] = ()
    only_jobs: tuple[str, ...] = ()
    resume: bool = False  # without the jobs that this commit has done under the same conditions

    def compiles(self, name: str, backward: bool) -> bool:
        if self.compiled == "few":  # on a GPU of forward alone: it has more modes than minutes
            return name in COMPILED and not (backward and self.device.type == "cuda")
        return self.compiled == "all"

    def wants_shape(self, name: str) -> bool:
        return _matches(name, self.only_shapes)

    def wants_provider(self, name: str) -> bool:
        return _matches(name, self.only_providers)


def _matches(name: str, parts: Sequence[str]) -> bool:
    return not parts or any(part.lower() in name.lower() for part in parts)


class Job(NamedTuple):
    """One step of the progress bar."""

    title: str
    run: Callable[[Note], Iterator[Row]]


def run(
    suites: Mapping[str, Sequence[Job]], options: Options, results: Path, console: Console
) -> tuple[list[Row], list[str]]:
    """The rows of all jobs, appended to results/<chip>/<suite>.jsonl, and the titles of the jobs that raised: those
    keep the rows they had, and the jobs after them run. Ctrl-C ends the run and keeps what is done."""
    facts = {
        **conditions(options.device), "providers": list(options.only_providers), "compile": options.compiled
    }  # fmt: skip
    folder = results / folder_name(str(facts["chip"]))
    suites = {
        name: [job for job in jobs if _matches(job.title, options.only_jobs)] for name, jobs in suites.items()
    }
    if options.resume:
        suites = {name: unfinished(folder / f"{name}.jsonl", facts, jobs) for name, jobs in suites.items()}
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

        total, began = sum(map(len, suites.values())), time.monotonic()
        task = progress.add_task("", total=total)
        try:
            for name, jobs in suites.items():
                for job in jobs:
                    progress.update(task, description=job.title)
                    if not console.is_terminal:  # a log shows no bar
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
    """The jobs that no run of the same commit, versions and machine has done with as many providers."""
    runs = read(path) if path.exists() else []
    done = {
        title
        for run in runs
        if what_and_where(run.conditions) == what_and_where(facts) and covers(run.conditions, facts)
        for title in run.jobs
    }
    return [job for job in jobs if job.title not in done]


def covers(done: Mapping[str, object], wanted: Mapping[str, object]) -> bool:
    """Whether a run left out no provider that is wanted; ledgers from before these facts were kept left none out."""
    compiled = [COMPILING.index(str(facts.get("compile", "few"))) for facts in (done, wanted)]
    return done.get("providers", []) in ([], wanted["providers"]) and compiled[0] >= compiled[1]
