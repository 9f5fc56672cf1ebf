"""Tagged sentences: CoNLL columns for NER, and the lines of SRL data sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..reading import existing
from ..shared import UserError, read_text

LAYOUT = (
    "train.*, dev.* (or valid.*) and test*.*, each with a word and its tag in a line, a blank line between sentences, "
    "or with lines `INDEX words ||| tags` for semantic roles"
)
_TAG = re.compile(r"O|[BIES]-\S+")
_VALIDATION = ("dev", "valid", "validation", "val")
_SUFFIXES = (".conll", ".txt", ".tsv", ".bio", ".iob", ".iob2")


class Sentence(NamedTuple):
    """Words and their tags; predicate: the place of the word that the roles belong to, in SRL."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    predicate: int | None = None


class Splits(NamedTuple):
    """Sentences by part; a data set may have several tests."""

    train: list[Sentence]
    validation: list[Sentence]
    tests: dict[str, list[Sentence]]


def read_splits(folder: Path, roles: bool = False) -> Splits:
    """The data set of a folder. Raises UserError for a missing file or a damaged line."""
    train, validation, *tests = files_of(folder)
    read = read_roles if roles else read_columns
    return Splits(read(train), read(validation), {path.stem: read(path) for path in tests})


def files_of(folder: Path) -> list[Path]:
    """The files of a data set: train, validation, and one or more tests. Raises UserError where one is missing."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; the data are {LAYOUT}.")
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    found = []
    for part, names, most in (("train", ("train",), 1), ("dev", _VALIDATION, 1), ("test", ("test",), 9)):
        own = [path for path in files if _part(path) in names]
        if not 1 <= len(own) <= most:
            raise UserError(f"{folder} holds {len(own)} files {part}.*; the data are {LAYOUT}.")
        found += own
    return found


def _part(path: Path) -> str:
    """ "test" of test-wsj.conll and of wnut17_test.conll."""
    words = re.split(r"[._-]", path.stem.lower())
    return next((word for word in words if word in ("train", *_VALIDATION, "test")), "")


def read_columns(path: Path) -> list[Sentence]:
    """A word in the first column and its tag in the last, separated by spaces or tabs."""
    sentences: list[Sentence] = []
    words: list[str] = []
    tags: list[str] = []
    lines = read_text(existing(path, LAYOUT)).split("\n")
    for number, line in enumerate([*lines, ""], 1):
        cells = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or line.startswith("-DOCSTART-"):
            if words:
                sentences.append(Sentence(tuple(words), tuple(tags)))
            words, tags = [], []
            continue
        if len(cells) < 2 or not cells[0].strip():
            raise UserError(f"{path}, line {number}: expected a word and a tag, got {line!r}.")
        words.append(cells[0].strip())
        tags.append(_tag(cells[-1].strip(), path, number))
    return _filled(sentences, path)


def read_roles(path: Path) -> list[Sentence]:
    """Lines `INDEX words ||| tags`, where the word of that index, from 0, is the predicate."""
    sentences = []
    for number, line in enumerate(read_text(existing(path, LAYOUT)).split("\n"), 1):
        if not line.strip():
            continue
        left, mark, right = line.partition("|||")
        index, *words = left.split()
        tags = right.split()
        if not mark or len(words) != len(tags) or not words:
            raise UserError(
                f"{path}, line {number}: expected `INDEX words ||| tags` with a tag for each word, got {len(words)} "
                f"words and {len(tags)} tags."
            )
        if not index.isdecimal() or int(index) >= len(words):
            raise UserError(
                f"{path}, line {number}: the predicate's index must be 0 to {len(words) - 1}, got {index!r}."
            )
        checked = tuple(_tag(tag, path, number) for tag in tags)
        sentences.append(Sentence(tuple(words), checked, int(index)))
    return _filled(sentences, path)


def _tag(tag: str, path: Path, line: int) -> str:
    if _TAG.fullmatch(tag) is None:
        raise UserError(f"{path}, line {line}: a tag is O, or B-, I-, E- or S- and a label, got {tag!r}.")
    return tag


def _filled(sentences: list[Sentence], path: Path) -> list[Sentence]:
    if not sentences:
        raise UserError(f"{path} holds no sentences.")
    return sentences


def tags_of(sentences: Sequence[Sentence]) -> list[str]:
    """Every tag, sorted, O first."""
    return ["O", *sorted({tag for sentence in sentences for tag in sentence.tags} - {"O"})]
