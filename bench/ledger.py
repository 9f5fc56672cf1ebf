"""The ledger: a file of JSON lines, one for each measured figure, to which runs only append.

    {"kind": "run", "run": ID, conditions...}
    {"kind": "row", "run": ID, "suite": ..., ...}
    {"kind": "job", "run": ID, "title": ...}          after the last row of a job; --resume skips such jobs

A run that was interrupted keeps the rows it had. Two runs at once take turns at writing. Ledgers from before November
2026 also hold digests ("after", "digest"), which are ignored: git has the history of every line.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from zinit_kernels.console import InputError

RENAMED_SUITES = {"bars": "targets"}  # the name in older ledgers and commits -> the name now


class BenchError(InputError):
    """Something that the user can mend, in one sentence."""


class LedgerError(BenchError):
    """A ledger that cannot be read or written: which file, which line, why."""


@dataclass(frozen=True)
class Row:
    """One figure: who computed what, and how long it took. Rates are in 10^12 and 10^9 per second."""

    suite: str  # its name in bench/suites
    shape: str
    sizes: Mapping[str, int]
    mode: str  # forward | backward | forward+backward | decode | training step | ...
    dtype: str
    provider: str  # who computed it
    layout: str = ""  # of keys and values in memory, where both layouts were measured
    launch: str = "eager"  # or graph
    cache: str = "warm"  # or cold
    rounds: int = 0
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    ratios: Mapping[str, float] = field(
        default_factory=dict
    )  # this time / another provider's in the same round
    figures: Mapping[str, float] = field(default_factory=dict)  # what else the suite measures: "name unit"

    @property
    def setting(self) -> tuple[str, ...]:
        """What rows must have in common to be compared."""
        return (self.suite, self.shape, self.mode, self.dtype, self.layout, self.launch, self.cache)

    @property
    def is_ours(self) -> bool:
        """Whether this package computed it: by its own name, or inside a PEFT model."""
        return self.provider.startswith("zinit") or self.provider.endswith(", accelerated")

    @property
    def is_plain(self) -> bool:
        """Called from Python with warm caches, as users do; not a CUDA graph's replay, not with cold caches."""
        return (self.launch, self.cache) == ("eager", "warm")

    def speed_over(self, other: str) -> float | None:
        """How many times as fast as another provider this one is; above 1 it is faster. None where not measured."""
        ratio = self.ratios.get(other)
        return 1 / ratio if ratio else None


@dataclass(frozen=True)
class Run:
    """Rows that were measured by one command, under the same conditions."""

    identity: str
    conditions: Mapping[str, Any]
    rows: tuple[Row, ...]
    jobs: tuple[str, ...] = ()  # titles of the jobs that were finished


class Measured(NamedTuple):
    """A row and the run in which it was measured."""

    row: Row
    run: Run


class Ledger:
    """Appends one run to a file; a row is on disk when `add` returns."""

    def __init__(self, path: Path, conditions: Mapping[str, Any]):
        if path.exists():
            read(path)  # append only to what can be read
        path.parent.mkdir(parents=True, exist_ok=True)
        # the random part tells two runs apart that begin within the same second
        self.path, self.identity = path, f"{conditions['time']} {conditions['commit']} {secrets.token_hex(2)}"
        self._append({"kind": "run", "run": self.identity, **conditions})

    def add(self, row: Row) -> None:
        self._append({"kind": "row", "run": self.identity, **_short(asdict(row))})

    def finish(self, title: str) -> None:
        """All rows of this job have been added."""
        self._append({"kind": "job", "run": self.identity, "title": title})

    def _append(self, entry: Mapping[str, Any]) -> None:
        """Writes the whole line or nothing: half a line would make the file unreadable."""
        data = f"{json.dumps(entry, separators=(',', ':'), allow_nan=False)}\n".encode()
        with self.path.open("ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(end)
                raise LedgerError(f"{self.path} cannot be written; what it held is kept: {error}") from error


def read(path: Path) -> list[Run]:
    """A ledger's runs, oldest first; raises LedgerError where a line is not what a run writes."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LedgerError(f"{path} cannot be read: {error}") from error
    if text and not text.endswith("\n"):
        raise LedgerError(
            f"{path} ends in the middle of a line: restore it (git checkout), or delete that line."
        )
    runs: dict[str, tuple[dict[str, Any], list[Row], list[str]]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise LedgerError(f"{where} is not JSON ({error}): restore it (git checkout).") from error
        if not isinstance(entry, dict):
            raise LedgerError(f"{where} is not a JSON object: restore it (git checkout).")
        kind, identity = entry.pop("kind", None), str(entry.pop("run", None))
        entry.pop("after", None)
        entry.pop("digest", None)
        if kind == "run":
            runs[identity] = (entry, [], [])
        elif kind == "row" and identity in runs and REQUIRED <= entry.keys() <= KNOWN:
            runs[identity][1].append(Row(**{**entry, "suite": renamed(entry["suite"])}))
        elif kind == "job" and identity in runs and "title" in entry:
            runs[identity][2].append(renamed(entry["title"]))
        else:
            raise LedgerError(
                f"{where} is neither a run, nor a row or a job of a run above it: restore it (git checkout)."
            )
    return [
        Run(identity, conditions, tuple(rows), tuple(jobs))
        for identity, (conditions, rows, jobs) in runs.items()
    ]


KNOWN = {entry.name for entry in fields(Row)}
REQUIRED = {e.name for e in fields(Row) if e.default is MISSING and e.default_factory is MISSING}


def renamed(text: str) -> str:
    """A suite's present name, alone or at the head of a job's title: "bars, forward" -> "targets, forward"."""
    suite, comma, rest = text.partition(",")
    return f"{RENAMED_SUITES.get(suite, suite)}{comma}{rest}"


def _short(value: Any) -> Any:
    """Six significant digits of every float: more than a clock has, in half the space."""
    if isinstance(value, dict):
        return {name: _short(part) for name, part in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def newest(runs: Iterable[Run]) -> list[Measured]:
    """The rows that count: for each setting those of the last run that measured it.

    A run with --provider counts only for settings that no complete run has measured.
    """
    by_setting: dict[tuple[str, ...], list[Measured]] = {}
    complete: set[tuple[str, ...]] = set()
    for run in runs:
        fresh: set[tuple[str, ...]] = set()
        for row in run.rows:
            if run.conditions.get("providers"):
                if row.setting in complete:
                    continue
            else:
                complete.add(row.setting)
            if row.setting not in fresh:
                fresh.add(row.setting)
                by_setting[row.setting] = []
            by_setting[row.setting].append(Measured(row, run))
    return [measured for group in by_setting.values() for measured in group]


def chips(results: Path) -> dict[str, list[Measured]]:
    """The folder of each chip -> the rows of its ledgers that count; raises BenchError where there is no ledger."""
    runs: dict[str, list[Run]] = {}
    for path in sorted(results.glob("*/*.jsonl")):
        runs.setdefault(path.parent.name, []).extend(read(path))
    if not runs:
        raise BenchError(f"{results} holds no ledger (<chip>/<suite>.jsonl): measure first, or name another.")
    found = {
        folder: newest(sorted(of, key=lambda run: run.conditions["time"])) for folder, of in runs.items()
    }
    return {folder: rows for folder, rows in found.items() if rows}


def grouped(rows: Sequence[Measured], *names: str) -> dict[tuple[str, ...], list[Measured]]:
    """Rows by the values of some of their fields, in their order of appearance."""
    found: dict[tuple[str, ...], list[Measured]] = {}
    for measured in rows:
        found.setdefault(tuple(getattr(measured.row, name) for name in names), []).append(measured)
    return found
