"""Records from files, one after the other: JSON, JSONL, Parquet, and the folders of the `datasets` library.

    for record in read_source("chats.parquet"): ...

| what | how it is read |
| --- | --- |
| .jsonl, .ndjson | a line at a time, so a file may be larger than memory |
| .parquet, or a folder of such files | a row group at a time, by pyarrow |
| a folder of `Dataset.save_to_disk` | a row at a time, memory-mapped, by `datasets` |
| any other file | as JSON, whole |

Each object is an Alpaca record or a conversation (`messages`); a file may hold both.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import UserError, is_out_of_memory
from ..records import LeftOut, Record, is_record, json_values, read_text, say_unused, to_record
from .messages import Conversation, is_conversation, read_conversation

_LINES = (".jsonl", ".ndjson")
_ROWS = 256  # of a Parquet file at a time
_SPLIT = "train"  # of several in one folder


def read_source(path: str | Path, strict: bool = False) -> Iterator[Record | Conversation]:
    """The records of a file or folder, in order, as they are wanted.

    Those without an answer are left out and counted in a warning at the end; strict: they are an error. Raises
    UserError naming the file, the line or row, and what is wrong there.
    """
    path = Path(path)
    place = "line" if _is_json(path) else "row"
    unused: Counter[str] = Counter()

    def found() -> Iterator[tuple[int, Record | None, Record | Conversation | None]]:
        for number, value in _values(path):
            where = f"{path}, {place} {number}"
            if is_conversation(value):
                conversation = read_conversation(value, where, unused)
                # LeftOut looks at texts of records; a conversation has its own rule
                stand_in = None if conversation is None else Record("-", "-")
                yield number, stand_in, conversation
            else:
                record = to_record(value, where, unused)
                yield number, record, record

    for record in LeftOut(path, strict).of(found()):
        assert record is not None
        yield record
    say_unused(path, unused)


def check_source(path: Path) -> None:
    """Raises UserError for a file or folder that cannot be read at all, and for a library that is missing."""
    if not path.exists():
        raise UserError(f"cannot read {path}: No such file or directory.")
    if path.is_dir():
        _folder_kind(path)
    elif path.suffix.lower() == ".parquet":
        _parquet(path)


def _is_json(path: Path) -> bool:
    return not path.is_dir() and path.suffix.lower() != ".parquet"


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """(line or row, value) of each object."""
    if path.is_dir():
        if _folder_kind(path) == "parquet":
            for file in sorted(path.glob("*.parquet")):
                yield from _parquet_rows(file)
        else:
            yield from _dataset_rows(path)
    elif path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix.lower() in _LINES and path.is_file():
        yield from _json_lines(path)
    else:
        yield from json_values(read_text(path), path)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The objects of a file with one a line. From the first line that is something else, the whole file is read: it
    holds an object over several lines or one with a list, or `json_values` says what is wrong with it.
    """
    done = 0
    try:
        with open(path, encoding="utf-8-sig", newline=None) as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix("\ufeff")
                if not line.strip():
                    continue
                value = json.loads(line, object_pairs_hook=_unique)
                if not isinstance(value, dict) or (done == 0 and not is_record(value)):
                    break
                yield number, value
                done += 1
            else:
                return
    except (ValueError, RecursionError):
        pass
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    yield from islice(json_values(read_text(path), path), done, None)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field stands twice")  # `json_values` looks whether it matters
    return fields


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    parquet = _parquet(path)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _without_nulls(row)
    except (OSError, ValueError) as error:  # pyarrow's errors are one of them
        if isinstance(error, UserError):
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{path} is not a readable Parquet file ({reason}).") from None


def _dataset_rows(path: Path) -> Iterator[tuple[int, Any]]:
    datasets = _datasets(path)
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the library stumbles over in a broken folder
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{path} cannot be read by datasets.load_from_disk ({reason}).") from None
    if isinstance(found, dict):
        if len(found) > 1 and _SPLIT not in found:
            raise UserError(
                f"{path} holds the splits {', '.join(found)}: name the folder of one of them, as "
                f"{path}/{next(iter(found))}."
            )
        found = found[_SPLIT if _SPLIT in found else next(iter(found))]
    for number, row in enumerate(found, 1):
        yield number, _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """A row without what is null: Arrow gives every object every field that one of them has."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _folder_kind(path: Path) -> str:
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        _datasets(path)
        return "datasets"
    if any(path.glob("*.parquet")):
        _parquet(path)
        return "parquet"
    raise UserError(
        f"{path} is a folder, and neither one that Dataset.save_to_disk wrote nor one of .parquet files: name a file."
    )


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise _missing(path, "pyarrow") from None
    return parquet


def _datasets(path: Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise _missing(path, "datasets") from None
    return datasets


def _missing(path: Path, library: str) -> UserError:
    return UserError(
        f"{path} is read by {library}, which is not installed: pip install 'zinit-kernels[data]'."
    )
