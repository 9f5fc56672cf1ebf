"""MMBench: a table with the images in it; questions that come once are rotated here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from zinit_kernels.console import shown

from ..question import Benchmark, Cell, Item, Picture, Quoted, Table, unread_note
from ..reading import refuse_duplicates, table_rows
from ..scorers import mmbench
from ..shared import UserError

LAYOUT = "one file *.tsv with the columns index, question, A, B, answer, l2-category and image (base64)"
COLUMNS = ("index", "question", "A", "B", "answer", "l2-category", "image")
_LETTERS = "ABCDEFGH"
_LONGEST_INDEX = 9  # characters: a shorter cell of digits names the row that has the image


def read(folder: Path) -> list[Item]:
    path = _table(folder)
    rows = table_rows(path, COLUMNS, "\t")
    refuse_duplicates((row["index"] for row in rows), path)
    for row in rows:
        if not re.fullmatch(f"0|[1-9][0-9]{{0,{_LONGEST_INDEX - 1}}}", row["index"]):  # 01 would be 1 again
            raise UserError(f"{path}: an index must be a number, got {shown(row['index'])}.")
        if row["l2-category"] not in mmbench.ABILITIES:
            raise UserError(
                f"{path}, index {row['index']}: MMBench has no l2-category {row['l2-category']!r}."
            )
    images = {row["index"]: row["image"] for row in rows}
    is_rotated = any(int(row["index"]) >= mmbench.ROTATION for row in rows)
    items = []
    for row in rows:
        options = {c: row[c] for c in _LETTERS if row.get(c, "") not in ("", "nan")}
        if row["answer"] not in options:
            raise UserError(
                f"{path}, index {row['index']}: the answer {row['answer']!r} is none of its options."
            )
        turns = [(options, row["answer"])] if is_rotated else mmbench.rotations(options, row["answer"])
        for k, (turned, truth) in enumerate(turns):
            number = int(row["index"]) + k * mmbench.ROTATION
            facts = mmbench.Row(number, turned, truth, row["l2-category"], "")
            items.append(Item(str(number), _question(row, turned), (_picture(path, row, images),), facts))
    try:
        mmbench.score(item.facts for item in items)  # its rule refuses rotations that are not whole
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from error
    return items


def _table(folder: Path) -> Path:
    if folder.is_file():
        return folder
    found = sorted(folder.glob("*.tsv")) if folder.is_dir() else []
    if len(found) != 1:
        raise UserError(f"{folder} holds {len(found)} files *.tsv; the data of this benchmark are {LAYOUT}")
    return found[0]


def _picture(path: Path, row: Mapping[str, str], images: Mapping[str, str]) -> Picture:
    encoded, index = row["image"], row["index"]
    if encoded.isdecimal() and len(encoded) <= _LONGEST_INDEX:
        index, encoded = encoded, images.get(encoded, "")
    if not encoded or encoded.isdecimal():
        raise UserError(f"{path}, index {row['index']}: there is no image.")
    return Picture(f"{path.name}, index {int(index) % mmbench.ROTATION}", encoded=encoded)


def _question(row: Mapping[str, str], options: Mapping[str, str]) -> str:
    hint = row.get("hint", "")
    lines = [f"Hint: {hint}"] if hint not in ("", "nan") else []
    lines += [f"Question: {row['question']}", "Options:", *(f"{c}. {text}" for c, text in options.items())]
    return "\n".join([*lines, "Please select the correct answer from the options above."])


def tables(items: Sequence[Item], answers: Mapping[str, str]) -> list[Table]:
    found = mmbench.score(item.facts._replace(answer=answers[item.id]) for item in items)
    names = mmbench.ABILITIES.values()
    row: list[Cell] = ["measured", found.overall, *(found.abilities.get(name) for name in names)]
    return [Table("MMBench", ("%, CircularEval", "overall", *names), [row], [unread_note(found.unread)])]


BENCHMARK = Benchmark(
    "mmbench", "MMBench: multiple choice, every rotation of the options must be right", LAYOUT, read, tables,
    quoted=(
        Quoted(
            "LLaMA-Adapter (V2) 7B", "arXiv 2303.16199v3, supplement",
            {"overall": 39.5, "LR": 13.1, "AR": 47.4, "RR": 23.0, "FP-S": 45.0, "FP-C": 33.2, "CP": 50.6},
        ),
    ),
)  # fmt: skip
