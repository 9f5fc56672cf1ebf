"""The answers as OpenAI's JSON: whole ones, and the chunks of a stream."""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import starmap
from typing import Any

from ..tokenizer import Tokenizer
from .request import TokenLogprobs

_BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Piece:
    """What one token added to an answer. Its text may be empty, while it waits for what decides it."""

    index: int  # of the answer
    text: str
    token: int | None = None  # None: the rest of the text, at the end
    logprobs: TokenLogprobs | None = None


@dataclass
class Answer:
    """One answer, as its pieces come."""

    text: str = ""
    tokens: int = 0
    told: list[Piece] = field(default_factory=list)  # of tokens with log-probabilities
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.token is not None
        if piece.logprobs is not None:
            self.told.append(piece)


@dataclass(frozen=True)
class _Told:
    """A token with its log-probability."""

    text: str
    logprob: float
    content: bytes | None  # None: a part of a character whose bytes the tokenizer does not tell

    @property
    def name(self) -> str:
        """The text; for a part of a character its bytes in OpenAI's form, since all parts have the same text."""
        if self.content is None or self.content == self.text.encode():
            return self.text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.content)

    def entry(self) -> dict[str, Any]:
        content = None if self.content is None else list(self.content)
        return {"token": self.name, "logprob": self.logprob, "bytes": content}


class _Position:
    """Where the next token of an answer begins, in characters of its text.

    A part of a character counts with the character's last byte. Broken bytes are a U+FFFD each, as in the text.
    """

    def __init__(self) -> None:
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def pass_by(self, token: _Told) -> int:
        """Where this token begins; the next one begins behind it."""
        content = token.content
        if content and content[0] & 0xC0 != 0x80:  # it does not go on with what was begun
            self._offset += len(self._decoder.decode(b"", final=True))
        begins = self._offset
        self._offset += len(token.text if content is None else self._decoder.decode(content))
        return begins


class Responses:
    """The JSON of one request's answers."""

    def __init__(self, model: str, is_chat: bool, tokenizer: Tokenizer):
        self.model, self.is_chat, self._tokenizer = model, is_chat, tokenizer
        self._id = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._positions: dict[int, _Position] = {}  # of each answer whose first token has come

    def whole(self, answers: Sequence[Answer], prompt_tokens: int) -> dict[str, Any]:
        """The answers together."""
        choices = []
        for index, answer in enumerate(answers):
            choice: dict[str, Any] = {"index": index, "logprobs": self._logprobs(answer.told, index)}
            if self.is_chat:
                choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
            else:
                choice["text"] = answer.text
            choices.append(choice | {"finish_reason": answer.finish_reason})
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._body(kind, choices) | {"usage": usage(prompt_tokens, answers)}

    def first(self, index: int) -> dict[str, Any] | None:
        """The chunk before an answer's text: chat says whose it is."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None) if self.is_chat else None

    def piece(self, piece: Piece) -> dict[str, Any]:
        logprobs = None if piece.logprobs is None else self._logprobs([piece], piece.index)
        return self._chunk(piece.index, {"content": piece.text} if piece.text else {}, logprobs, None)

    def last(self, index: int, reason: str) -> dict[str, Any]:
        return self._chunk(index, {}, None, reason)

    def usage(self, answers: Sequence[Answer], prompt_tokens: int) -> dict[str, Any]:
        """The chunk after all, where it was asked for."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return self._body(kind, []) | {"usage": usage(prompt_tokens, answers)}

    def _chunk(
        self, index: int, delta: dict[str, str], logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        said = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}
        return self._body("chat.completion.chunk" if self.is_chat else "text_completion", [choice])

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.model,
            "choices": choices,
        }

    def _logprobs(self, pieces: Sequence[Piece], index: int) -> dict[str, Any] | None:
        if not pieces:
            return None
        told = [self._told(piece, index) for piece in pieces]
        if self.is_chat:
            content = [
                chosen.entry() | {"top_logprobs": [other.entry() for other in others]}
                for chosen, others, _ in told
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [chosen.name for chosen, _, _ in told],
            "token_logprobs": [chosen.logprob for chosen, _, _ in told],
            # of tokens with the same text, the likeliest: it is the first one
            "top_logprobs": [
                {other.name: other.logprob for other in reversed(others)} for _, others, _ in told
            ],
            "text_offset": [offset for _, _, offset in told],
        }

    def _told(self, piece: Piece, index: int) -> tuple[_Told, list[_Told], int]:
        """A token, the likeliest ones in its place, and where its text begins."""
        assert piece.token is not None and piece.logprobs is not None
        before, skipped = self._before if index in self._positions else ([], 0)

        def told(token: int, value: float) -> _Told:
            text = self._text(token, before, skipped)
            content = self._tokenizer.token_bytes(token) if _BROKEN in text else text.encode()
            return _Told(text, value, content)

        chosen = told(piece.token, piece.logprobs.chosen)
        offset = self._positions.setdefault(index, _Position()).pass_by(chosen)
        return chosen, list(starmap(told, piece.logprobs.likeliest)), offset

    @cached_property
    def _before(self) -> tuple[list[int], int]:
        """A token that may stand before any other, and the characters of its text."""
        tokens = self._tokenizer.encode(".", bos=False, eos=False)
        return tokens, len(self._tokenizer.decode(tokens))

    def _text(self, token: int, before: Sequence[int], skipped: int) -> str:
        """What a token adds to the text before it: alone, many tokenizers' words lose their space."""
        return self._tokenizer.decode([*before, token])[skipped:]


def usage(prompt_tokens: int, answers: Sequence[Answer]) -> dict[str, int]:
    """How many tokens were read and written. An answer's end-of-sequence token is not counted."""
    written = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
    }
