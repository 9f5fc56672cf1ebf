"""LVLM-eHub (Xu et al., arXiv 2306.09265): many data sets, each scored by its kind, in four dimensions.

The published table holds shares from 0 to 1 that cannot be plain accuracies (they are scaled by the best model of each
data set), so these means are comparable with each other and not with it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from . import cider, vqa

DIMENSIONS: dict[str, dict[str, str]] = {  # dimension -> data set (by the names of its authors' code) -> kind
    "visual perception": {
        "ImageNet": "class", "CIFAR10": "class", "OxfordIIITPet": "class", "Flowers102": "class",
        "MSCOCO_OC": "vqa", "VCR1_OC": "vqa", "MSCOCO_MCI": "vqa", "VCR1_MCI": "vqa",
    },
    "visual knowledge acquisition": {
        **dict.fromkeys((
            "IIIT5K", "IC13", "IC15", "Total-Text", "CUTE80", "SVT", "SVTP", "COCO-Text", "WordArt", "CTW",
            "HOST", "WOST",
        ), "ocr"),
        "SROIE": "kie", "FUNSD": "kie", "NoCaps": "caption", "Flickr": "caption", "WHOOPSCaption": "caption",
    },
    "visual reasoning": {
        **dict.fromkeys((
            "DocVQA", "TextVQA", "STVQA", "OCRVQA", "OKVQA", "GQA", "IconQA", "VSR", "WHOOPSVQA", "ScienceQA", "VizWiz",
        ), "vqa"),
        "Visdial": "rank",
    },
    "visual commonsense": {
        f"ImageNetVC_{name}": "vqa" for name in ("color", "component", "material", "others", "shape")
    },
}  # fmt: skip
KINDS = {name: kind for sets in DIMENSIONS.values() for name, kind in sets.items()}


class Score(NamedTuple):
    """Shares (CIDEr on its own scale of 0 to 10 divided by 10): of each data set, of each dimension, and overall.

    overall is the mean of the dimensions, and None unless all four have a data set.
    """

    datasets: dict[str, float]
    dimensions: dict[str, float]
    overall: float | None


def score(datasets: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]]) -> Score:
    """Args: data set -> (answers, truths), with one or more truths for each answer.

    Raises:
        ValueError: an unknown data set, one without answers, or lengths that differ.
    """
    shares = {}
    for name, (answers, truths) in datasets.items():
        if name not in KINDS:
            raise ValueError(f"LVLM-eHub has no data set {name!r}; it has {', '.join(KINDS)}")
        if not answers or len(answers) != len(truths):
            raise ValueError(
                f"{name}: expected an answer for each question, got {len(answers)} for {len(truths)}"
            )
        shares[name] = dataset_score(KINDS[name], answers, truths)
    dimensions = {}
    for dimension, sets in DIMENSIONS.items():
        found = [shares[name] for name in sets if name in shares]
        if found:
            dimensions[dimension] = sum(found) / len(found)
    overall = sum(dimensions.values()) / len(dimensions) if len(dimensions) == len(DIMENSIONS) else None
    return Score(shares, dimensions, overall)


def dataset_score(kind: str, answers: Sequence[str], truths: Sequence[Sequence[str]]) -> float:
    """By kind: "class" and "ocr" look for a truth among the letters and digits, "vqa" among normalised words, "kie" is
    the F1 of words over all answers, "rank" is 1 / the place of the first truth found, "caption" is CIDEr / 10.
    """
    if kind == "kie":
        return word_f1(answers, [texts[0] for texts in truths])
    if kind == "caption":
        return sum(cider.scores(answers, truths)) / len(answers) / 10
    rule = {"class": holds_letters, "ocr": holds_letters, "vqa": vqa.contains, "rank": reciprocal_rank}[kind]
    return sum(float(rule(answer, texts)) for answer, texts in zip(answers, truths, strict=True)) / len(
        answers
    )


def holds_letters(answer: str, truths: Sequence[str]) -> bool:
    """Whether a truth is in the answer as whole words, after all but letters, digits and spaces is removed."""
    given = _letters(answer)
    return any(re.search(rf"\b{re.escape(text)}\b", given) for text in map(_letters, truths) if text)


def _letters(text: str) -> str:
    return " ".join(re.sub(r"[^a-zA-Z0-9\s]", "", text).lower().split())


def reciprocal_rank(answer: str, ranked: Sequence[str]) -> float:
    """1 / the place of the first of the ranked candidates that the answer holds; 0 if it holds none."""
    return next((1 / place for place, text in enumerate(ranked, 1) if vqa.contains(answer, [text])), 0.0)


def word_f1(answers: Sequence[str], truths: Sequence[str]) -> float:
    """F1 of the words of all answers together, each word of a truth matched once."""
    given, wanted, matched = 0, 0, 0
    for answer, truth in zip(answers, truths, strict=True):
        own, other = Counter(answer.split()), Counter(truth.split())
        given, wanted, matched = given + own.total(), wanted + other.total(), matched + (own & other).total()
    return 2 * matched / (given + wanted) if given + wanted else 0.0
