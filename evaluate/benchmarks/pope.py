"""POPE: three files of questions about COCO images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..question import Benchmark, Cell, Item, Table
from ..reading import existing, json_rows, refuse_duplicates
from ..scorers import pope
from ..shared import UserError
from .pictures import picture

LAYOUT = "coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json, and images in val2014/ or images/"
FIELDS = {"question_id": int, "image": str, "text": str, "label": str}


def read(folder: Path) -> list[Item]:
    items = []
    for setting in pope.SETTINGS:
        path = existing(folder / f"coco_pope_{setting}.json", LAYOUT)
        rows = json_rows(path, FIELDS)
        refuse_duplicates((str(row["question_id"]) for row in rows), path)
        for row in rows:
            if row["label"] not in ("yes", "no"):
                raise UserError(
                    f"{path}, question {row['question_id']}: the label must be yes or no, got {row['label']!r}."
                )
            image = picture(folder, row["image"], ("val2014", "images", ""))
            items.append(
                Item(f"{setting}/{row['question_id']}", row["text"], (image,), (setting, row["label"]))
            )
    return items


def tables(items: Sequence[Item], answers: Mapping[str, str]) -> list[Table]:
    rows: list[list[Cell]] = []
    for setting in pope.SETTINGS:
        asked = [item for item in items if item.facts[0] == setting]
        found = pope.score([item.facts[1] for item in asked], [answers[item.id] for item in asked])
        rows.append([setting, *(100 * share for share in found)])
    columns = ("measured, %", "accuracy", "precision", "recall", "F1", "yes ratio", "empty")
    note = "yes ratio: of the predictions. empty: answers without a word, which the rule reads as yes."
    return [Table("POPE", columns, rows, [note])]


BENCHMARK = Benchmark(
    "pope", "POPE: is there an object in the image, three settings", LAYOUT, read, tables, brief=True
)
