"""Between the protocol and the engine: which adapter, which tokens, and the pieces of the answers as they come."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from zinit_kernels.console import shown

from ..chat import encode_chat
from ..errors import UserError
from ..llama import Adapter
from ..sampling import NUM_SEEDS
from ..tokenizer import Tokenizer
from ..vision.adapter import VisualAdapter
from .engine import Engine
from .errors import ApiError
from .images import Pictures
from .metrics import Metrics
from .protocol import Asked
from .request import Event, NewToken, QueueFull, Request, Sampling, UnknownAdapter
from .responses import Answer, Piece
from .text import AnswerText

_log = logging.getLogger(__name__)
_BUSY_SECONDS = 5  # that a client is asked to wait unless more is known


@dataclass(eq=False)
class Running:
    """A request of the protocol that is being answered: one or several of the engine's."""

    service: Service
    answers: list[Answer]
    prompt_tokens: int
    requests: list[Request] = field(default_factory=list)
    events: asyncio.Queue[Piece | tuple[int, str, Exception | None]] = field(default_factory=asyncio.Queue)

    async def pieces(self) -> AsyncIterator[Piece | int]:
        """The pieces as they come, and of each answer that has ended its index. Raises ApiError if one fails."""
        for _ in self.answers:
            ended = False
            while not ended:
                event = await self.events.get()
                if isinstance(event, Piece):
                    self.answers[event.index].add(event)
                    yield event
                    continue
                index, reason, error = event
                if error is not None or reason == "cancelled":
                    raise self.service.failure(error)
                self.answers[index].finish_reason = reason
                yield index
                ended = True

    def cancel(self) -> None:
        """Ends what is not finished. The engine takes the pages back before its next step."""
        for request in self.requests:
            request.cancel()


class Service:
    """Serves one base and its adapters. base_name: the model name of the base alone."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, base_name: str):
        self.engine, self.tokenizer, self.base_name = engine, tokenizer, base_name
        self.created = int(time.time())
        self.metrics = Metrics(engine)
        self.draining = False
        self.running: set[Running] = set()
        self._starting = 0  # requests whose prompts are being made
        self._adapters: dict[str, Adapter] = {}  # as they were given; those with a visual part take images
        self._pictures = Pictures()
        self._seeing = ThreadPoolExecutor(
            1, "images"
        )  # they wait for one another, and no text waits for them
        self._lock = threading.Lock()

    @property
    def models(self) -> list[str]:
        """The names that a request may give: the base's, and the adapters'."""
        return [self.base_name, *self.engine.adapters]

    @property
    def is_busy(self) -> bool:
        """Whether some request is not answered yet."""
        return bool(self.running or self._starting)

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Serves an adapter. Raises UserError if the name is taken, or it cannot be served."""
        if name == self.base_name:
            raise UserError(f"{name!r} is the name of the base: take another one.")
        placed = adapter
        if isinstance(adapter, VisualAdapter):  # its prompts without an image
            placed = adapter.about([()])
        with self._lock:
            self.engine.add_adapter(name, placed)
            self._adapters[name] = adapter

    def drop_adapter(self, name: str) -> None:
        """Serves it no more, once the requests that use it are answered. Raises UnknownAdapter."""
        with self._lock:
            self.engine.drop_adapter(name)
            self._adapters.pop(name, None)

    async def start(self, asked: Asked, client: str | None = None) -> Running:
        """Puts a request into the engine's queue. client: requests of different ones take turns.

        Raises ApiError: no such model, beyond the context, a full queue, draining. UserError: what cannot be answered.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down: ask another one.", retry_after=_BUSY_SECONDS)
        name = None if asked.model == self.base_name else asked.model
        if name is not None and name not in self.engine.adapters:
            raise _unknown_model(asked.model)
        wanted = max(len(asked.prompts), 1) * asked.n
        if wanted > self.engine.max_waiting:  # to come again would not help
            raise ApiError(
                400,
                f"the request asks for {wanted} answers, and {self.engine.max_waiting} may wait: ask for fewer.",
                param="n",
            )
        self._starting += 1
        try:
            loop, pool = asyncio.get_running_loop(), self._seeing if asked.images else None
            prompts, about = await loop.run_in_executor(pool, self._prepare, asked, name)
            return self._submit(asked, name, prompts, about, client)
        finally:
            self._starting -= 1

    def done(self, running: Running) -> None:
        """Nobody waits for it any more, whether it is finished or not."""
        running.cancel()
        self.running.discard(running)

    def failure(self, error: Exception | None) -> ApiError:
        """What a client is told of an answer that failed. A cause that is the server's is logged with a number."""
        if error is None:
            return ApiError(503, "the request was ended by the server.", retry_after=_BUSY_SECONDS)
        if isinstance(error, UserError):
            _log.error("a request failed: %s", error)
            return ApiError(500, str(error))
        number = secrets.token_hex(4)
        _log.error("error %s: a request failed", number, exc_info=error)
        return ApiError(500, f"the request failed; the server's log has the cause as error {number}.")

    def _prepare(self, asked: Asked, name: str | None) -> tuple[list[list[int]], Any]:
        """The prompts in tokens, and what they are about. Slow for long texts and for images."""
        context = self.engine.model.config.max_seq_len
        if asked.messages is not None:
            if self.tokenizer.chat_template is None:
                raise ApiError(400, "the base's tokenizer has no chat template: use /v1/completions.")
            prompts = [encode_chat(self.tokenizer, asked.messages, context + 1)]
        else:
            prompts = [
                self.tokenizer.encode(prompt, eos=False, limit=context + 1)
                if isinstance(prompt, str)
                else prompt
                for prompt in asked.prompts
            ]
        for prompt in prompts:
            if len(prompt) > context:
                raise _beyond(f"the prompt is longer than the model's context of {context} tokens.")
        about = None
        if asked.images:
            adapter = self._adapters.get(name or "")
            about = self._pictures.see(asked.model, adapter, asked.images)
        return prompts, about

    def _submit(
        self, asked: Asked, name: str | None, prompts: list[list[int]], about: Any, client: str | None
    ) -> Running:
        running = Running(self, [Answer() for _ in range(len(prompts) * asked.n)], sum(map(len, prompts)))
        seed = secrets.randbelow(NUM_SEEDS) if asked.seed is None else asked.seed
        queue = None if client is None else f"{client} {name or ''}"
        try:
            for place, prompt in enumerate(prompts):
                sampling = self._sampling(asked, prompt, seed)
                listener = _Listener(self, asked, running, place * asked.n, asyncio.get_running_loop())
                running.requests.append(
                    self.engine.submit(
                        prompt,
                        name,
                        sampling,
                        tell=listener.tell,
                        stops=listener.stops,
                        queue=queue,
                        about=about,
                    )
                )
        except QueueFull as error:
            running.cancel()
            raise ApiError(429, str(error), retry_after=self._seconds_until_room()) from None
        except UnknownAdapter:  # dropped a moment ago
            running.cancel()
            raise _unknown_model(asked.model) from None
        except (UserError, ApiError):
            running.cancel()
            raise
        self.running.add(running)
        return running

    def _sampling(self, asked: Asked, prompt: Sequence[int], seed: int) -> Sampling:
        room = self.engine.room - len(prompt)
        most = asked.max_tokens
        if most is None:
            most = max(room, 1)
        if most > room:
            raise _beyond(
                f"the prompt has {len(prompt)} tokens, and with {most} new ones it exceeds the {self.engine.room} "
                f"tokens that there is room for: ask for at most {max(room, 0)} new tokens."
            )
        eos_ids = () if asked.ignore_eos else None
        return Sampling(most, asked.temperature, asked.top_p, seed, asked.n, eos_ids, asked.logprobs)

    def _seconds_until_room(self) -> int:
        """About how long the engine takes for a tenth of what waits, by the answers of the last seconds."""
        rate = self.metrics.answers_per_second
        wait = self.engine.waiting / 10 / rate if rate else _BUSY_SECONDS
        return int(min(max(wait, 1), 60))


