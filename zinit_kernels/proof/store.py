"""The file that keeps the verdicts and times of one chip and one installation, in the user's cache folder.

    $ZINIT_CACHE or $XDG_CACHE_HOME/zinit_kernels or ~/.cache/zinit_kernels, in it proof-1/<hash of the facts>.json

A folder that cannot be written keeps nothing: verdicts then live as long as the process. What a file says is believed
only where it has the form that this module writes; any other file counts as empty, and is written anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows, where there are no kernels to try
    fcntl = None  # type: ignore[assignment]

LONGEST_WAIT = 120.0  # seconds for another process that tries kernels now
_FORM = "proof-1"
_LARGEST_FILE = 1 << 22


class Verdict(NamedTuple):
    """passed: whether the family may be taken. said: what was wrong. date: of the trial, YYYY-MM-DD."""

    passed: bool
    said: str
    date: str


Times = dict[str, dict[str, float]]  # shape class -> backend -> milliseconds


class Busy(Exception):
    """Another process has tried kernels of the same chip for longer than LONGEST_WAIT."""


def folder() -> Path | None:
    """Where verdicts are kept; None where there is no home."""
    if named := os.environ.get("ZINIT_CACHE"):
        return Path(named).absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # the standard tells programs to ignore a relative one
        return Path(shared) / "zinit_kernels"
    if not os.path.isabs(os.environ.get("HOME", "/")):  # an empty one would be the root of all files
        return None
    try:
        return Path.home() / ".cache" / "zinit_kernels"
    except RuntimeError:  # a user without an entry in passwd, and without HOME
        return None


def remove_all() -> int:
    """Removes the files of all chips and installations; how many there were."""
    base, removed = folder(), 0
    for path in () if base is None else (base / _FORM).glob("*.json"):
        with contextlib.suppress(OSError):
            path.unlink()
            removed += 1
    return removed


class Store:
    """The verdicts and times of one chip and installation. Safe among processes; among threads the caller's lock is."""

    def __init__(self, facts: Mapping[str, str]) -> None:
        self.facts = dict(facts)
        text = json.dumps(self.facts, sort_keys=True)
        base = folder()
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        self.path = None if base is None else base / _FORM / f"{name}.json"
        self._attempts: dict[str, int] = {}
        self.verdicts: dict[str, Verdict] = {}
        self.times: Times = {}
        self.read()

    def read(self) -> None:
        """Takes in what the file says; what this process found before stays where the file says nothing."""
        content = self._content()
        for key, value in content.get("verdicts", {}).items():
            self.verdicts[key] = Verdict(**value)
        self._attempts = content.get("attempts", {})
        self.times.update(content.get("times", {}))

    def begin(self, key: str) -> int:
        """Notes that a trial begins; the number of trials before it that did not end."""
        before = self._attempts.get(key, 0)
        self._attempts[key] = before + 1
        self._write()
        return before

    def end(self, key: str, verdict: Verdict | None) -> None:
        """Notes that a trial has ended, with a verdict to keep or without one."""
        self._attempts.pop(key, None)
        if verdict is not None:
            self.verdicts[key] = verdict
        self._write()

    def keep_times(self, shape_class: str, times: Mapping[str, float]) -> None:
        """Keeps the milliseconds of each backend in the place of those that were kept for the class."""
        with self.locked():
            self.times[shape_class] = dict(times)
            self._write()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time; the file is read again. Without a file that can be written: all at once."""
        lock = None
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if lock is not None:
                _wait_for(lock)
                self._remove_leftovers()
                self.read()
            yield
        finally:
            if lock is not None:
                os.close(lock)  # and so unlocks it

    def is_kept(self) -> bool:
        """Whether what is written now will be there for the next process."""
        return self.path is not None and self.path.is_file() and os.access(self.path.parent, os.W_OK)

    def _remove_leftovers(self) -> None:
        """Removes what processes left that were killed while they wrote; under the lock nobody else writes."""
        assert self.path is not None
        for leftover in self.path.parent.glob(f"{self.path.stem}*.new"):
            with contextlib.suppress(OSError):
                leftover.unlink()

    def _content(self) -> dict[str, Any]:
        if self.path is None:
            return {}
        try:
            if self.path.stat().st_size > _LARGEST_FILE:
                return {}
            content = json.loads(self.path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return content if _is_ours(content, self.facts) else {}

    def _write(self) -> None:
        """In one step, so that nobody reads half a file."""
        if self.path is None:
            return
        content = {
            "facts": self.facts,
            "verdicts": {key: verdict._asdict() for key, verdict in sorted(self.verdicts.items())},
            "attempts": self._attempts,
            "times": self.times,
        }
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=".new")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=1)
                os.replace(name, self.path)
            except OSError:
                os.unlink(name)
                raise


def _wait_for(lock: int) -> None:
    """Takes the lock. A file system without locks gives none, and nothing waits."""
    if fcntl is None:
        return
    until = time.monotonic() + LONGEST_WAIT
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise Busy from None
            time.sleep(0.05)
        except OSError:
            return


def _is_ours(content: Any, facts: Mapping[str, str]) -> bool:
    """Whether a file's content has the form that `Store` writes, for these facts."""
    if not isinstance(content, dict) or content.get("facts") != facts:
        return False
    verdicts, attempts = content.get("verdicts"), content.get("attempts")
    if not (isinstance(verdicts, dict) and isinstance(attempts, dict)):
        return False
    times = content.get("times", {})  # files that nothing was timed for may lack it
    return (
        all(_is_verdict(value) for value in verdicts.values())
        and all(type(count) is int for count in attempts.values())
        and isinstance(times, dict)
        and all(_is_times(value) for value in times.values())
    )


def _is_times(value: Any) -> bool:
    return isinstance(value, dict) and all(
        type(time) is float and 0.0 < time < float("inf") for time in value.values()
    )


def _is_verdict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == set(Verdict._fields)
        and type(value["passed"]) is bool
        and isinstance(value["said"], str)
        and isinstance(value["date"], str)
    )
