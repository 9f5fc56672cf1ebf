"""Two models' answers to the same questions, compared by a judge that sees each pair in both orders.

A judge prefers the answer that it reads first, so a pair is won only where both orders agree. Two forms of verdict are
read: FastChat's first one, two scores from 1 to 10 in the first line, and its later one, [[A]], [[B]] or [[C]].
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

FIRST, SECOND, TIE = "first", "second", "tie"
OUTCOMES = ("win", "tie", "loss")
_SCORE = r"(?:assistant\s*[12]\s*:\s*)?(\d+(?:\.\d+)?)(?:/10)?"
_SCORES = re.compile(rf"{_SCORE}[,\s]+{_SCORE}", re.IGNORECASE)
_MARK = re.compile(r"\[\[([ABC])\]\]")


class Verdict(NamedTuple):
    """What the judge said of a question: with our answer first, and with the other's first."""

    category: str
    ours_first: str
    theirs_first: str


class Score(NamedTuple):
    """Counts by category and over all; unread are questions with a verdict that no rule reads, which count nowhere."""

    categories: dict[str, dict[str, int]]
    total: dict[str, int]
    unread: int


def read_scores(verdict: str) -> tuple[float, float] | None:
    """The two scores of the first line that is not empty: "8 9", "8.5, 7", "Assistant 1: 8 Assistant 2: 9"."""
    line = next((line.strip() for line in verdict.splitlines() if line.strip()), "")
    found = _SCORES.fullmatch(line.rstrip("."))
    if found is None:
        return None
    first, second = float(found[1]), float(found[2])
    return (first, second) if 0 <= first <= 10 and 0 <= second <= 10 else None


def read_verdict(verdict: str) -> str | None:
    """FIRST, SECOND, TIE or None: by the last [[...]], else by the scores of the first line."""
    if marks := _MARK.findall(verdict):
        return {"A": FIRST, "B": SECOND, "C": TIE}[marks[-1]]
    scores = read_scores(verdict)
    if scores is None:
        return None
    return TIE if scores[0] == scores[1] else FIRST if scores[0] > scores[1] else SECOND


def outcome(ours_first: str, theirs_first: str) -> str | None:
    """ "win", "tie" or "loss"; "tie" where the two orders disagree; None where one cannot be read."""
    one, other = read_verdict(ours_first), read_verdict(theirs_first)
    if one is None or other is None:
        return None
    if one == FIRST and other == SECOND:
        return "win"
    return "loss" if one == SECOND and other == FIRST else "tie"


def score(verdicts: Iterable[Verdict]) -> Score:
    """Wins, ties and losses."""
    categories: dict[str, dict[str, int]] = {}
    unread = 0
    for verdict in verdicts:
        counts = categories.setdefault(verdict.category, dict.fromkeys(OUTCOMES, 0))
        result = outcome(verdict.ours_first, verdict.theirs_first)
        if result is None:
            unread += 1
        else:
            counts[result] += 1
    total = {name: sum(counts[name] for counts in categories.values()) for name in OUTCOMES}
    return Score(categories, total, unread)
