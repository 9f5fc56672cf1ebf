"""LVLM-eHub and Tiny LVLM-eHub: a folder for each data set, as their authors' code writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..question import Benchmark, Cell, Item, Picture, Quoted, Table
from ..reading import json_rows
from ..scorers import lvlm_ehub
from ..shared import UserError

LAYOUT = (
    "a folder for each data set (ImageNet, IIIT5K, ...) with dataset.json, a list of "
    '{"image_path", "question", "gt_answers"}, and its images'
)
QUESTIONS = {  # of data sets whose files have none
    "class": "Classify the main object in the image.",
    "ocr": "What is written in the image?",
    "caption": "what is described in the image?",
}
_BREED = {
    "Flowers102": "What breed is the flower in the image?",
    "OxfordIIITPet": "What breed is the pet in the image?",
}


def read(folder: Path) -> list[Item]:
    found = sorted(path.parent.name for path in folder.glob("*/dataset.json"))
    if not found:
        raise UserError(f"{folder} holds no */dataset.json; the data of this benchmark are {LAYOUT}")
    items = []
    for name in found:
        path = folder / name / "dataset.json"
        if name not in lvlm_ehub.KINDS:
            raise UserError(
                f"{path}: LVLM-eHub has no data set {name!r}; it has {', '.join(lvlm_ehub.KINDS)}."
            )
        for number, row in enumerate(json_rows(path, {"image_path": str, "gt_answers": object}), 1):
            truths = row["gt_answers"] if isinstance(row["gt_answers"], list) else [row["gt_answers"]]
            if not truths or not all(isinstance(text, str) for text in truths):
                raise UserError(f"{path}, entry {number}: gt_answers must be a text or a list of texts.")
            question = row.get("question") or _BREED.get(name) or QUESTIONS.get(lvlm_ehub.KINDS[name])
            if not isinstance(question, str):
                raise UserError(f"{path}, entry {number}: the field 'question' is missing.")
            image = Picture(f"{name}/{row['image_path']}", folder / name / row["image_path"])
            items.append(Item(f"{name}/{number}", question, (image,), (name, truths)))
    return items


def tables(items: Sequence[Item], answers: Mapping[str, str]) -> list[Table]:
    sets: dict[str, tuple[list[str], list[list[str]]]] = {}
    for item in items:
        name, truths = item.facts
        given, wanted = sets.setdefault(name, ([], []))
        given.append(answers[item.id])
        wanted.append(truths)
    found = lvlm_ehub.score(sets)
    names = list(lvlm_ehub.DIMENSIONS)
    row: list[Cell] = ["measured", *(found.dimensions.get(name) for name in names), found.overall]
    note = "The published figures are scaled by the best model of each data set, so they are no plain shares."
    details: list[list[Cell]] = [[name, share, len(sets[name][0])] for name, share in found.datasets.items()]
    return [
        Table("LVLM-eHub", ("mean share", *names, "all"), [row], [note]),
        Table("LVLM-eHub by data set", ("data set", "share", "questions"), details),
    ]


BENCHMARK = Benchmark(
    "lvlm-ehub", "LVLM-eHub: many data sets in four dimensions", LAYOUT, read, tables, max_new_tokens=64,
    quoted=(
        Quoted(
            "LLaMA-Adapter (V2) 7B", "arXiv 2303.16199v3, supplement",
            {**dict(zip(lvlm_ehub.DIMENSIONS, (0.81, 0.44, 0.83, 0.59), strict=True)), "all": 0.6675},
        ),
    ),
)  # fmt: skip
