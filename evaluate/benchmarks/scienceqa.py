"""ScienceQA: problems.json and pid_splits.json; questions with and without an image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from zinit_kernels.console import shown

from ..question import Benchmark, Cell, Item, Quoted, Table, unread_note
from ..reading import check_fields, existing, json_object, refuse_duplicates
from ..scorers import scienceqa
from ..shared import UserError
from .pictures import picture

LAYOUT = "problems.json and pid_splits.json, and the images as test/ID/image.png or images/test/ID/image.png"
FIELDS = {"question": str, "choices": list, "answer": int, "hint": str, "subject": str, "grade": str}
SPLIT = "test"
_LETTERS = "ABCDEFGHIJ"


def read(folder: Path) -> list[Item]:
    path = existing(folder / "problems.json", LAYOUT)
    problems = json_object(path)
    splits = json_object(existing(folder / "pid_splits.json", LAYOUT))
    ids = splits.get(SPLIT)
    if not isinstance(ids, list) or not ids:
        raise UserError(f"{folder / 'pid_splits.json'} holds no split {SPLIT!r}.")
    refuse_duplicates(map(str, ids), folder / "pid_splits.json")
    items = []
    for pid in map(str, ids):
        if pid not in problems:
            raise UserError(f"{path} holds no problem {pid}, which pid_splits.json names.")
        items.append(_item(folder, path, pid, problems[pid]))
    return items


def _item(folder: Path, path: Path, pid: str, problem: object) -> Item:
    where = f"{path}, problem {pid}"
    check_fields(problem, FIELDS, where)
    assert isinstance(problem, dict)
    choices, grade = problem["choices"], re.fullmatch(r"grade([0-9]{1,2})", problem["grade"])
    if len(choices) > len(_LETTERS) or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f"{where}: the choices must be at most {len(_LETTERS)} texts, got {shown(choices)}.")
    if not 0 <= problem["answer"] < len(choices):
        raise UserError(f"{where}: the answer {problem['answer']} is none of its {len(choices)} choices.")
    if grade is None:
        raise UserError(f"{where}: the grade must be grade1 to grade12, got {shown(problem['grade'])}.")
    name = problem.get("image")
    row = scienceqa.Row(
        problem["subject"], int(grade[1]), bool(problem["hint"]), bool(name), len(choices),
        _LETTERS[problem["answer"]], "",
    )  # fmt: skip
    try:
        scienceqa.categories_of(row)
    except ValueError as error:
        raise UserError(f"{where}: {error}.") from error
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(_LETTERS, choices, strict=False))
    question = (
        f"Question: {problem['question']}\nContext: {problem['hint'] or 'N/A'}\nOptions: {options}\nAnswer:"
    )
    pictures = (picture(folder, f"{SPLIT}/{pid}/{name}"),) if name else ()
    return Item(pid, question, pictures, row)


def tables(items: Sequence[Item], answers: Mapping[str, str]) -> list[Table]:
    found = scienceqa.score(item.facts._replace(answer=answers[item.id]) for item in items)
    names = scienceqa.CATEGORIES
    row: list[Cell] = ["measured", *(found.categories.get(name) for name in names), found.average]
    return [Table("ScienceQA, test", ("%", *names, "average"), [row], [unread_note(found.unread)])]


_SOURCE = "arXiv 2303.16199v3"
BENCHMARK = Benchmark(
    "scienceqa", "ScienceQA: multiple choice with text and images, eight categories", LAYOUT, read, tables,
    quoted=(
        Quoted("LLaMA-Adapter, text only", _SOURCE, {"average": 78.31}),
        Quoted(
            "LLaMA-Adapter", _SOURCE,
            {"NAT": 84.37, "SOC": 88.30, "LAN": 84.36, "TXT": 83.72, "IMG": 80.32, "NO": 86.90, "G1-6": 85.83,
             "G7-12": 84.05, "average": 85.19},
        ),
    ),
)  # fmt: skip
