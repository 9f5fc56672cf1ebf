"""Open questions and answers to them, in this package's form and in FastChat's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zinit_kernels.console import shown

from .answers import ANSWERS
from .reading import check_fields, existing, json_rows, refuse_duplicates
from .shared import UserError, json_values, read_text

LAYOUT = "question.jsonl with the fields question_id, category, and turns or text, as FastChat has it"


class Question(NamedTuple):
    """One question; of several turns the first."""

    id: str
    category: str
    text: str


def read_questions(path: Path) -> list[Question]:
    """The questions of a file, or of question.jsonl in a folder. Raises UserError for what is wrong in it."""
    path = existing(path / "question.jsonl", LAYOUT) if path.is_dir() else path
    questions = []
    for number, row in enumerate(json_rows(path, {"question_id": object, "category": str}), 1):
        turns = row.get("turns")
        text = turns[0] if isinstance(turns, list) and turns else row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}, question {number}: the field turns or text must hold the question.")
        questions.append(Question(_id(row, f"{path}, question {number}"), row["category"], text))
    refuse_duplicates((question.id for question in questions), path)
    return questions


def read_answers(path: Path) -> dict[str, str]:
    """id -> answer, of a file of `python -m evaluate vicuna`, of its folder, or of FastChat's model_answer/*.jsonl."""
    path = path / ANSWERS if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"there is no {path}: the answers are a file of python -m evaluate vicuna, or FastChat's."
        )
    found: dict[str, str] = {}
    for line, entry in json_values(read_text(path), path):
        where = f"{path}, line {line}"
        if isinstance(entry, dict) and entry.keys() == {"run"}:
            continue
        key, text = _answer(entry, where)
        if key in found:
            raise UserError(f"{where}: the id {key!r} is there twice.")
        found[key] = text
    return found


def _answer(entry: object, where: str) -> tuple[str, str]:
    check_fields(entry, {}, where)
    assert isinstance(entry, dict)
    if isinstance(entry.get("answer"), str):
        return _id({"question_id": entry.get("id")}, where), entry["answer"]
    text = entry.get("text")
    choices: Any = entry.get("choices")
    if text is None and isinstance(choices, list) and choices and isinstance(choices[0], dict):
        turns = choices[0].get("turns")
        text = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(text, str):
        raise UserError(
            f"{where}: expected the field answer, text or choices with an answer, got {shown(entry)}."
        )
    return _id(entry, where), text


def _id(row: Mapping[str, Any], where: str) -> str:
    found = row.get("question_id")
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise UserError(f"{where}: a question's id must be a number or a text, got {shown(found)}.")
    return str(found)
