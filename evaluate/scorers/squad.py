"""SQuAD 1.1 and 2.0 (Rajpurkar et al., arXiv 1606.05250, 1806.03822): exact match and F1 of answer texts."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Score(NamedTuple):
    """In percent. The last three are of SQuAD 2.0, whose unanswerable questions have no truth; None where all have one.

    has_answer_* count the answerable questions, no_answer the share of the others that were left unanswered.
    """

    exact: float
    f1: float
    has_answer_exact: float | None = None
    has_answer_f1: float | None = None
    no_answer: float | None = None


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation, without the words a, an and the, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, truth: str) -> float:
    """1 where both are the same once normalised."""
    return float(normalised(answer) == normalised(truth))


def f1(answer: str, truth: str) -> float:
    """F1 of the words; where one of the two is empty, 1 if both are."""
    own, other = normalised(answer).split(), normalised(truth).split()
    if not own or not other:
        return float(own == other)
    shared = (Counter(own) & Counter(other)).total()
    return 2 * shared / (len(own) + len(other))


def score(answers: Mapping[str, str], truths: Mapping[str, Sequence[str]]) -> Score:
    """The best over the truths of each question, averaged.

    Args:
        answers: question id -> text, "" for no answer. truths: id -> texts, none for an unanswerable question.

    Raises:
        ValueError: no questions, or one without an answer (an unanswered one has the answer "").
    """
    if not truths:
        raise ValueError("there are no questions")
    if missing := truths.keys() - answers.keys():
        raise ValueError(f"{len(missing)} questions have no answer, the first is {min(missing)!r}")
    exact, overlap, answerable = {}, {}, {}
    for key, texts in truths.items():
        known = [text for text in texts if normalised(text)]
        answerable[key] = bool(known)
        exact[key] = max(exact_match(answers[key], text) for text in known or [""])
        overlap[key] = max(f1(answers[key], text) for text in known or [""])
    everything = list(truths)
    if all(answerable.values()):
        return Score(_percent(exact, everything), _percent(overlap, everything))
    has = [key for key in truths if answerable[key]]
    lacks = [key for key in truths if not answerable[key]]
    return Score(
        _percent(exact, everything), _percent(overlap, everything),
        _percent(exact, has) if has else None, _percent(overlap, has) if has else None, _percent(exact, lacks),
    )  # fmt: skip


def _percent(of: Mapping[str, float], keys: Sequence[str]) -> float:
    return 100 * sum(of[key] for key in keys) / len(keys)
