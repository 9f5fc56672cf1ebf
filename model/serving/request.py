"""What is asked of the engine, and what it tells the asker."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..errors import UserError
from ..llama import Adapter
from ..sampling import NUM_SEEDS

MOST_LOGPROBS = 20  # alternatives that are told for each token
MOST_CHOICES = 128


class QueueFull(UserError):
    """More requests wait than the engine takes. Ask again later."""


class UnknownAdapter(UserError):
    """No adapter has this name, or it was dropped."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are chosen; the same meanings and defaults as `model.sampling.generate`.

    Choice i of a request draws from a generator of its own, seeded (seed + i) % 2**63.
    """

    max_new_tokens: int = 256
    temperature: float = 0.1
    top_p: float = 0.75
    seed: int = 0
    choices: int = 1
    eos_ids: tuple[int, ...] | None = None  # None = the engine's
    logprobs: int | None = (
        None  # likeliest tokens that are told beside each chosen one; None = no log-probabilities
    )

    def check(self) -> None:
        """Raises UserError for a value outside its range."""
        if not 0 <= self.seed < NUM_SEEDS:
            raise UserError(f"seed must lie in 0 .. 2**63 - 1, got {self.seed}.")
        if self.max_new_tokens < 0 or not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise UserError(
                "max_new_tokens and temperature must be finite, not negative, and top_p must lie in (0, 1], got "
                f"{self.max_new_tokens}, {self.temperature} and {self.top_p}."
            )
        if not 1 <= self.choices <= MOST_CHOICES:
            raise UserError(f"a request has 1 to {MOST_CHOICES} choices, got {self.choices}.")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise UserError(f"logprobs must lie in 0 .. {MOST_LOGPROBS}, got {self.logprobs}.")


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities under the model's softmax, whatever the temperature."""

    chosen: float
    likeliest: list[tuple[int, float]]  # tokens and theirs, the likeliest first


class NewToken(NamedTuple):
    """A token of a choice."""

    choice: int
    token: int
    logprobs: TokenLogprobs | None


class Finished(NamedTuple):
    """The end of a choice. reason: "stop" (an end-of-sequence token, or `stops` said so), "length", "cancelled", or
    "error", of which `error` is the cause.
    """

    choice: int
    reason: str
    error: Exception | None = None


Event = NewToken | Finished
# Told each choice and its new tokens so far, after every token; True ends that choice.
Stops = Callable[[int, Sequence[int]], bool]


class PromptRow:
    """The prompts of requests that see the same ones: an adapter's, or those of an adapter and some images."""

    def __init__(self, adapter: Adapter | None, root: int, pinned: bool):
        self.adapter = adapter  # None: the base alone
        self.root = root  # negative; no two rows have the same one, so none takes the other's pages
        self.pinned = pinned  # it stays in the table while nobody uses it
        self.index = -1  # of the table's rows; -1: none yet, or the base
        self.users = 0  # requests


@dataclass(eq=False)
class Request:
    """One prompt and the choices that are made of it. `Engine.submit` makes it."""

    prompt: Sequence[int]
    sampling: Sampling
    row: PromptRow
    queue: str  # requests of different queues take turns
    adapter_name: str | None
    tell: Callable[[Event], None]  # called by the engine's thread; it must not wait
    stops: Stops | None
    arrived: float
    sequences: list[SequenceState] = field(default_factory=list)
    cancelled: bool = False
    unfinished: int = 0  # choices
    first_token_at: float | None = None

    def cancel(self) -> None:
        """The engine ends it before its next step, and takes its pages back. May be called from any thread."""
        self.cancelled = True


@dataclass(eq=False)
class SequenceState:
    """One choice: its tokens, and how far the cache holds them."""

    request: Request
    choice: int
    tokens: list[int]
    generator: torch.Generator
    cached: int = 0  # tokens whose keys and values are in `pages`
    pages: list[int] = field(default_factory=list)
    filled: int = 0  # pages that are full and known to the pool
    before: int = 0  # the serial of the last of these, or the root
    waits_since: float = 0.0

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def rest(self) -> int:
        """Tokens that are known and not in the cache; after the last of them, a new one is chosen."""
        return len(self.tokens) - self.cached
