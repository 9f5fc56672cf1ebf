"""The text of one choice as its tokens come: what may be shown, and whether a stop string ended it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..stop_strings import cut, settled_length


class AnswerText:
    """Decodes tokens one by one. All pieces together are what `decode` makes of all tokens, cut at a stop string.

    Each token is decoded with a few before it, not with all of them, which would take a time that grows with the
    square of the answer's length. These few begin where the text ended with a whole character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]):
        self._decode, self._stops = decode, stops
        self._tokens: list[int] = []  # from the beginning of the window on
        self._read = 0  # of these, those whose text is in `_text`
        self._text = ""
        self._taken = 0  # characters that `take` has given
        self._searched = 0  # characters before which no stop string begins
        self.stopped = False

    def add(self, token: int) -> bool:
        """Takes in a token; True if the text holds a stop string now."""
        self._tokens.append(token)
        known = self._decode(self._tokens[: self._read])
        window = self._decode(self._tokens)
        if not window.endswith("\N{REPLACEMENT CHARACTER}"):
            self._settle(window[len(known) :])
            self._tokens = self._tokens[self._read :]
            self._read = len(self._tokens)
        elif self._stops:  # what stands before the half character may end the answer, which itself may not
            self._find_stop(self._text + window[len(known) :].rstrip("\N{REPLACEMENT CHARACTER}"))
        return self.stopped

    def take(self) -> str:
        """The text since the last call that nothing to come can change."""
        end = len(self._text) if self.stopped else settled_length(self._text, self._stops)
        piece = self._text[self._taken : end]
        self._taken = max(self._taken, end)
        return piece

    def finish(self) -> str:
        """The text since the last call of `take`, when no token follows."""
        if not self.stopped:
            known = self._decode(self._tokens[: self._read])
            self._settle(self._decode(self._tokens)[len(known) :])
        piece = self._text[self._taken :]
        self._taken = len(self._text)
        return piece

    def _settle(self, piece: str) -> None:
        self._text += piece
        self._find_stop(self._text)

    def _find_stop(self, text: str) -> None:
        tail = text[self._searched :]
        if any(stop in tail for stop in self._stops):
            self._text, self.stopped = text[: self._searched] + cut(tail, self._stops), True
        else:
            longest = max(map(len, self._stops), default=1)
            self._searched = max(len(self._text) - longest + 1, 0)