class _Listener:
    """Makes pieces of one request's tokens, in the engine's thread, and hands them to the event loop."""

    def __init__(
        self, service: Service, asked: Asked, running: Running, first: int, loop: asyncio.AbstractEventLoop
    ):
        self._metrics, self._first, self._logprobs = service.metrics, first, asked.logprobs is not None
        decode = service.tokenizer.decode
        self._texts = [AnswerText(decode, asked.stop) for _ in range(asked.n)]
        self._last = [0.0] * asked.n  # when each choice had its last token
        self._began = time.monotonic()
        self._put: Callable[[Any], None] = lambda event: loop.call_soon_threadsafe(
            running.events.put_nowait, event
        )

    def tell(self, event: Event) -> None:
        text = self._texts[event.choice]
        if isinstance(event, NewToken):
            self._time(event.choice)
            text.add(event.token)
            self._put(Piece(self._first + event.choice, text.take(), event.token, event.logprobs))
            return
        rest = text.finish()
        if rest:
            self._put(Piece(self._first + event.choice, rest))
        self._put((self._first + event.choice, event.reason, event.error))

    def stops(self, choice: int, tokens: Sequence[int]) -> bool:
        return self._texts[choice].stopped

    def _time(self, choice: int) -> None:
        now = time.monotonic()
        if self._last[choice]:
            self._metrics.between_tokens.add(now - self._last[choice])
        else:
            self._metrics.first_token.add(now - self._began)
        self._last[choice] = now


def _unknown_model(name: str) -> ApiError:
    return ApiError(
        404,
        f"there is no model {shown(name)}: GET /v1/models lists them.",
        code="model_not_found",
        param="model",
    )


def _beyond(sentence: str) -> ApiError:
    return ApiError(400, sentence, code="context_length_exceeded", param="max_tokens")
