"""MMBench (Liu et al., arXiv 2307.06281): multiple choice with CircularEval.

A question with N options is asked N times, with the options rotated. It counts only if every rotation is right, so a
preference for a letter gains nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .choices import read_choice

ROTATION = 1_000_000  # the k-th rotation of question i has the index i + k * ROTATION
ABILITIES = {  # l2-category of the file -> the column of the papers' tables
    "logic_reasoning": "LR",
    "attribute_reasoning": "AR",
    "relation_reasoning": "RR",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "coarse_perception": "CP",
}


class Row(NamedTuple):
    """One rotation of a question."""

    number: int  # the file's index
    options: Mapping[str, str]
    truth: str  # a letter of the options
    ability: str  # an l2-category
    answer: str


class Score(NamedTuple):
    """In percent of the questions, over all and by ability; unread is the share of rotations that no rule reads."""

    overall: float
    abilities: dict[str, float]
    unread: float


def rotations(options: Mapping[str, str], truth: str) -> list[tuple[dict[str, str], str]]:
    """Each option once in each place, and where the right one is then; the first is the question as it is written."""
    letters, texts = list(options), list(options.values())
    place = letters.index(truth)
    count = len(letters)
    return [
        (dict(zip(letters, texts[k:] + texts[:k], strict=True)), letters[(place - k) % count])
        for k in range(count)
    ]


def score(rows: Iterable[Row]) -> Score:
    """The share of questions whose every rotation is right.

    Raises:
        ValueError: no rows, an unknown ability, a rotation twice, or a question without one for each of its options.
    """
    questions: dict[int, dict[int, bool]] = {}
    wanted: dict[int, int] = {}
    ability: dict[int, str] = {}
    unread = total = 0
    for row in rows:
        rotation, index = divmod(row.number, ROTATION)
        if row.ability not in ABILITIES:
            raise ValueError(f"question {index}: MMBench has no ability {row.ability!r}")
        if rotation in questions.setdefault(index, {}):
            raise ValueError(f"index {row.number} is there twice")
        read = read_choice(row.answer, row.options)
        questions[index][rotation] = read == row.truth
        wanted[index], ability[index] = len(row.options), ABILITIES[row.ability]
        unread, total = unread + (read is None), total + 1
    if not total:
        raise ValueError("there are no questions")
    for index, found in questions.items():
        if len(found) != wanted[index]:
            raise ValueError(
                f"question {index} has {wanted[index]} options and {len(found)} rotations: CircularEval asks each"
            )
    right = {index: all(found.values()) for index, found in questions.items()}
    columns: dict[str, list[bool]] = {}
    for index, is_right in right.items():
        columns.setdefault(ability[index], []).append(is_right)
    return Score(
        _percent(list(right.values())),
        {column: _percent(columns[column]) for column in ABILITIES.values() if column in columns},
        unread / total,
    )


def _percent(right: list[bool]) -> float:
    return 100 * sum(right) / len(right)
