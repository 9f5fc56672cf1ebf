"""ScienceQA (Lu et al., arXiv 2209.09513): multiple choice, reported in eight categories and on average.

An answer that cannot be read counts as wrong and is reported. The official script draws a random option for it, which
adds some 40 % of right answers to the share that was not understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

CATEGORIES = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_ANSWER = re.compile(r"\b[Tt]he answer is:? \(?([A-Z])\)?(?=[.,:;!\s]*(?:$|\n|[.,:;!]))")
_BARE = re.compile(r"\(?([A-Za-z])[).:]?")


class Row(NamedTuple):
    """One question. truth is a letter; options is how many there are."""

    subject: str
    grade: int
    has_hint: bool
    has_image: bool
    options: int
    truth: str
    answer: str


class Score(NamedTuple):
    """In percent; categories without a question are left out. unread is the share of answers that no rule reads."""

    average: float
    categories: dict[str, float]
    unread: float


def reading(answer: str, options: int) -> str | None:
    """The option's letter: of "The answer is B.", or of an answer that is a letter and nothing else; else None.

    None too where several letters are named, or one that the question does not have.
    """
    text = answer.strip()
    bare = _BARE.fullmatch(text)
    named = {bare[1].upper()} if bare else set(_ANSWER.findall(text))
    if len(named) != 1:
        return None
    letter = named.pop()
    return letter if ord(letter) - ord("A") < options else None


def categories_of(row: Row) -> list[str]:
    """The categories in which a question counts.

    Raises:
        ValueError: an unknown subject, or a grade outside 1 to 12.
    """
    if row.subject not in SUBJECTS:
        raise ValueError(f"ScienceQA has no subject {row.subject!r}; it has {', '.join(SUBJECTS)}")
    if not 1 <= row.grade <= 12:
        raise ValueError(f"the grade must be 1 to 12, got {row.grade}")
    context = [name for name, is_there in (("TXT", row.has_hint), ("IMG", row.has_image)) if is_there]
    return [SUBJECTS[row.subject], *(context or ["NO"]), "G1-6" if row.grade <= 6 else "G7-12"]


def score(rows: Iterable[Row]) -> Score:
    """The share of right answers by category and on average. Raises ValueError where there are no rows."""
    found: dict[str, list[bool]] = {name: [] for name in CATEGORIES}
    right, unread = [], 0
    for row in rows:
        read = reading(row.answer, row.options)
        right.append(read == row.truth)
        unread += read is None
        for name in categories_of(row):
            found[name].append(right[-1])
    if not right:
        raise ValueError("there are no questions")
    shares = {name: 100 * sum(of) / len(of) for name, of in found.items() if of}
    return Score(100 * sum(right) / len(right), shares, unread / len(right))
