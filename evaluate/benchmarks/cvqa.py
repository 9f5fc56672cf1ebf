"""C-VQA: tables with a question, the same question under a condition, and both answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..question import Benchmark, Cell, Item, Table
from ..reading import table_rows
from ..scorers import cvqa
from ..shared import UserError
from .pictures import picture

LAYOUT = "C-VQA-Real_questions.csv, C-VQA-Synthetic_questions.csv, or both, and the images in images/ or beside them"
COLUMNS = ("img_path", "query", "answer", "new query", "new answer", "type")


def read(folder: Path) -> list[Item]:
    files = [folder] if folder.is_file() else sorted(folder.glob("*_questions.csv"))
    if not files:
        raise UserError(f"{folder} holds no *_questions.csv; the data of this benchmark are {LAYOUT}")
    items = []
    for path in files:
        for number, row in enumerate(table_rows(path, COLUMNS), 1):
            image = picture(path.parent, row["img_path"])
            facts = cvqa.Row(
                row["type"], row["query"], row["answer"], "", row["new query"], row["new answer"], ""
            )
            for part, query in (("original", row["query"]), ("counterfactual", row["new query"])):
                items.append(Item(f"{path.stem}/{number}/{part}", query + cvqa.SUFFIX, (image,), facts))
    return items


def tables(items: Sequence[Item], answers: Mapping[str, str]) -> list[Table]:
    rows = [
        first.facts._replace(answer=answers[first.id], new_answer=answers[second.id])
        for first, second in zip(items[::2], items[1::2], strict=True)
    ]
    found = cvqa.score(rows)
    lines: list[list[Cell]] = [
        [
            kind,
            score.original,
            score.counterfactual,
            score.loss,
            100 * score.unread,
            sum(r.kind == kind for r in rows),
        ]
        for kind, score in found.items()
    ]
    columns = ("measured, %", "original", "counterfactual", "loss", "unread", "questions")
    return [Table("C-VQA", columns, lines, ["The score is the accuracy on the counterfactual question."])]


BENCHMARK = Benchmark(
    "cvqa", "C-VQA: questions under a condition contrary to fact", LAYOUT, read, tables, brief=True
)
