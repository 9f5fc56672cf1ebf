"""CIDEr-D (Vedantam et al., arXiv 1411.5726): n-grams that a caption shares with people's captions, weighted by how
rare they are in the whole set.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

LONGEST, SIGMA = 4, 6.0
_Vectors = list[dict[tuple[str, ...], float]]  # by length of the n-grams


def scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10; the set's score is their mean.

    Captions are split at spaces and compared as they are, so lower-case and tokenise them first where that is wanted.

    Raises:
        ValueError: lengths differ, or a caption has no reference.
    """
    if len(captions) != len(references) or not all(references):
        raise ValueError("CIDEr needs at least one reference for each caption")
    documents: Counter[tuple[str, ...]] = Counter()
    for texts in references:
        documents.update({gram for text in texts for gram in _counts(text)})
    size = math.log(len(captions)) if captions else 0.0
    return [
        sum(_similarity(caption, text, documents, size) for text in texts) / len(texts)
        for caption, texts in zip(captions, references, strict=True)
    ]


def _counts(text: str) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))


def _vectors(
    counts: Mapping[tuple[str, ...], int], documents: Counter[tuple[str, ...]], size: float
) -> _Vectors:
    vectors: _Vectors = [{} for _ in range(LONGEST)]
    for gram, count in counts.items():
        vectors[len(gram) - 1][gram] = count * (size - math.log(max(1, documents[gram])))
    return vectors


def _similarity(caption: str, text: str, documents: Counter[tuple[str, ...]], size: float) -> float:
    own, other = _counts(caption), _counts(text)
    # the published code measures lengths in pairs of words
    apart = sum(n for gram, n in own.items() if len(gram) == 2) - sum(
        n for gram, n in other.items() if len(gram) == 2
    )
    total = 0.0
    for a, b in zip(_vectors(own, documents, size), _vectors(other, documents, size), strict=True):
        value = sum(min(weight, b[gram]) * b[gram] for gram, weight in a.items() if gram in b)
        norms = math.sqrt(sum(w * w for w in a.values())) * math.sqrt(sum(w * w for w in b.values()))
        total += value / norms if norms else 0.0
    return 10 * total / LONGEST * math.exp(-(apart**2) / (2 * SIGMA**2))
