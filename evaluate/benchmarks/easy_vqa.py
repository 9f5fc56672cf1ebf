"""easy-VQA: coloured shapes, small enough for a CPU. Its yes-or-no part is scored by the rules of POPE and of MME."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from zinit_kernels.console import shown

from ..question import Benchmark, Cell, Item, Table
from ..reading import existing, json_value
from ..scorers import mme, pope, vqa
from ..shared import UserError
from .pictures import picture

LAYOUT = "questions.json, a list of [question, answer, image number], and images/NUMBER.png: a split of easy-VQA's data"
COLOURS = ("gray", "yellow", "green", "red", "black", "brown", "blue", "teal")


def read(folder: Path) -> list[Item]:
    path = existing(folder / "questions.json", LAYOUT)
    rows = json_value(path)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} must hold a list of questions, got {shown(rows)}.")
    items = []
    for number, row in enumerate(rows):
        is_row = isinstance(row, list) and [type(value) for value in row] == [str, str, int]
        if not is_row:
            raise UserError(
                f"{path}, question {number}: expected [question, answer, image number], got {shown(row)}."
            )
        question, answer, image = row
        items.append(Item(str(number), question, (picture(folder, f"{image}.png"),), answer))
    return items


def tables(items: Sequence[Item], answers: Mapping[str, str]) -> list[Table]:
    kinds: dict[str, list[Item]] = {"yes or no": [], "shape": [], "colour": []}
    for item in items:
        kind = "yes or no" if item.facts in ("yes", "no") else "colour" if item.facts in COLOURS else "shape"
        kinds[kind].append(item)
    shares: list[Cell] = ["measured"]
    right = 0.0
    for kind, own in kinds.items():
        found = [_right(kind, answers[item.id], item.facts) for item in own]
        right += sum(found)
        shares.append(100 * sum(found) / len(own) if own else None)
    summary = Table("easy-VQA", ("%, exact", *kinds, "all"), [[*shares, 100 * right / len(items)]])
    own = kinds["yes or no"]
    if not own:
        return [summary]
    truths, given = [item.facts for item in own], [answers[item.id] for item in own]
    score = pope.score(truths, given)
    read_as = [mme.reading(answer) for answer in given]
    by_mme = 100 * sum(r == t for r, t in zip(read_as, truths, strict=True)) / len(own)
    columns = (
        "yes or no, %",
        "accuracy",
        "precision",
        "recall",
        "F1",
        "yes ratio",
        "accuracy by MME's rule",
        "unread",
    )
    row: list[Cell] = ["measured", *(100 * share for share in score[:5]), by_mme]
    unread = 100 * read_as.count("other") / len(own)
    return [summary, Table("The yes-or-no part by POPE's rule, and by MME's", columns, [[*row, unread]])]


def _right(kind: str, answer: str, truth: str) -> float:
    if kind == "yes or no":
        return float(mme.reading(answer) == truth)
    return float(vqa.normalised(answer) == vqa.normalised(truth))


BENCHMARK = Benchmark(
    "easy-vqa", "easy-VQA: questions about coloured shapes, on a CPU", LAYOUT, read, tables, max_new_tokens=8
)
