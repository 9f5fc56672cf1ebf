"""Where an answer ends at one of some texts, and what of it may be shown before that is decided."""

from __future__ import annotations

from collections.abc import Sequence


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def settled_length(text: str, stops: Sequence[str]) -> int:
    """The characters of an unfinished text that the next tokens cannot change.

    At its end, half a character and the beginning of a stop string wait for what decides them.
    """
    settled = text.rstrip("\N{REPLACEMENT CHARACTER}")
    return len(settled) - max((_begun(settled, stop) for stop in stops), default=0)


def _begun(text: str, stop: str) -> int:
    """How many characters of a stop string the text ends with; less than all of it."""
    start = max(len(text) - len(stop) + 1, 0)
    while (start := text.find(stop[:1], start)) >= 0:  # the longest first
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
