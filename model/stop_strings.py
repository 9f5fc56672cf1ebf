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
    begun = (n for stop in stops for n in range(1, len(stop)) if settled.endswith(stop[:n]))
    return len(settled) - max(begun, default=0)
