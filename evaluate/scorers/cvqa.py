"""C-VQA (Zhang et al., arXiv 2310.06627): a question about an image, and the same under a condition contrary to fact.

The score is the accuracy on the second; the loss is the accuracy on the first minus it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from .choices import read_choice

SUFFIX = " Answer the question using a single word or phrase."
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {**{word: number for number, word in enumerate(_WORDS)}, "no": 0, "none": 0}
_OPTION = re.compile(r"(?<![A-Za-z])([A-Z]):\s*(.*?)(?=\s*(?<![A-Za-z])[A-Z]:|$)", re.DOTALL)


class Row(NamedTuple):
    """A pair of questions with their truths and answers."""

    kind: str  # the file's `type`: direct, indirect, boolean, ...
    query: str
    truth: str
    answer: str
    new_query: str
    new_truth: str
    new_answer: str


class GroupScore(NamedTuple):
    """Of one kind, in percent; unread is the share of its answers (of both questions) that no rule reads."""

    original: float
    counterfactual: float
    unread: float

    @property
    def loss(self) -> float:
        """How much the condition costs, in points."""
        return self.original - self.counterfactual


def read_number(answer: str) -> str | None:
    """The first number or number word, in digits.

    What belongs to a condition is left out: all from the word "if" on, or, in an answer that begins with it, all up to
    the first comma.
    """
    words = re.findall(r"\w+|,", answer.lower())
    if words[:1] == ["if"]:
        words = words[words.index(",") :] if "," in words else []
    elif "if" in words:
        words = words[: words.index("if")]
    for word in words:
        if word.isascii() and word.isdigit():
            return str(int(word))
        if word in NUMBERS:
            return str(NUMBERS[word])
    return None


def read_boolean(answer: str) -> str | None:
    """ "no" where no, not or false is among the words, else "yes" where yes, true, be, is or are is."""
    words = set(re.findall(r"\w+", answer.lower()))
    if words & {"no", "not", "false"}:
        return "no"
    return "yes" if words & {"yes", "true", "be", "is", "are"} else None


def options_of(query: str) -> dict[str, str]:
    """The options written into a question of the synthetic part: "... Select the correct answer:A:16  B:17"."""
    return {letter: text.strip() for letter, text in _OPTION.findall(query)}


def read(kind: str, query: str, truth: str, answer: str) -> str | None:
    """The answer as the truth is written, or None: yes or no, a letter of the question's options, or a number."""
    if kind == "boolean":
        return read_boolean(answer)
    if truth.isalpha() and truth in (options := options_of(query)):
        return read_choice(answer, options)
    return read_number(answer)


def score(rows: Iterable[Row]) -> dict[str, GroupScore]:
    """Group -> its score, in the order of appearance. Raises ValueError where there are no rows."""
    groups: dict[str, list[tuple[bool, bool, int]]] = {}
    for row in rows:
        first = read(row.kind, row.query, row.truth, row.answer)
        second = read(row.kind, row.new_query, row.new_truth, row.new_answer)
        result = (first == row.truth, second == row.new_truth, (first is None) + (second is None))
        groups.setdefault(row.kind, []).append(result)
    if not groups:
        raise ValueError("there are no questions")
    return {
        kind: GroupScore(
            100 * sum(a for a, _, _ in found) / len(found),
            100 * sum(b for _, b, _ in found) / len(found),
            sum(n for _, _, n in found) / (2 * len(found)),
        )
        for kind, found in groups.items()
    }
