"""Micro-F1 of labelled spans, for NER and SRL: the counts of CoNLL's conlleval script and of seqeval's default mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

Span = tuple[str, int, int]  # label, first token, last token


class Score(NamedTuple):
    """precision, recall and f1 from 0 to 1 (0 where nothing could be right), and the counts they are made of."""

    precision: float
    recall: float
    f1: float
    right: int
    predicted: int
    true: int


def spans(tags: Sequence[str]) -> list[Span]:
    """The spans of one sentence, in order, from BIO, IOB1, IOE or BIOES tags; all end with the sentence.

    A span begins at B or S, after E or S, where the label changes, and at an I or E that follows O: "O I-PER" is a
    span, as conlleval counts it. It ends before O, before another B or S, and after E or S.
    """
    found: list[Span] = []
    start, before, label = 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        if before != "O" and (mark in "OBS" or kind != label or before in "ES"):
            found.append((label, start, place - 1))
            before = "O"
        if mark != "O" and before == "O":
            start = place
        before, label = mark, kind
    return found


def score(truths: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> Score:
    """Of all sentences together.

    Args:
        truths, predictions: the tags of each sentence, "O" or a mark, a hyphen and a label ("B-PER", "I-C-A1").

    Raises:
        ValueError: there are not as many sentences or tags, or a tag that is not of this form.
    """
    by_label = counts(truths, predictions)
    right, predicted, true = (sum(values[i] for values in by_label.values()) for i in range(3))
    return _score(right, predicted, true)


def score_by_label(truths: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> dict[str, Score]:
    """Label -> its score, sorted; arguments and errors as of `score`."""
    return {label: _score(*values) for label, values in sorted(counts(truths, predictions).items())}


def counts(
    truths: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]
) -> dict[str, tuple[int, int, int]]:
    """Label -> spans that are right, predicted and true."""
    if len(truths) != len(predictions):
        raise ValueError(f"expected tags for {len(truths)} sentences, got {len(predictions)}")
    right: Counter[str] = Counter()
    predicted: Counter[str] = Counter()
    true: Counter[str] = Counter()
    for number, (real, said) in enumerate(zip(truths, predictions, strict=True)):
        if len(real) != len(said):
            raise ValueError(f"sentence {number} has {len(real)} tokens and {len(said)} predicted tags")
        for tag in (*real, *said):
            if tag != "O" and (len(tag) < 3 or tag[0] not in "BIES" or tag[1] != "-"):
                raise ValueError(
                    f"sentence {number}: tags are O, B-LABEL, I-LABEL, E-LABEL or S-LABEL, got {tag!r}"
                )
        own, other = spans(real), spans(said)
        true.update(label for label, *_ in own)
        predicted.update(label for label, *_ in other)
        right.update(label for label, *_ in set(own) & set(other))
    return {label: (right[label], predicted[label], true[label]) for label in true | predicted}


def _score(right: int, predicted: int, true: int) -> Score:
    precision = right / predicted if predicted else 0.0
    recall = right / true if true else 0.0
    f1 = 2 * right / (predicted + true) if predicted + true else 0.0
    return Score(precision, recall, f1, right, predicted, true)
