"""The answers of a run on disk: a header and then a JSON line for each answer, written as they come.

    {"run": {"benchmark": "mme", "questions": DIGEST, "model": {...}, ...}}
    {"id": "count/1.jpg/0", "answer": "Yes"}

A run that was killed goes on where it ended. A line that was cut short is dropped; no other question is asked twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zinit_kernels.console import shown

from .question import Item
from .shared import UserError, writing

ANSWERS = "answers.jsonl"


def digest(items: Sequence[Item]) -> str:
    """Of the questions, in order: their ids, texts and pictures."""
    found = hashlib.sha256()
    for item in items:
        found.update(
            json.dumps([item.id, item.question, [picture.key for picture in item.pictures]]).encode()
        )
    return found.hexdigest()[:16]


class AnswerFile:
    """Reads what an earlier process of the same run wrote, and appends.

    Args:
        path: made if it is not there. run: what the run is; a file of another run is refused.

    Raises:
        UserError: answers of another run, a damaged file, or one that is no answer file; it is then unchanged.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]):
        self.path, self.answers = path, {}
        text, whole = _whole_lines(path)
        lines = text.split("\n") if text else []
        if lines:
            self.answers = _read(path, lines, dict(run))
        with writing(path):
            self._file = open(path, "ab")  # noqa: SIM115 closed by close()
            self._file.truncate(whole)
        self._header = [] if lines else [{"run": dict(run)}]  # written with the first answers

    def add(self, answers: Mapping[str, str]) -> None:
        """On disk when it returns."""
        self._append([*self._header, *({"id": key, "answer": answer} for key, answer in answers.items())])
        self._header = []
        self.answers.update(answers)

    def close(self) -> None:
        self._file.close()

    def _append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries)
        with writing(self.path):
            self._file.write(text.encode("utf-8", "backslashreplace"))
            self._file.flush()
            os.fsync(self._file.fileno())


def _whole_lines(path: Path) -> tuple[str, int]:
    """The text up to the last line end, and its length in bytes."""
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    whole = content.rfind(b"\n") + 1
    if content and not whole and not content.startswith(b'{"run"'):
        raise UserError(f"{path} is not a file of answers: move it away, or name another folder.")
    try:
        return content[:whole].decode().removesuffix("\n"), whole
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: byte {error.start} is not UTF-8.") from error


def _read(path: Path, lines: Sequence[str], run: dict[str, Any]) -> dict[str, str]:
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON; move the file away to ask again.") from error
    header = entries[0].get("run") if isinstance(entries[0], dict) else None
    if not isinstance(header, dict):
        raise UserError(f"{path} is not a file of answers: move it away, or name another folder.")
    for name in {**run, **header}:
        if header.get(name) != json.loads(json.dumps(run.get(name))):
            raise UserError(
                f"{path} holds the answers of another run: its {name} is {shown(header.get(name))}, and this one's "
                f"{shown(run.get(name))}; name another folder."
            )
    return answers_in(path, list(enumerate(entries[1:], 2)))


def answers_in(path: Path, entries: Sequence[tuple[int, Any]]) -> dict[str, str]:
    """id -> answer of (line, object) pairs. Raises UserError for another object, and for an id twice."""
    answers: dict[str, str] = {}
    for line, entry in entries:
        key, answer = (entry.get("id"), entry.get("answer")) if isinstance(entry, dict) else (None, None)
        if not isinstance(key, str) or not isinstance(answer, str):
            raise UserError(
                f'{path}, line {line}: expected {{"id": "...", "answer": "..."}}, got {shown(entry)}.'
            )
        if key in answers:
            raise UserError(f"{path}, line {line}: the id {key!r} is there twice.")
        answers[key] = answer
    return answers
