"""What a benchmark asks, and what its figures look like."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .shared import UserError


class Picture(NamedTuple):
    """An image: a file, or the base64 text that a table holds. Pictures of the same key are the same image."""

    key: str
    path: Path | None = None
    encoded: str = ""

    def stamp(self) -> list[str | int]:
        """What tells it from another image: its key, and the size of its file or its text."""
        size = self.path.stat().st_size if self.path is not None and self.path.is_file() else 0
        return [self.key, size or hashlib.sha256(self.encoded.encode()).hexdigest()[:16]]

    def read(self) -> bytes:
        """The bytes of the image file. Raises UserError where they cannot be read."""
        if self.path is not None:
            try:
                return self.path.read_bytes()
            except OSError as error:
                raise UserError(f"cannot read the image {self.path}: {error.strerror}.") from error
        try:
            return base64.b64decode(self.encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(f"the image of {self.key} is not base64 ({error}).") from error


class Item(NamedTuple):
    """One question: its id, what is asked, about which images, and what the benchmark's rule needs to know."""

    id: str
    question: str
    pictures: tuple[Picture, ...] = ()
    facts: Any = None


class PartlyAnswered(UserError):
    """Not every question of a batch was answered. answers: id -> text of those that were."""

    def __init__(self, sentence: str, answers: Mapping[str, str]):
        super().__init__(sentence)
        self.answers = answers

    def __reduce__(self) -> tuple[Any, ...]:  # of an exception it would leave out `answers`
        return type(self), (str(self), self.answers)


class Answerer(Protocol):
    """A model that answers. identity: what tells its answers from those of another model, as JSON."""

    identity: Mapping[str, Any]

    def check(self, items: Sequence[Item]) -> None:
        """Raises UserError for what it cannot answer, before the first of these questions is asked."""

    def answer(self, items: Sequence[Item]) -> list[str]:
        """An answer for each item, in order. A picture that several of them have is encoded once."""


Cell = str | float | int | None


@dataclass(frozen=True)
class Table:
    """Figures: a row's first cell is its name. notes are printed below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()


def unread_note(share: float) -> str:
    """The note below a table of multiple choice: the share of the answers that no rule could read."""
    return f"{100 * share:.1f} % of the answers name no option that a rule could read; they count as wrong."


@dataclass(frozen=True)
class Quoted:
    """A row that was not measured here."""

    name: str
    source: str
    values: Mapping[str, float]  # column -> figure


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as a command.

    Args:
        about: one line for --help. layout: what the folder of --data must hold, a line for each file.
        read: the folder -> its questions. Raises UserError where something is wrong there.
        tables: the questions and the answer of each id -> figures. The first table is the summary; its first row, named
            "measured", is what quoted rows stand beside.
        max_new_tokens: of an answer. brief: ask for a single word or phrase.
        foreign: reads answers in the benchmark's own format, where it has one: a path -> id -> answer.
    """

    name: str
    about: str
    layout: str
    read: Callable[[Path], list[Item]]
    tables: Callable[[Sequence[Item], Mapping[str, str]], list[Table]]
    max_new_tokens: int = 32
    brief: bool = False
    quoted: Sequence[Quoted] = ()
    foreign: Callable[[Path], tuple[list[Item], dict[str, str]]] | None = None
    notes: Sequence[str] = field(default=())
