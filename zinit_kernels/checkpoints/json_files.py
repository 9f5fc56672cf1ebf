"""The one door for JSON that comes from outside: configurations, indices, metadata.

Python's own reader takes more than JSON: it lets the last of equal keys win, makes numbers of any length and text that
no encoding can write, and nests until its stack ends. What passes here can be compared, converted to a float, written
and shown without another check.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..console import shown
from .adapter import CheckpointError

LARGEST = 32 << 20  # bytes: the index of a checkpoint with 91,000 tensors has 9 MB
DEEPEST = 64  # levels: a configuration has about 4
_DIGITS = 300  # of a whole number: all of them are finite as a float


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object of a file, UTF-8 with or without a byte order mark.

    Raises:
        CheckpointError: not JSON, not an object, or JSON that programs read in different ways. OSError where the file
            cannot be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # reading a pipe would wait for whoever writes it
        raise CheckpointError(f"{path} is not a file")
    if (size := path.stat().st_size) > LARGEST:
        raise CheckpointError(f"{path} has {size} bytes, a JSON file may have {LARGEST}")
    return parse_object(path.read_bytes(), path)


def parse_object(text: str | bytes, where: object) -> dict[str, Any]:
    """The JSON object in `text`; `where` begins the sentence of an error. Raises CheckpointError."""
    content = parse_json(text, where)
    if not isinstance(content, dict):
        raise CheckpointError(f"{where} must hold a JSON object, it holds {shown(content)}")
    return content


def parse_json(text: str | bytes, where: object) -> Any:
    """Any JSON value in `text`. Raises CheckpointError."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        content = json.loads(text, object_pairs_hook=_object, parse_int=_whole_number)
        for depth, value in _walk(content):
            if depth > DEEPEST:
                raise RecursionError
            if isinstance(value, str):
                value.encode()  # "\ud800" is half a character, which no encoding can write
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where} is not valid JSON: it holds half a surrogate pair") from error
    except RecursionError as error:
        raise CheckpointError(f"{where} is not valid JSON: it is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError and those of the hooks
        raise CheckpointError(f"{where} is not valid JSON: {error}") from error
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        for name, value in pairs:
            if type(content[name]) is not type(value) or content[name] != value:
                raise ValueError(f"it says {shown(name)} twice, {shown(value)} and {shown(content[name])}")
    return content


def _whole_number(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"it holds a whole number of {len(digits)} digits")
    return int(digits)


def _walk(content: Any) -> Iterator[tuple[int, Any]]:
    """(depth, value) of everything in the content, keys included; a loop, so that no depth ends it."""
    waiting = [(0, content)]
    while waiting:
        depth, value = waiting.pop()
        yield depth, value
        if isinstance(value, dict):
            waiting += [(depth + 1, key) for key in value]
            waiting += [(depth + 1, inner) for inner in value.values()]
        elif isinstance(value, list):
            waiting += [(depth + 1, inner) for inner in value]
