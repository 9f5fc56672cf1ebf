"""POPE (Li et al., arXiv 2305.10355): "Is there a X in the image?", for objects that are there and that are not.

The positive class is "yes". The rules are those of the benchmark's own script.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SETTINGS = ("random", "popular", "adversarial")


class Score(NamedTuple):
    """Shares from 0 to 1. A figure whose divisor is 0 is 0.

    yes_ratio counts the predictions, not the truth. empty counts the answers without a word, which the rule reads as
    "yes": they are reported because they say nothing about the model's eyes.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    empty: float


def reading(answer: str) -> str:
    """ "no" if "No", "no" or "not" is among the words of the first sentence, else "yes".

    The first sentence ends at the first full stop; commas are dropped. Other forms, such as "NO", are no match, as in
    the official script.
    """
    words = answer.partition(".")[0].replace(",", "").split()
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def score(truths: Sequence[str], answers: Sequence[str]) -> Score:
    """Of one setting.

    Args:
        truths: "yes" or "no" for each question. answers: a model's, in the same order.

    Raises:
        ValueError: lengths differ, there is no question, or a truth is neither yes nor no.
    """
    if len(truths) != len(answers) or not truths:
        raise ValueError(f"expected an answer for each question, got {len(answers)} for {len(truths)}")
    if wrong := set(truths) - {"yes", "no"}:
        raise ValueError(f"the truth must be 'yes' or 'no', got {sorted(wrong)[0]!r}")
    said = [reading(answer) == "yes" for answer in answers]
    real = [truth == "yes" for truth in truths]
    true_yes = sum(s and r for s, r in zip(said, real, strict=True))
    right = sum(s == r for s, r in zip(said, real, strict=True))
    precision, recall = _share(true_yes, sum(said)), _share(true_yes, sum(real))
    return Score(
        accuracy=right / len(truths),
        precision=precision,
        recall=recall,
        f1=_share(2 * precision * recall, precision + recall),
        yes_ratio=sum(said) / len(said),
        empty=sum(not answer.strip() for answer in answers) / len(answers),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
