"""A model behind an OpenAI-compatible server, as an answerer: OpenAI's own, vLLM, llama.cpp, Ollama and others."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast
from urllib.parse import urlsplit

from .question import Item, PartlyAnswered
from .shared import UserError

_AGAIN = {408, 409, 429, 500, 502, 503, 504}  # what a server says that is busy
_TRIES = 5
_LONGEST = 1 << 24  # bytes of an answer


def _is_address(text: str) -> bool:
    """Whether it is an address of the web that a request can be sent to."""
    try:
        parts = urlsplit(text)
        has_port = (
            parts.port is None or parts.port > 0
        )  # reading it raises ValueError for one that is no number
    except ValueError:
        return False
    is_plain = text.isprintable() and " " not in text
    return is_plain and has_port and parts.scheme in ("http", "https") and bool(parts.hostname)


class ChatServer:
    """Sends each question as one message, at temperature 0; a batch's questions are sent at once.

    Args:
        endpoint: up to and with /v1. model: its name there. key: sent as a bearer token where there is one.
        wait: seconds before a busy server is asked again, doubled each time.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        key: str,
        system: str,
        max_tokens: int,
        timeout: float = 300.0,
        wait: float = 2.0,
    ):
        if not _is_address(endpoint):
            raise UserError(
                f"--endpoint must be an address such as http://localhost:8000/v1, got {endpoint!r}."
            )
        if not (key.isascii() and key.isprintable()):
            raise UserError(
                "the key must be printable ASCII: it holds a line end or another character that is not."
            )
        self.address = f"{endpoint.rstrip('/')}/chat/completions"
        self.model, self.system, self.max_tokens = model, system, max_tokens
        self.timeout, self.wait = timeout, wait
        self._headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {key}"} if key else {}),
        }
        self.identity: Mapping[str, Any] = {"endpoint": endpoint, "model": model}

    def check(self, items: Sequence[Item]) -> None:
        """The server says itself what it cannot answer."""

    def answer(self, items: Sequence[Item]) -> list[str]:
        """Raises PartlyAnswered where the server cannot be reached, refuses, or answers in another form."""
        with ThreadPoolExecutor(max(1, len(items))) as pool:
            running = {item.id: pool.submit(self._ask, item.question) for item in items}
        failed = [task.exception() for task in running.values() if task.exception() is not None]
        if failed:
            if not isinstance(failed[0], UserError):
                raise cast(BaseException, failed[0])
            done = {key: task.result() for key, task in running.items() if task.exception() is None}
            raise PartlyAnswered(str(failed[0]), done) from failed[0]
        return [task.result() for task in running.values()]

    def _ask(self, text: str) -> str:
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        request = urllib.request.Request(self.address, json.dumps(body).encode(), self._headers)
        for attempt in range(_TRIES):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return self._content(response.read(_LONGEST))
            except urllib.error.HTTPError as error:
                said = error.read(300).decode(errors="replace").strip()
                if error.code not in _AGAIN or attempt == _TRIES - 1:
                    raise UserError(
                        f"{self.address} answered {error.code} {error.reason}: {said or 'nothing'}."
                    ) from error
            except OSError as error:  # no connection, no answer in time
                if attempt == _TRIES - 1:
                    reason = getattr(error, "reason", None) or error
                    raise UserError(f"{self.address} cannot be reached: {reason}.") from error
            time.sleep(self.wait * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _content(self, answer: bytes) -> str:
        try:
            content = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise UserError(
                f"{self.address} is no OpenAI-compatible server: it answered {answer[:80]!r}."
            ) from error
        return content if isinstance(content, str) else ""
