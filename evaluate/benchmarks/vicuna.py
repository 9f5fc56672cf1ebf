"""Open questions, such as the 80 of Vicuna's authors: answers alone, which `judge` compares with another model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..open_questions import LAYOUT, read_questions
from ..question import Benchmark, Cell, Item, Table


def read(folder: Path) -> list[Item]:
    return [Item(question.id, question.text, (), question.category) for question in read_questions(folder)]


def tables(items: Sequence[Item], answers: Mapping[str, str]) -> list[Table]:
    kinds = list(dict.fromkeys(item.facts for item in items))
    rows: list[list[Cell]] = []
    for name, own in [("all", items), *((kind, [i for i in items if i.facts == kind]) for kind in kinds)]:
        lengths = [len(answers[item.id].split()) for item in own]
        rows.append([name, len(own), sum(lengths) / len(own), sum(not length for length in lengths)])
    note = "python -m evaluate judge compares these answers with another model's."
    return [Table("Open questions", ("category", "questions", "words an answer", "empty"), rows, [note])]


BENCHMARK = Benchmark(
    "vicuna", "open questions (the 80 of Vicuna's authors), for the judge to compare", LAYOUT, read, tables,
    max_new_tokens=512,
)  # fmt: skip
