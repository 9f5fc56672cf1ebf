"""Benchmark files: JSON lines and tables, with one sentence for what is wrong in them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zinit_kernels.console import shown

from .shared import UserError, json_values, read_text

_LARGEST_CELL = 1 << 30  # characters: MMBench keeps its images in a column, csv's own limit is 131,072


def existing(path: Path, layout: str) -> Path:
    """The path, if it is there. Raises UserError that says what the folder should hold."""
    if not path.exists():
        raise UserError(f"there is no {path}; the data of this benchmark are {layout}")
    return path


def json_rows(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """The objects of a JSON list or of JSON lines, each with these fields of these types.

    Raises UserError naming the line.
    """
    rows = []
    for line, value in json_values(read_text(path), path):
        check_fields(value, fields, f"{path}, line {line}")
        _check_characters(value, f"{path}, line {line}")
        rows.append(value)
    if not rows:
        raise UserError(f"{path} holds no questions.")
    return rows


def json_object(path: Path) -> dict[str, Any]:
    """The one JSON object of a file. Raises UserError where the file holds something else."""
    value = json_value(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold one JSON object, got {shown(value)}.")
    return value


def json_value(path: Path) -> Any:
    """What a JSON file holds. Raises UserError where it is not JSON, or says something twice."""
    try:
        value = json.loads(read_text(path), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}).") from error
    _check_characters(value, str(path))
    return value


def _check_characters(value: Any, where: str) -> None:
    """JSON can name half of a character, which no tokenizer takes. Raises UserError for one."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{where} holds {shown(half)}, which is half of a character.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; json would keep the last of two values of a name and drop the first without a word."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r} is there twice in one object")
        found[name] = value
    return found


def check_fields(value: object, fields: Mapping[str, type], where: str) -> None:
    """Raises UserError unless the value is an object that has these fields of these types."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object with {', '.join(fields)}, got {shown(value)}.")
    for name, kind in fields.items():
        if name not in value:
            raise UserError(f"{where}: the field {name!r} is missing (it has {shown(list(value))}).")
        content = value[name]
        if not isinstance(content, kind) or (isinstance(content, bool) and kind is not bool):
            raise UserError(
                f"{where}: the field {name!r} must be of type {kind.__name__}, got {shown(content)}."
            )


def table_rows(path: Path, columns: Sequence[str], delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a CSV or TSV file with a header that has these columns.

    Raises UserError for a column that is missing or twice there, a row with more or fewer cells, and a file
    without rows.
    """
    limit = csv.field_size_limit(_LARGEST_CELL)
    try:
        reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
        header = next(reader, [])
        if missing := [name for name in columns if name not in header]:
            raise UserError(
                f"{path} has no column {missing[0]!r}; its columns are {', '.join(header) or 'none'}."
            )
        if twice := [name for name in columns if header.count(name) > 1]:
            raise UserError(f"{path} has the column {twice[0]!r} twice: take one of them out.")
        rows = []
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells for {len(header)} columns."
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise UserError(f"{path} is not a table that can be read: {error}.") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise UserError(f"{path} holds no rows.")
    return rows


def refuse_duplicates(ids: Iterable[str], path: Path) -> None:
    """Raises UserError for an id that is there twice: one answer cannot serve two questions."""
    seen = set()
    for key in ids:
        if key in seen:
            raise UserError(f"{path}: the id {key!r} is there twice.")
        seen.add(key)
