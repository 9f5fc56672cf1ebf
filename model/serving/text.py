"""The text of one choice as its tokens come: what may be shown, and whether a stop string ended it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..stop_strings import cut, settled_length

_HALF = "\N{REPLACEMENT CHARACTER}"
_MOST_OPEN = 16  # tokens without a whole character at their end, before the first ones are settled
_LEFT_OPEN = 8  # tokens that then stay open
_MOST_BYTES = 4  # of a character


class AnswerText:
    """Decodes tokens one by one. After each of them its text is what `decode` makes of all tokens.

    A token is decoded behind the first tokens that have a text, not behind all of them, which would take a time that
    grows with the square of the answer's length. The first ones are there because a decoder may take the space off the
    beginning of a text. Tokens that end within a character are decoded again, together with those that follow.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]):
        self._decode, self._stops = decode, stops
        self._first: list[int] = []  # tokens with a text that ends with a whole character
        self._first_length = 0  # of that text
        self._tokens: list[int] = []  # the last ones, which the next token may change the text of
        self._open = ""  # their text
        self._text = ""  # of all tokens before them
        self._taken = 0  # characters that `take` has given
        self._searched = 0  # characters before which no stop string begins
        self.stopped = False

    def add(self, token: int) -> bool:
        """Takes in a token; True if the text holds a stop string now."""
        self._tokens.append(token)
        self._open = self._read(self._tokens)
        if not self._open.endswith(_HALF):
            self._settle(len(self._tokens), self._open, "")
        elif len(self._tokens) % _MOST_OPEN == 0:  # bytes that are no text
            self._settle_some()
        # half a character is not that one yet
        self._find_stop((self._text[self._searched :] + self._open).rstrip(_HALF))
        return self.stopped

    def take(self) -> str:
        """The text since the last call that nothing to come can change."""
        text = self._text + self._open
        end = len(text) if self.stopped else settled_length(text, self._stops)
        piece = text[self._taken : end]
        self._taken = max(self._taken, end)
        return piece

    def finish(self) -> str:
        """The text since the last call of `take`, when no token follows."""
        if not self.stopped:
            self._find_stop(self._text[self._searched :] + self._open)
        piece = (self._text + self._open)[self._taken :]
        self._taken += len(piece)
        return piece

    def _read(self, tokens: Sequence[int]) -> str:
        """The text of some tokens of the answer."""
        return self._decode([*self._first, *tokens])[self._first_length :]

    def _settle(self, count: int, text: str, rest: str) -> None:
        """The first `count` of the last tokens have this text, and the others `rest`, whatever follows."""
        if text and not self._first and not rest:
            self._first, self._first_length = self._tokens[:count], len(text)
        if text or self._first:  # tokens before any text may lose a space of what follows
            self._text, self._open, self._tokens = self._text + text, rest, self._tokens[count:]

    def _settle_some(self) -> None:
        """Settles some of many tokens that end within a character, if they divide where no character does."""
        for count in range(len(self._tokens) - _LEFT_OPEN, 0, -1):
            text, rest = self._read(self._tokens[:count]), self._read(self._tokens[count:])
            if len(rest) >= _MOST_BYTES and text + rest == self._open:
                self._settle(count, text, rest)
                return

    def _find_stop(self, tail: str) -> None:
        """Looks for a stop string in the text from `_searched` on."""
        if any(stop in tail for stop in self._stops):
            self._text, self._open = self._text[: self._searched] + cut(tail, self._stops), ""
            self.stopped = True
        else:
            longest = max(map(len, self._stops), default=1)
            self._searched = max(len(self._text.rstrip(_HALF)) - longest + 1, 0)
