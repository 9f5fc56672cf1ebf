"""Options of a program in a YAML file: every field is an option, and the command line has the last word.

    words = with_config(parser, ["--config", "run.yaml", "--epochs", "2"])
    options = parser.parse_args(words)
    write_config("out/config.yaml", options)

A field is an option's name, with - or _ between its words. true sets a flag; false and null leave an option as it is.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from zinit_kernels.console import shown

from .errors import UserError
from .records import read_text
from .run_folder import write_file

_OPTION = "--config"


def with_config(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The words of the command line, behind those of the file that --config names, if it does.

    What the command line gives is not taken from the file, nor is what excludes it. Raises UserError for a file that
    cannot be read and for a field that is no option.
    """
    actions = {option: action for action in parser._actions for option in action.option_strings}
    path = _named_file(words, actions)
    if path is None:
        return list(words)
    given: set[str] = set()
    for word in words:
        if word.startswith("--"):
            options = _meant(word.partition("=")[0], actions)
            given |= {actions[option].dest for option in options if option in actions}
    for group in parser._mutually_exclusive_groups:
        members = {action.dest for action in group._group_actions}
        given |= members if members & given else set()
    found: list[str] = []
    for name, value in _fields(path).items():
        option = f"--{str(name).replace('_', '-')}"
        if option not in actions or option in (_OPTION, "--help"):
            close = difflib.get_close_matches(option, actions, 1)
            advice = f"is {close[0][2:]!r} meant?" if close else "--help lists the options"
            raise UserError(f"{path}: {shown(name)} is not an option: {advice}")
        if actions[option].dest not in given:
            found += _words(actions[option], option, value, f"{path}: {name}")
    return found + list(words)


def write_config(path: str | Path, options: argparse.Namespace) -> None:
    """Writes options as a file that --config takes. Each value is JSON, which is YAML too."""
    lines = [
        f"{name.replace('_', '-')}: {json.dumps(value, default=str, ensure_ascii=False)}\n"
        for name, value in sorted(vars(options).items())
    ]
    write_file(path, "".join(lines).encode())


def _named_file(words: Sequence[str], actions: Collection[str]) -> Path | None:
    """What --config names, whole or shortened as the parser allows it; None where the parser has to complain."""
    for place, word in enumerate(words):
        name, is_joined, value = word.partition("=")
        if _meant(name, actions) == [_OPTION]:
            following = words[place + 1 : place + 2]
            return Path(value) if is_joined else Path(following[0]) if following else None
    return None


def _meant(name: str, actions: Collection[str]) -> list[str]:
    """The options that a word of the command line may mean."""
    if name in actions or not name.startswith("--"):
        return [name]
    return [option for option in actions if option.startswith(name)]


def _fields(path: Path) -> Mapping[Any, Any]:
    import yaml

    try:
        fields = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not YAML ({reason}).") from None
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise UserError(
            f"{path} must hold one field a line, as `epochs: 5`, and not a {type(fields).__name__}."
        )
    return fields


def _words(action: argparse.Action, option: str, value: Any, where: str) -> list[str]:
    """A field as the command line would say it."""
    if value is None or value is False:
        return []
    if action.nargs == 0:
        if value is not True:
            raise UserError(f"{where} must be true or false, got {shown(value)}.")
        return [option]
    if action.nargs == "+":
        values = value if isinstance(value, list) else [value]
        if values and all(_is_plain(item) for item in values):
            return [option, *map(str, values)]
    elif _is_plain(value):
        return [f"{option}={value}"]  # one word, so that a value may begin with -
    raise UserError(f"{where} cannot be {shown(value)}.")


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)
