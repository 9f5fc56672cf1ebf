"""Fields of a foreign configuration file, each checked as it is read.

The rule for a field that is not read here: it passes if it is switched off (null, false, 0, empty), or if it is known
to change nothing that the network computes. Any other is refused by name: it may change the meaning of the weights, and
a model that ignored it would give wrong answers silently.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from zinit_kernels.console import shortened, shown

from .errors import UserError

LARGEST_SIZE = 1 << 31  # sizes and ids are below it
_LARGEST = 1e300  # a larger whole number has no finite float


def number(config: Mapping[str, Any], file: str, name: str, kind: type, default: Any = None) -> Any:
    """A positive number, of the `kind` int (below 2**31) or float; the default if it is absent or null."""
    value = default if config.get(name) is None else config[name]
    accepted = (int,) if kind is int else (int, float)
    if not isinstance(value, accepted) or isinstance(value, bool) or not 0 < value < _LARGEST:
        whole = "whole " if kind is int else ""
        raise UserError(f"{file} must have a positive {whole}number as {name}, it has {shown(value)}.")
    if kind is int and value >= LARGEST_SIZE:
        raise UserError(f"{file} must have a number below 2**31 as {name}, it has {shown(value)}.")
    return kind(value)


def flag(config: Mapping[str, Any], file: str, name: str) -> bool:
    """true or false; absent and null are false."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{file} must have true or false as {name}, it has {shown(value)}.")
    return bool(value)


def token_ids(config: Mapping[str, Any], file: str, name: str, default: int | None) -> tuple[int, ...]:
    """A token id or a list of them; null is none, absent the default."""
    value = config.get(name, default)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
        raise UserError(
            f"{file} must have a whole number as {name}, or a list of them, it has {shown(value)}."
        )
    return tuple(ids)


def refuse_unknown(
    config: Mapping[str, Any], file: str, known: Collection[str], off: Collection[Any] = (None, False, 0)
) -> None:
    """Raises UserError for a field that is neither known nor switched off.

    Names that begin with an underscore are bookkeeping of the program that wrote the file.
    """
    for name, value in config.items():
        if name in known or name.startswith("_"):
            continue
        if value in ("", [], {}) or (not isinstance(value, (str, list, dict)) and value in off):
            continue
        raise UserError(
            f"{file} says {shortened(name)} = {shown(value)}, which is not supported. If it changes nothing that the "
            "network computes, take it out of the file."
        )
