"""VQAv2 and data sets of its form: a file of questions and one of ten people's answers to each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..question import Benchmark, Cell, Item, Table
from ..reading import check_fields, json_object, refuse_duplicates
from ..scorers import vqa
from ..shared import UserError
from .pictures import picture

LAYOUT = (
    "one file *questions.json and one *annotations.json, as VQAv2's, and the images in a folder named as the data "
    "subtype (val2014), in images/ or beside them"
)


def read(folder: Path) -> list[Item]:
    path, questions = _object(folder, "questions")
    truths_path, annotations = _object(folder, "annotations")
    check_fields(questions, {"questions": list}, str(path))
    check_fields(annotations, {"annotations": list}, str(truths_path))
    by_id: dict[int, tuple[str, list[Any]]] = {}
    for number, row in enumerate(annotations["annotations"], 1):
        where = f"{truths_path}, annotation {number}"
        check_fields(row, {"question_id": int, "answers": list}, where)
        people = [answer.get("answer") if isinstance(answer, dict) else None for answer in row["answers"]]
        if not people or not all(isinstance(text, str) for text in people):
            raise UserError(f"{where}: its answers must be objects with the field 'answer'.")
        if row["question_id"] in by_id:
            raise UserError(f"{where}: question {row['question_id']} is there twice.")
        by_id[row["question_id"]] = (str(row.get("answer_type", "all")), people)
    subtype = str(questions.get("data_subtype", "val2014"))
    items = []
    for number, row in enumerate(questions["questions"], 1):
        check_fields(
            row, {"question_id": int, "image_id": int, "question": str}, f"{path}, question {number}"
        )
        if row["question_id"] not in by_id:
            raise UserError(f"{truths_path} holds no answers to question {row['question_id']}.")
        image = picture(folder, f"COCO_{subtype}_{row['image_id']:012d}.jpg", (subtype, "images", ""))
        items.append(Item(str(row["question_id"]), row["question"], (image,), by_id[row["question_id"]]))
    refuse_duplicates((item.id for item in items), path)
    return items


def _object(folder: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    found = sorted(folder.glob(f"*{kind}.json")) if folder.is_dir() else []
    if len(found) != 1:
        raise UserError(
            f"{folder} holds {len(found)} files *{kind}.json; the data of this benchmark are {LAYOUT}"
        )
    return found[0], json_object(found[0])


def tables(items: Sequence[Item], answers: Mapping[str, str]) -> list[Table]:
    kinds: dict[str, list[float]] = {}
    for item in items:
        kind, people = item.facts
        kinds.setdefault(kind, []).append(100 * vqa.accuracy(answers[item.id], people))
    every = [value for values in kinds.values() for value in values]
    columns = ("VQA accuracy, %", "overall", *kinds)
    row: list[Cell] = ["measured", sum(every) / len(every), *(sum(of) / len(of) for of in kinds.values())]
    return [Table("VQA", columns, [row])]


BENCHMARK = Benchmark(
    "vqa", "VQAv2 and data sets of its form: agreement with ten people", LAYOUT, read, tables,
    max_new_tokens=16, brief=True,
)  # fmt: skip
