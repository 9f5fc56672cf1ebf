"""VQA accuracy (Antol et al., arXiv 1505.00468): agreement with ten people, after both answers are normalised."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")  # the official pattern means to spare "3." too, and does not
_COMMA = re.compile(r"\d,\d")
# Short forms that people write without an apostrophe: those of the official list that can match lower-case text.
_SHORT = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# every short form with one of its apostrophes left out -> the short form
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _SHORT.split()
    for place, sign in enumerate(word)
    if sign == "'"
}


def normalised(answer: str) -> str:
    """Lower case, punctuation off, number words to digits, articles away, apostrophes back into short forms."""
    text = _without_punctuation(" ".join(answer.split()))
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Signs between two words become a space, signs beside a space go, and so do full stops outside numbers."""
    has_number_comma = _COMMA.search(text) is not None
    result = text
    for sign in _PUNCTUATION:
        stands_apart = f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if stands_apart or has_number_comma else " ")
    return _FULL_STOP.sub("", result)


def accuracy(answer: str, truths: Sequence[str]) -> float:
    """0 to 1: min(1, agreeing people / 3), averaged over leaving each person out in turn.

    People who all say the same are compared as they wrote it, as in the official script.

    Raises:
        ValueError: no truths.
    """
    if not truths:
        raise ValueError("VQA accuracy needs the answers of at least one person, got none")
    given = normalised(answer)
    people = [_without_punctuation(truth) for truth in truths] if len(set(truths)) > 1 else list(truths)
    agree = sum(truth == given for truth in people)
    left_out = [min(1.0, (agree - (truth == given)) / 3) for truth in people]
    return sum(left_out) / len(left_out)


def contains(answer: str, truths: Sequence[str]) -> bool:
    """Whether one of the truths is in the answer as whole words, both normalised: LVLM-eHub's rule."""
    given = f" {normalised(answer)} "
    return any(f" {truth} " in given for truth in map(normalised, truths) if truth)
