"""Reads the letter of an option out of a free answer, by the rules of MMBench's authors without their judge model."""

from __future__ import annotations

import re
from collections.abc import Mapping

_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}\"'`", " "))
_LETTER_A = re.compile(r"\bA\b(?!['\"(]*\s+['\"(]*\w)")  # not before another word


def read_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that the answer names, or None where no rule reads one.

    1. The answer is a letter and nothing else, in either case: "b", "(B)".
    2. Exactly one option's letter, as a capital, is among its words. In an answer of more than three words, an "A"
       before another word is taken for the article, and does not count.
    3. The answer is an option's text, or holds the text of exactly one option as whole words. Where one option's
       text is inside another's ("cat" and "cat and dog"), the longer one that is there hides the shorter one.

    Args:
        options: letter -> text of the options that the question has.
    """
    words = answer.translate(_PUNCTUATION).split()
    if len(words) == 1 and len(words[0]) == 1 and words[0].upper() in options:
        return words[0].upper()
    is_article = len(words) > 3 and _LETTER_A.search(answer) is None
    named = [letter for letter in options if letter in words and not (letter == "A" and is_article)]
    if named:
        return named[0] if len(named) == 1 else None
    return _by_text(_plain(answer), {letter: _plain(text) for letter, text in options.items()})


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .")


def _by_text(answer: str, options: Mapping[str, str]) -> str | None:
    exact = [letter for letter, text in options.items() if text and text == answer]
    if exact:
        return exact[0] if len(exact) == 1 else None
    spans: dict[str, list[tuple[int, int]]] = {}
    for letter, text in options.items():
        found = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(text)}(?!\w)", answer)] if text else []
        if found:
            spans[letter] = found
    inside = {
        letter
        for letter, own in spans.items()
        if all(
            any(a <= start and end <= b and (a, b) != (start, end) for a, b in other)
            for start, end in own
            for other in [[span for name, found in spans.items() if name != letter for span in found]]
        )
    }
    left = spans.keys() - inside
    return next(iter(left)) if len(left) == 1 else None
