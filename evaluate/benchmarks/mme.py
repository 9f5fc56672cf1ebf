"""MME: the benchmark's folder, or answers in the form of its scoring tool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..question import Benchmark, Cell, Item, Picture, Quoted, Table
from ..reading import existing
from ..scorers import mme
from ..shared import UserError, read_text

LAYOUT = (
    "a folder for each task (existence, count, ...) with a text file for each image, lines `question TAB Yes or No`; "
    "or a file TASK.txt for each task, lines `image TAB question TAB Yes or No`, and images in TASK/ or TASK/images/"
)
_SUFFIXES = (".jpg", ".png", ".jpeg")


def read(folder: Path) -> list[Item]:
    items = []
    for task in mme.TASKS:
        if (folder / f"{task}.txt").is_file():
            items += [item for item, _ in _listed(folder, task, 3)]
        else:
            items += _released(existing(folder / task, LAYOUT), task)
    return items


def _listed(folder: Path, task: str, columns: int) -> list[tuple[Item, str]]:
    """Of TASK.txt: each question, and what the fourth column holds."""
    path = existing(folder / f"{task}.txt", LAYOUT)
    found = []
    for line, cells in _cells(path):
        if len(cells) < columns:
            raise UserError(
                f"{path}, line {line}: expected {columns} columns with tabs between, got {len(cells)}."
            )
        image, question, truth, *rest = cells
        place = next((place for place in ("", "images") if (folder / task / place / image).is_file()), "")
        picture = Picture(f"{task}/{image}", folder / task / place / image)
        found.append((_item(task, picture, image, question, truth, f"{path}, line {line}"), "\t".join(rest)))
    _check_pairs([item for item, _ in found], path)
    return found


def _released(folder: Path, task: str) -> list[Item]:
    """Of the benchmark's release: a text file beside each image, or both in folders of their own."""
    texts, images = folder / "questions_answers_YN", folder / "images"
    if not texts.is_dir():
        texts = images = folder
    files = sorted(texts.glob("*.txt"))
    if not files:
        raise UserError(f"{folder} holds no questions (*.txt); the data of this benchmark are {LAYOUT}")
    items = []
    for path in files:
        image = next(
            (images / f"{path.stem}{s}" for s in _SUFFIXES if (images / f"{path.stem}{s}").is_file()), None
        )
        image = image or images / f"{path.stem}{_SUFFIXES[0]}"
        for line, cells in _cells(path):
            if len(cells) != 2:
                raise UserError(
                    f"{path}, line {line}: expected `question TAB answer`, got {len(cells)} columns."
                )
            picture = Picture(f"{task}/{image.name}", image)
            question, truth = cells
            items.append(_item(task, picture, image.name, question, truth, f"{path}, line {line}"))
    _check_pairs(items, folder)
    return items


def _cells(path: Path) -> list[tuple[int, list[str]]]:
    lines = enumerate(read_text(path).split("\n"), 1)
    return [(number, line.split("\t")) for number, line in lines if line.strip()]


def _item(task: str, picture: Picture, image: str, question: str, truth: str, where: str) -> Item:
    if truth.strip().lower() not in ("yes", "no"):
        raise UserError(f"{where}: the truth must be Yes or No, got {truth!r}.")
    row = mme.Row(task, image, truth, "")
    return Item(f"{task}/{image}/{truth.strip().lower()}", question.strip(), (picture,), row)


def _check_pairs(items: Sequence[Item], path: Path) -> None:
    ids = [item.id for item in items]
    for key in ids:
        image, _, truth = key.rpartition("/")
        if ids.count(key) > 1:
            raise UserError(f"{path}: {image} has two questions answered {truth}; MME has one of each.")
        if f"{image}/{'no' if truth == 'yes' else 'yes'}" not in ids:
            raise UserError(f"{path}: {image} has only the question answered {truth}; MME has one of each.")


def foreign(folder: Path) -> tuple[list[Item], dict[str, str]]:
    """Answers as the scoring tool takes them: TASK.txt with a fourth column, in a folder."""
    items, answers = [], {}
    for task in mme.TASKS:
        for item, answer in _listed(folder, task, 4):
            items.append(item)
            answers[item.id] = answer
    return items, answers


def tables(items: Sequence[Item], answers: Mapping[str, str]) -> list[Table]:
    found = mme.score(item.facts._replace(answer=answers[item.id]) for item in items)
    summary: list[Cell] = ["measured", found.perception, found.cognition, found.perception + found.cognition]
    rows: list[list[Cell]] = [
        [task, score.accuracy, score.accuracy_plus, score.score, 100 * score.unread]
        for task, score in found.tasks.items()
    ]
    return [
        Table("MME", ("", "perception", "cognition", "total"), [summary]),
        Table("MME by task", ("task", "accuracy", "accuracy+", "score", "unread %"), rows),
    ]


BENCHMARK = Benchmark(
    "mme", "MME: two yes-or-no questions an image, 14 tasks", LAYOUT, read, tables, brief=True, foreign=foreign,
    quoted=(
        Quoted(
            "LLaMA-Adapter (V2) 7B", "arXiv 2303.16199v3, supplement",
            {"perception": 973.0, "cognition": 249.0, "total": 1222.0},
        ),
    ),
)  # fmt: skip
