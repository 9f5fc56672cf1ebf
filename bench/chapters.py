"""What counts of the ledgers: of every setting the newest run, chip by chip; and the words under a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from .ledger import Row, Run, read

OURS = ("zinit cpu", "zinit triton", "zinit cuda")


class Measured(NamedTuple):
    """A row and the run it was measured in."""

    row: Row
    run: Run


def newest(runs: Iterable[Run]) -> list[Measured]:
    """Of every setting the rows of the last run that measured it, in the order of the ledger; of a run of some
    providers alone only where no other measured it."""
    by_setting: dict[tuple[str, ...], list[Measured]] = {}
    whole: set[tuple[str, ...]] = set()
    for run in runs:
        fresh: set[tuple[str, ...]] = set()
        for row in run.rows:
            if run.conditions.get("providers"):
                if row.setting in whole:
                    continue
            else:
                whole.add(row.setting)
            if row.setting not in fresh:
                fresh.add(row.setting)
                by_setting[row.setting] = []
            by_setting[row.setting].append(Measured(row, run))
    return [measured for group in by_setting.values() for measured in group]


def chapters(results: Path) -> dict[str, list[Measured]]:
    """chip's folder -> what counts of its ledgers; raises LedgerError where one cannot be believed."""
    found: dict[str, list[Measured]] = {}
    for path in sorted(results.glob("*/*.jsonl")):
        if rows := newest(read(path)):
            found.setdefault(path.parent.name, []).extend(rows)
    return found


def grouped(rows: Sequence[Measured], *names: str) -> dict[tuple[str, ...], list[Measured]]:
    """Rows by the values of some of their fields, in the order they came."""
    found: dict[tuple[str, ...], list[Measured]] = {}
    for measured in rows:
        found.setdefault(tuple(getattr(measured.row, name) for name in names), []).append(measured)
    return found


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        f"|{' --- |' * len(header)}",
        *(f"| {' | '.join(cells)} |" for cells in lines),
        "",
    ]


def span(values: Iterable[float | int], digits: str = "") -> str:
    """ "0.42 to 0.55": least and greatest; one of them where they are the same."""
    known = sorted(values)
    return " to ".join(dict.fromkeys(f"{value:{digits}}" for value in (known[0], known[-1]))) if known else ""


def rounds_of(rows: Sequence[Measured]) -> str:
    """ ", 3 to 41 rounds"; "" for what is no time."""
    known = span(m.row.rounds for m in rows if m.row.rounds)
    return f", {known} rounds" if known else ""


def conditions_of(rows: Sequence[Measured]) -> list[str]:
    """A sentence for every commit, machine and set of versions that the rows were measured with."""
    alike: dict[str, list[Measured]] = {}
    for measured in rows:
        facts = measured.run.conditions
        libraries = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        malloc = "" if facts["malloc"] == "default" else f", malloc {facts['malloc']}"
        settings = "".join(f", {name}={value}" for name, value in facts.get("settings", {}).items())
        same = f"{facts['chip']} ({facts['instructions']}), commit {facts['commit']}, {libraries}{malloc}{settings}"
        alike.setdefault(same, []).append(measured)
    return [
        f"{same}, {span(m.run.conditions['time'][:10] for m in found)}, load of the minute before "
        f"{span((m.run.conditions['load'] for m in found), '.1f')}{rounds_of(found)}."
        for same, found in alike.items()
    ]
