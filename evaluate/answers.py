"""The answers of a run: a JSON line for each, as `lines` keeps them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zinit_kernels.console import shown

from .lines import LineFile
from .question import Item
from .shared import UserError

ANSWERS = "answers.jsonl"


def digest(items: Sequence[Item]) -> str:
    """Of the questions, in order: their ids, texts and images."""
    found = hashlib.sha256()
    for item in items:
        found.update(
            json.dumps([item.id, item.question, [picture.stamp() for picture in item.pictures]]).encode()
        )
    return found.hexdigest()[:16]


class AnswerFile:
    """The answers that an earlier process of the same run wrote, and those to come. Arguments, errors: `LineFile`."""

    def __init__(self, path: Path, run: Mapping[str, Any]):
        self._lines = LineFile(path, run)
        try:
            self.answers = answers_in(path, self._lines.entries)
        except UserError:
            self.close()
            raise

    def add(self, answers: Mapping[str, str]) -> None:
        """On disk when it returns."""
        self._lines.add([{"id": key, "answer": answer} for key, answer in answers.items()])
        self.answers.update(answers)

    def close(self) -> None:
        self._lines.close()


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
