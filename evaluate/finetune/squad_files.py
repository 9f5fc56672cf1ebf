"""SQuAD files, 1.1 and 2.0: articles with paragraphs, questions and the places of their answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from zinit_kernels.console import shown

from ..reading import check_fields, json_object, refuse_duplicates
from ..shared import UserError

LAYOUT = (
    "one train*.json and one test*.json or dev*.json as SQuAD has them, and, if wanted, valid*.json; otherwise a tenth "
    "of the training articles is for validation"
)


class Question(NamedTuple):
    """article: which one of its file it belongs to. answers: (text, first character), none if it has no answer."""

    id: str
    article: int
    context: str
    text: str
    answers: tuple[tuple[str, int], ...]


class Splits(NamedTuple):
    train: list[Question]
    validation: list[Question]
    test: list[Question]


def files_of(folder: Path) -> dict[str, Path]:
    """train, test and perhaps validation. Raises UserError where one is missing."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; the data are {LAYOUT}.")
    found = {}
    dev = sorted(folder.glob("dev*.json"))
    for part, names in (("train", ["train*"]), ("test", ["test*"]), ("validation", ["valid*"])):
        own = sorted(path for name in names for path in folder.glob(f"{name}.json"))
        if not own and dev:  # the public test of SQuAD is its dev file
            own, dev = (dev, []) if part in ("test", "validation") else (own, dev)
        if len(own) > 1 or (not own and part != "validation"):
            raise UserError(f"{folder} holds {len(own)} files for {part}; the data are {LAYOUT}.")
        if own:
            found[part] = own[0]
    return found


def read_splits(folder: Path) -> Splits:
    """The questions of a folder. Raises UserError for a damaged file."""
    files = files_of(folder)
    train, test = read_questions(files["train"]), read_questions(files["test"])
    if "validation" in files:
        return Splits(train, read_questions(files["validation"]), test)
    articles = sorted({question.article for question in train})
    if len(articles) < 2:
        raise UserError(
            f"{files['train']} has one article, and validation needs another: add a file valid.json."
        )
    held_out = set(random.Random(0).sample(articles, max(1, len(articles) // 10)))
    return Splits(
        [question for question in train if question.article not in held_out],
        [question for question in train if question.article in held_out],
        test,
    )


def read_questions(path: Path) -> list[Question]:
    """Every question of a file. Raises UserError that names what is wrong in it."""
    content = json_object(path)
    check_fields(content, {"data": list}, str(path))
    questions: list[Question] = []
    for number, article in enumerate(content["data"]):
        check_fields(article, {"paragraphs": list}, f"{path}, article {number + 1}")
        for paragraph in article["paragraphs"]:
            where = f"{path}, article {number + 1}"
            check_fields(paragraph, {"context": str, "qas": list}, where)
            questions += [_question(entry, number, paragraph["context"], where) for entry in paragraph["qas"]]
    refuse_duplicates((question.id for question in questions), path)
    if not questions:
        raise UserError(f"{path} holds no questions.")
    return questions


def _question(entry: object, article: int, context: str, where: str) -> Question:
    check_fields(entry, {"id": str, "question": str, "answers": list}, where)
    assert isinstance(entry, dict)
    where = f"{where}, question {entry['id']}"
    if not isinstance(entry.get("is_impossible", False), bool):
        raise UserError(f"{where}: is_impossible must be true or false, got {shown(entry['is_impossible'])}.")
    answers = []
    for answer in [] if entry.get("is_impossible") else entry["answers"]:
        check_fields(answer, {"text": str, "answer_start": int}, where)
        text, start = answer["text"], answer["answer_start"]
        if start < 0 or not text or context[start : start + len(text)] != text:
            raise UserError(f"{where}: the answer {text!r} is not at character {start} of its paragraph.")
        answers.append((text, start))
    return Question(entry["id"], article, context, entry["question"], tuple(answers))


def truths_of(questions: Sequence[Question]) -> dict[str, list[str]]:
    """id -> the texts of its answers."""
    return {question.id: [text for text, _ in question.answers] for question in questions}
