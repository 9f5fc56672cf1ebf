"""The answers as OpenAI's JSON: whole ones, and the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .request import TokenLogprobs


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


class Responses:
    """The JSON of one request's answers. decode: the text of token ids."""

    def __init__(self, model: str, is_chat: bool, decode: Callable[[Sequence[int]], str]):
        self.model, self.is_chat, self._decode = model, is_chat, decode
        self._id = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._offsets: dict[
            int, int
        ] = {}  # characters of each answer so far, for completions' log-probabilities

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
        if self.is_chat:
            return {"content": [self._of_chat(piece) for piece in pieces], "refusal": None}
        tokens, chosen, likeliest, offsets = [], [], [], []
        for piece in pieces:
            assert piece.token is not None and piece.logprobs is not None
            token = self._decode([piece.token])
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(token)
            tokens.append(token)
            chosen.append(piece.logprobs.chosen)
            likeliest.append({self._decode([other]): value for other, value in piece.logprobs.likeliest})
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": likeliest, "text_offset": offsets}

    def _of_chat(self, piece: Piece) -> dict[str, Any]:
        assert piece.token is not None and piece.logprobs is not None

        def entry(token: int, value: float) -> dict[str, Any]:
            text = self._decode([token])
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        likeliest = [entry(token, value) for token, value in piece.logprobs.likeliest]
        return entry(piece.token, piece.logprobs.chosen) | {"top_logprobs": likeliest}


def usage(prompt_tokens: int, answers: Sequence[Answer]) -> dict[str, int]:
    """How many tokens were read and written. An answer's end-of-sequence token is not counted."""
    written = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
    }
