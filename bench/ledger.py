"""The ledger: append-only JSON lines, one per measured figure, each chained to the line before it.

    {"kind": "run", "run": ID, conditions...}
    {"kind": "row", "run": ID, "suite": ..., ...}
    {"kind": "job", "run": ID, "title": ...}          after the last row of a job: --resume skips it

Every line holds a digest of the one before it and, at its end, one of itself (older ledgers do not), so that a line
changed, lost or moved is found, and named, when the ledger is read. Lines cut off the end are not: the page tells how
far a ledger goes. A run that was interrupted keeps the rows it had. Two runs at once write in turns.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

DIGEST_LENGTH = 12


class LedgerError(Exception):
    """The ledger cannot be believed: which file, which line, why."""


@dataclass(frozen=True)
class Row:
    """One figure: who computed what, and how long it took. Times in ms, rates in 10^12 and 10^9 per second."""

    suite: str  # attention | decode | memory | train | generate | bars | dropins | verify
    shape: str  # its name in bench/shapes.py
    sizes: Mapping[str, int]
    mode: str  # forward | backward | forward+backward | decode | training step | ...
    dtype: str
    provider: str
    layout: str = ""  # of keys and values in memory, where it was varied
    launch: str = "eager"  # or graph
    cache: str = "warm"  # or cold
    rounds: int = 0
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)  # to another provider's time in the same round
    figures: Mapping[str, float] = field(
        default_factory=dict
    )  # whatever else the suite measures, with its unit

    @property
    def setting(self) -> tuple[str, ...]:
        """What rows that may be compared have in common."""
        return (self.suite, self.shape, self.mode, self.dtype, self.layout, self.launch, self.cache)


@dataclass(frozen=True)
class Run:
    """What was measured at one go, under the same conditions."""

    identity: str
    conditions: Mapping[str, Any]
    rows: tuple[Row, ...]
    jobs: tuple[str, ...] = ()  # titles of those that were done


def digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()[:DIGEST_LENGTH]


def sealed(entry: Mapping[str, Any]) -> str:
    """The entry as a line that ends in a digest of what is before it."""
    line = json.dumps(entry, separators=(",", ":"), allow_nan=False)
    return f'{line[:-1]},"digest":"{digest(line)}"}}'


class Ledger:
    """Appends one run to a file; every row is on disk when `add` returns."""

    def __init__(self, path: Path, conditions: Mapping[str, Any]):
        _check_chain(path, _lines(path) if path.exists() else [])
        path.parent.mkdir(parents=True, exist_ok=True)
        # of two runs that begin within a second too, each has a name of its own
        self.path, self.identity = path, f"{conditions['time']} {conditions['commit']} {secrets.token_hex(2)}"
        self._append({"kind": "run", "run": self.identity, **conditions})

    def add(self, row: Row) -> None:
        self._append({"kind": "row", "run": self.identity, **_short(asdict(row))})

    def finish(self, title: str) -> None:
        """All rows of this job are there."""
        self._append({"kind": "job", "run": self.identity, "title": title})

    def _append(self, entry: Mapping[str, Any]) -> None:
        """A whole line after whatever is the last one now, or none of it: half a line would spoil all before it."""
        with self.path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            file.seek(0)
            before = file.read().decode()
            line = sealed({"after": digest(before.splitlines()[-1]) if before else "", **entry})
            data, end = f"{line}\n".encode(), file.tell()
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(end)
                raise LedgerError(f"{self.path} cannot be written, what it had is kept: {error}") from error


def read(path: Path) -> list[Run]:
    """A ledger's runs, oldest first; raises LedgerError where a line is not what was written."""
    lines = _lines(path)
    _check_chain(path, lines)
    names = {entry.name for entry in fields(Row)}
    runs: dict[str, tuple[dict[str, Any], list[Row], list[str]]] = {}
    for number, line in enumerate(lines, 1):
        entry = json.loads(line)
        kind, identity = entry.pop("kind", None), entry.pop("run", None)
        del entry["after"]
        entry.pop("digest", None)
        if kind == "run":
            runs[identity] = (entry, [], [])
        elif kind == "row" and identity in runs and entry.keys() <= names:
            runs[identity][1].append(Row(**entry))
        elif kind == "job" and identity in runs:
            runs[identity][2].append(entry["title"])
        else:
            raise LedgerError(f"{path}, line {number}: neither a run nor a row or a job of a run before it.")
    return [
        Run(identity, conditions, tuple(rows), tuple(jobs))
        for identity, (conditions, rows, jobs) in runs.items()
    ]


def extent(path: Path) -> str:
    """How far a ledger goes: what was cut off its end is seen by who noted this."""
    lines = _lines(path)
    return f"{len(lines)} lines to {digest(lines[-1])}"


def _short(value: Any) -> Any:
    """Six significant digits of every float: more than a clock has, and half the file."""
    if isinstance(value, dict):
        return {name: _short(part) for name, part in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LedgerError(f"{path} cannot be read: {error}") from error
    if text and not text.endswith("\n"):
        raise LedgerError(
            f"{path} ends in the middle of a line: restore it (git checkout), or delete that line."
        )
    return text.splitlines()


def _check_chain(path: Path, lines: list[str]) -> None:
    after = ""
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise LedgerError(
                f"{path}, line {number} is not JSON ({error}): restore it (git checkout)."
            ) from error
        fault = ""
        if not isinstance(entry, dict) or entry.get("after") != after:
            fault = f"line {number - 1} or {number} was changed, deleted or moved"
        elif "digest" in entry and sealed({k: v for k, v in entry.items() if k != "digest"}) != line:
            fault = f"line {number} was changed"
        if fault:
            raise LedgerError(
                f"{path}: {fault}; the ledger is append-only: restore it (git checkout), or measure anew into an empty "
                "one."
            )
        after = digest(line)
