"""What a run has found so far, on disk: a header that says what the run is, and then a JSON line for each finding.

    {"run": {"benchmark": "mme", "questions": DIGEST, "model": {...}, ...}}
    {"id": "count/1.jpg/0", "answer": "Yes"}

Lines are on disk before the next one is worked on, so a run that was killed goes on where it ended. A line that was cut
short is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zinit_kernels.console import shown

from .shared import UserError, append, held, remove_leftovers, write_file, writing

RESULT = "result.json"  # the figures of a run, beside its lines


def write_result(folder: Path, content: bytes) -> None:
    """Writes result.json, and removes what a process left that was killed while it wrote it."""
    with held(folder, wait=True):
        remove_leftovers(folder, [RESULT])
        write_file(folder / RESULT, content)


class LineFile:
    """Reads what an earlier process of the same run wrote, and appends. `entries`: (line number, object).

    Args:
        path: made with the first entry. run: what the run is, as JSON; a file of another run is refused.

    Raises:
        UserError: a file of another run, a damaged one, or one that is something else; it is then unchanged.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]):
        self.path = path
        if not path.exists() and (path.parent / RESULT).exists():  # which this run would replace
            raise UserError(
                f"{path.parent} holds a {RESULT} and no {path.name} beside it: move it away, or name another folder."
            )
        self.entries: list[tuple[int, Any]] = []
        text, whole = _whole_lines(path)
        lines = text.split("\n") if text else []
        if lines:
            self.entries = _read(path, lines, dict(run))
        with writing(path):
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 closed by close()
            self._file.truncate(whole)
        self._header = [] if lines else [{"run": dict(run)}]  # written with the first entries

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """On disk when it returns."""
        if not entries:
            return
        text = "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in [*self._header, *entries])
        with writing(self.path):
            append(self._file, text.encode("utf-8", "backslashreplace"))
            os.fsync(self._file.fileno())
        self._header = []
        self.entries += [(len(self.entries) + number, entry) for number, entry in enumerate(entries, 2)]

    def close(self) -> None:
        self._file.close()


def _whole_lines(path: Path) -> tuple[str, int]:
    """The text up to the last line end, and its length in bytes."""
    if path.exists() and not path.is_file():  # reading a pipe would wait for whoever writes it
        raise UserError(f"cannot read {path}: it is no file.")
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    whole = content.rfind(b"\n") + 1
    if content and not whole and content[:6] != b'{"run"'[: len(content)]:
        raise UserError(f"{path} is not a file of this program: move it away, or name another folder.")
    try:
        return content[:whole].decode().removesuffix("\n"), whole
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: byte {error.start} is not UTF-8.") from error


def _read(path: Path, lines: Sequence[str], run: dict[str, Any]) -> list[tuple[int, Any]]:
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON; move the file away to begin anew.") from error
    header = entries[0].get("run") if isinstance(entries[0], dict) else None
    if not isinstance(header, dict):
        raise UserError(f"{path} is not a file of this program: move it away, or name another folder.")
    for name in {**run, **header}:
        if header.get(name) != json.loads(json.dumps(run.get(name))):
            raise UserError(
                f"{path} is of another run: its {name} is {shown(header.get(name))}, and this one's "
                f"{shown(run.get(name))}; name another folder."
            )
    return list(enumerate(entries[1:], 2))
