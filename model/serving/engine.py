"""The engine: one base, many adapters, many requests at once.

    engine = Engine(base)
    engine.add_adapter("colours", adapter)
    request = engine.submit(prompt, "colours", Sampling(max_new_tokens=20), tell=print)
    while engine.step():
        pass

A step computes the next tokens of all running sequences in one pass of the base, with one attention call a layer
whatever the mix of adapters, prompts and lengths (`scheduler` says which tokens). `worker.EngineThread` makes the steps
in a thread of its own; `submit`, `cancel`, `add_adapter` and `drop_adapter` may then be called from any other.

A sequence's tokens are those that `model.sampling.generate` gives the same prompt alone, with the same seed. The random
numbers are exactly the same. The logits are equal up to rounding, because a matrix product of more rows adds up in
another order: where two tokens are as good as equal, the choice may differ. `docs/serve.md` has the figures.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from zinit_kernels.console import shown

from ..errors import UserError
from ..llama import Adapter, Llama, PagedCache
from ..sampling import NUM_SEEDS
from .batch import Batch
from .pages import PAGE_SIZE, PagePool
from .passes import Passes
from .prompt_table import PromptTable
from .request import (
    Event,
    Finished,
    NewToken,
    PromptRow,
    QueueFull,
    Request,
    Sampling,
    SequenceState,
    Stops,
    UnknownAdapter,
)
from .sampler import Chosen, choose_tokens
from .scheduler import Scheduler

DEFAULT_CACHE_BYTES = 2 << 30
_log = logging.getLogger(__name__)


def bytes_a_token(model: Llama) -> int:
    """What the keys and values of one token take in the cache."""
    config = model.config
    return 2 * config.num_layers * config.num_heads_kv * config.head_dim * model.dtype.itemsize


class Engine:
    """Answers requests for a base and its adapters.

    cache_tokens: how many tokens the pages hold, of all sequences together; None = as many as 2 GiB hold, and at least
    one whole context. max_running: sequences that are computed at once. chunk: tokens of prompts in one step.
    max_waiting: choices that may wait; `submit` raises QueueFull beyond. eos_ids: None = the model's.
    """

    def __init__(
        self,
        model: Llama,
        *,
        cache_tokens: int | None = None,
        max_running: int = 64,
        chunk: int = 256,
        max_waiting: int = 1024,
        eos_ids: Iterable[int] | None = None,
    ):
        for name, value in (("max_running", max_running), ("chunk", chunk), ("max_waiting", max_waiting)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}.")
        config = model.config
        if cache_tokens is None:
            cache_tokens = max(DEFAULT_CACHE_BYTES // bytes_a_token(model), config.max_seq_len)
        if cache_tokens < PAGE_SIZE:
            raise UserError(f"the cache must hold at least {PAGE_SIZE} tokens, got {cache_tokens}.")
        self.model, self.max_waiting = model, max_waiting
        self.eos_ids = frozenset(config.eos_ids if eos_ids is None else eos_ids)
        num_pages = cache_tokens // PAGE_SIZE
        # of no more positions than a sequence can have: contexts of 10**7 tokens would be 5 GB
        positions = min(config.max_seq_len, num_pages * PAGE_SIZE)
        try:
            cache = PagedCache(config, num_pages, PAGE_SIZE, positions, model.dtype, model.device)
        except RuntimeError as error:
            raise UserError(
                f"there is no memory for a cache of {cache_tokens} tokens: ask for a smaller one (--cache-tokens)."
            ) from error
        # what grows with the cache is made once there is memory for it: 10**12 tokens would be 500 GB of lists alone
        self.pool = PagePool(num_pages)
        self.table = PromptTable(model)
        self.scheduler = Scheduler(self.pool, max_running, chunk)
        self._passes = Passes(model, self.table, cache)

        self.counts: Counter[str] = Counter()  # steps, tokens and ends, since the start
        self.tokens_of: Counter[str | None] = Counter()  # new tokens by the adapter's name
        self._base = PromptRow(None, -1, pinned=True)
        self._roots = 1  # that were given away
        self._adapters: dict[str, PromptRow] = {}
        self._seen: dict[tuple[int, Any], PromptRow] = {}  # of images, while requests use them
        self._arriving = self._entered = 0  # choices that wait: in the inbox, and beyond it
        self._held: dict[
            Request, list[SequenceState]
        ] = {}  # choices that wait for the pages of their first one
        self._inbox: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()  # of all above that other threads reach
        self._wake = threading.Condition(self._lock)
        self.thread: threading.Thread | None = None  # that makes the steps; None: whoever calls

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters, in the order in which they were added."""
        with self._lock:
            return list(self._adapters)

    @property
    def waiting(self) -> int:
        """Choices that wait to be computed."""
        return self._arriving + self._entered

    @property
    def room(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        return min(self.model.config.max_seq_len, self.pool.num_pages * PAGE_SIZE)

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Serves an adapter under a name. Raises UserError if the name is taken, or the adapter cannot be served."""
        with self._lock:
            if name in self._adapters:
                raise UserError(
                    f"there is an adapter {shown(name)} already: drop it first, or take another name."
                )
            row = self._new_row(adapter, pinned=True)
        row.index = self._in_thread(lambda: self.table.add(adapter))
        with self._lock:
            taken = name in self._adapters  # by another thread meanwhile
            if not taken:
                self._adapters[name] = row
        if taken:
            self._in_thread(lambda: self.table.remove(row.index))
            raise UserError(
                f"there is an adapter {shown(name)} already: drop it first, or take another name."
            )

    def drop_adapter(self, name: str) -> None:
        """Forgets an adapter. Requests that use it are answered first; new ones are refused.

        Raises UnknownAdapter if there is none of this name.
        """
        with self._lock:
            row = self._adapters.pop(name, None)
            if row is None:
                raise UnknownAdapter(f"there is no adapter {shown(name)}.")
            row.pinned = False
        self._in_thread(lambda: self._free_row(row))

    def submit(
        self,
        prompt: Sequence[int],
        adapter: str | None = None,
        sampling: Sampling | None = None,
        *,
        tell: Callable[[Event], None],
        stops: Stops | None = None,
        queue: str | None = None,
        about: tuple[Any, Adapter] | None = None,
    ) -> Request:
        """Puts a request into its queue; `tell` is called with every token and with the end of every choice.

        adapter: a name; None = the base alone. queue: requests of different queues take turns; None = the adapter's.
        about: what the request is about beside its tokens, as a key and the adapter whose prompts say it, such as a
        `VisualAdapter` with images. Requests with equal keys share prompts and pages.
        Raises UserError for a request that cannot be answered, UnknownAdapter and QueueFull among them.
        """
        sampling = sampling or Sampling()
        sampling.check()
        self.check_prompt(prompt, sampling.max_new_tokens)
        with self._lock:
            if adapter is not None and adapter not in self._adapters:
                raise UnknownAdapter(f"there is no adapter {shown(adapter)}.")
            if self.waiting + sampling.choices > self.max_waiting:
                raise QueueFull(f"{self.waiting} requests wait already: try again later.")
            row = self._base if adapter is None else self._adapters[adapter]
            if about is not None:
                key = (row.root, about[0])
                row = self._seen.get(key) or self._new_row(about[1], pinned=False)
                self._seen[key] = row
            row.users += 1
            self._arriving += sampling.choices
            name = adapter or ""
            request = Request(
                list(prompt),
                sampling,
                row,
                name if queue is None else queue,
                adapter,
                tell,
                stops,
                time.monotonic(),
            )
            self._inbox.append(lambda: self._enter(request))
            self._wake.notify()
        return request

    def check_prompt(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Raises UserError if the prompt is empty, holds what is no token, or does not fit with its answer."""
        vocab_size, room = self.model.config.vocab_size, self.room
        if not prompt:
            raise UserError("the prompt has no tokens.")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(f"the prompt holds token ids outside the model's vocabulary of {vocab_size}.")
        if len(prompt) + max_new_tokens > room:
            what = "the cache" if room < self.model.config.max_seq_len else "the model's context"
            what += f" of {room}"
            raise UserError(
                f"the prompt has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds {what} tokens: ask "
                f"for at most {max(room - len(prompt), 0)} new tokens."
            )

    def generate(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None], sampling: Sampling
    ) -> list[list[list[int]]]:
        """The new tokens of each prompt's choices, in order. Raises what ended one of them with an error.

        It makes the steps itself: for an engine without a thread.
        """
        found: list[list[list[int]]] = [[[] for _ in range(sampling.choices)] for _ in prompts]
        errors: list[Exception] = []

        def listener(place: int) -> Callable[[Event], None]:
            def tell(event: Event) -> None:
                if isinstance(event, NewToken):
                    found[place][event.choice].append(event.token)
                elif event.error is not None:
                    errors.append(event.error)

            return tell

        for place, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
            self.submit(prompt, adapter, sampling, tell=listener(place))
        while self.step():
            pass
        if errors:
            raise errors[0]
        return found

    def step(self) -> bool:
        """Computes the next tokens. False if there was nothing to compute."""
        self._receive()
        planned = self.scheduler.plan()
        if planned:
            self.counts["steps"] += 1
            self._compute(list(planned.items()))
        self._count_waiting()
        return bool(planned)

    def wait(self, seconds: float) -> None:
        """Waits until another thread wants something, or for so long."""
        with self._wake:
            if not self._inbox:
                self._wake.wait(seconds)

    def fail_all(self, error: Exception) -> None:
        """Ends every request with an error: for a fault of the engine itself."""
        self._receive()
        for sequence in (*self.scheduler.running, *self.scheduler.waiting, *sum(self._held.values(), [])):
            self._end(sequence, "error", error)
        self._count_waiting()

    def _receive(self) -> None:
        """Does what other threads asked for since the last step."""
        with self._lock:
            todo = list(self._inbox)
            self._inbox.clear()
        for do in todo:
            do()
        held = sum(self._held.values(), [])
        for sequence in [*self.scheduler.running, *self.scheduler.waiting, *held]:
            if sequence.request.cancelled:
                self._end(sequence, "cancelled")

    def _in_thread(self, do: Callable[[], Any]) -> Any:
        """What a function returns in the thread that makes the steps."""
        if self.thread is None or self.thread is threading.current_thread():
            return do()
        answer: Future[Any] = Future()

        def run() -> None:
            try:
                answer.set_result(do())
            except BaseException as error:
                answer.set_exception(error)

        with self._lock:
            self._inbox.append(run)
            self._wake.notify()
        return answer.result()

    def _new_row(self, adapter: Adapter, pinned: bool) -> PromptRow:
        self._roots += 1
        return PromptRow(adapter, -self._roots, pinned)

    def _free_row(self, row: PromptRow) -> None:
        """Takes a row out of the table if no request needs it any more."""
        with self._lock:
            if row.users or row.pinned:
                return
            self._seen = {key: other for key, other in self._seen.items() if other is not row}
            index, row.index = row.index, -1
        if index >= 0:
            self.table.remove(index)

    def _enter(self, request: Request) -> None:
        """Makes the request's choices. All but the first wait until that one has computed the prompt for them."""
        sampling = request.sampling
        sequences = [
            SequenceState(
                request,
                choice,
                list(request.prompt),
                torch.Generator().manual_seed((sampling.seed + choice) % NUM_SEEDS),
            )
            for choice in range(sampling.choices)
        ]
        request.unfinished = len(sequences)
        with self._lock:
            self._arriving -= len(sequences)
        if sampling.max_new_tokens == 0:
            for sequence in sequences:
                self._end(sequence, "length")
            return
        self.scheduler.add(sequences[0])
        self._held[request] = sequences[1:]

    def _compute(self, work: list[tuple[SequenceState, int]]) -> None:
        """One pass. If it raises, each half alone, so that what one request causes ends that request alone."""
        try:
            logits, likeliest, wanted = self._logits(work)
        except Exception as error:
            if len(work) == 1:
                _log.exception("a request failed in a step of the engine")
                self._end(work[0][0], "error", error)
                return
            half = len(work) // 2
            self._compute(work[:half])
            self._compute(work[half:])
            return
        for sequence, count in work:
            self.scheduler.advance(sequence, count)
        self.counts["computed_tokens"] += sum(count for _, count in work)
        for sequence, chosen in zip(
            wanted, choose_tokens(logits, wanted, likeliest) if wanted else [], strict=True
        ):
            self._go_on(sequence, chosen)

    @torch.no_grad()
    def _logits(
        self, work: list[tuple[SequenceState, int]]
    ) -> tuple[Tensor, Tensor | None, list[SequenceState]]:
        """What `Passes.logits` returns of the sequences whose last token is computed, and these."""
        batch = Batch(work, self.model.device)
        for sequence, _ in work:
            row = sequence.request.row
            if row.index < 0 and row.adapter is not None:
                row.index = self.table.add(row.adapter)
        return *self._passes.logits(batch), batch.wanted

    def _go_on(self, sequence: SequenceState, chosen: Chosen | Exception) -> None:
        """A sequence has its next token, or none."""
        if isinstance(chosen, Exception):
            self._end(sequence, "error", chosen)
            return
        token, logprobs = chosen
        request, sampling = sequence.request, sequence.request.sampling
        if request.first_token_at is None:
            request.first_token_at = time.monotonic()
        self._release_held(request)
        if token in (self.eos_ids if sampling.eos_ids is None else sampling.eos_ids):
            self._end(sequence, "stop")
            return
        sequence.tokens.append(token)
        self.counts["new_tokens"] += 1
        self.tokens_of[request.adapter_name] += 1
        try:
            request.tell(NewToken(sequence.choice, token, logprobs))
            stopped = request.stops is not None and request.stops(sequence.choice, sequence.new_tokens)
        except Exception as error:  # of the request's own functions: the others go on
            _log.exception("a request's listener failed")
            self._end(sequence, "error", error)
            return
        if stopped:
            self._end(sequence, "stop")
        elif len(sequence.tokens) == len(request.prompt) + sampling.max_new_tokens:
            self._end(sequence, "length")

    def _release_held(self, request: Request) -> None:
        for sequence in reversed(self._held.pop(request, [])):
            self.scheduler.add(sequence, first=True)

    def _end(self, sequence: SequenceState, reason: str, error: Exception | None = None) -> None:
        """Takes everything back from a sequence, and tells its asker."""
        request = sequence.request
        self.scheduler.remove(sequence)
        if request in self._held and sequence in self._held[request]:
            self._held[request].remove(sequence)
        elif request in self._held:  # it was the first, which the others waited for
            self._release_held(request)
        self.counts[f"ended_{reason}"] += 1
        request.unfinished -= 1
        if request.unfinished == 0:
            self._held.pop(request, None)
            with self._lock:
                request.row.users -= 1
            self._free_row(request.row)
        try:
            request.tell(Finished(sequence.choice, reason, error))
        except Exception:
            _log.exception("a request's listener failed")

    def _count_waiting(self) -> None:
        with self._lock:
            self._entered = self.scheduler.num_waiting + sum(map(len, self._held.values()))
