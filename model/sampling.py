"""Generation: ragged prompts in one packed pass into the cache, then one token for every sequence at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .choice import choose_each, tokens_of
from .device_steps import DeviceSteps
from .errors import UserError
from .kept_layers import KeptLayers, keep
from .llama import Adapter, KVCache, Llama, select_sequences
from .lookup import Lookup

NUM_SEEDS = 1 << 63  # a seed is below this
# Told each sequence's index and its new tokens so far, after every token; True ends that sequence.
Watch = Callable[[int, list[int]], bool | None]


@torch.no_grad()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    adapter: Adapter | None = None,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.1,
    top_p: float = 0.75,
    seed: int = 0,
    eos_ids: Sequence[int] | None = None,
    watch: Watch | None = None,
    lookup: int = 0,
) -> list[list[int]]:
    """The new tokens of each prompt, end-of-sequence left out.

    temperature 0 takes the likeliest token; otherwise one is drawn from the smallest set of tokens whose probability
    reaches top_p. Prompt i draws from its own generator, seeded (seed + i) % 2**63, so its random numbers do not
    depend on what else is in the batch. Its logits do, by rounding: a matrix product of more rows adds up in another
    order. So a token may come out differently where two are nearly equal, and then all that follows it: of SmolLM2's
    answers of 12 tokens, alone and 15 at once, 3 of 30 in bfloat16 at temperature 0 and 5 at 1; none in float32. Packed
    weights (int8, int4) differ more: of a random base's 24 answers of 30 tokens 10 to 12 in bfloat16, up to 3 in
    float16.

    lookup: up to so many tokens that followed the sequence's last ones before are read in one pass (`lookup.py`). The
    tokens are those of lookup 0; it is for one prompt.

    eos_ids None = the model's. Raises UserError, before any work, for an empty prompt or one that with max_new_tokens
    does not fit the model's context.
    """
    check_request(model, prompts, max_new_tokens, temperature, top_p, seed)
    if lookup < 0 or (lookup and len(prompts) > 1):
        raise UserError(
            f"lookup takes one prompt and must not be negative, got {lookup} with {len(prompts)} prompts."
        )
    stops = set(model.config.eos_ids if eos_ids is None else eos_ids)
    outputs: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens == 0:
        return outputs
    generators = [torch.Generator().manual_seed((seed + index) % NUM_SEEDS) for index in range(len(prompts))]
    rows = list(range(len(prompts)))  # row of the batch -> its prompt
    capacity = max(map(len, prompts)) + max_new_tokens
    cache = _allocate(model, len(prompts), capacity)
    hidden = _prefill(model, prompts, adapter, cache)
    running = set(rows)
    steps: _Steps | DeviceSteps
    if lookup:
        steps = _Drafts(model, adapter, cache, hidden, prompts[0], min(lookup, MOST_DRAFT))
    elif model.device.type == "cuda":
        steps = DeviceSteps(model, adapter, cache, hidden)
    else:
        steps = _Steps(model, adapter, cache, hidden)
    for step in range(1, max_new_tokens + 1):
        tokens = steps.next(temperature, top_p, [generators[i] for i in rows], max_new_tokens + 1 - step)
        for index, token in zip(rows, tokens, strict=True):
            if index not in running:
                continue
            if token in stops:
                running.discard(index)
                continue
            outputs[index].append(token)
            if watch is not None and watch(index, outputs[index]):
                running.discard(index)
        if not running or step == max_new_tokens:
            break
        # the finished leave when they are half the batch: the copies together are less than the first cache
        if 2 * len(running) <= len(rows):
            kept = [row for row, index in enumerate(rows) if index in running]
            rows = [rows[row] for row in kept]
            steps.select(kept)
    return outputs


class _Steps:
    """The next tokens of a batch, a step at a time."""

    def __init__(self, model: Llama, adapter: Adapter | None, cache: KVCache, hidden: Tensor):
        self.model, self.adapter, self.cache, self.hidden = model, adapter, cache, hidden
        self.kept = keep(model, adapter, cache)
        self.tokens: Tensor | None = None  # the last ones: the model has not read them yet

    def next(
        self, temperature: float, top_p: float, generators: Sequence[torch.Generator], most: int
    ) -> list[int]:
        """A token for each sequence. `most`: tokens of a sequence that may be asked for, this one too."""
        likeliest: Tensor | None = None
        if self.tokens is None:
            logits = self.model.logits(self.hidden)
        else:
            logits, likeliest = self.read(self.tokens, most)
        if likeliest is None or temperature > 0:
            self.tokens = choose_each(logits, temperature, top_p, generators)
        else:
            self.tokens = likeliest
        return tokens_of(self.tokens)

    def read(self, tokens: Tensor, most: int) -> tuple[Tensor, Tensor | None]:
        """The logits [B, vocab_size] behind these tokens, and the likeliest tokens where they are known."""
        if (kept := self._kept_in_place()) is not None:
            return kept.read(tokens[:, None])
        return self.model.logits(self._hidden(tokens[:, None])[:, 0]), None

    def select(self, kept: list[int]) -> None:
        """Goes on with these rows of the batch."""
        self.cache, self.adapter = self.cache.select(kept), select_sequences(self.adapter, kept)
        self.kept = keep(self.model, self.adapter, self.cache)
        self.tokens = None if self.tokens is None else self.tokens[kept]

    def _kept_in_place(self) -> KeptLayers | None:
        if self.kept is not None and not self.kept.is_in_place():
            self.kept = keep(self.model, self.adapter, self.cache)
        return self.kept

    def _hidden(self, tokens: Tensor) -> Tensor:
        return self.model.hidden_states(tokens, self.adapter, cache=self.cache)


MOST_DRAFT = 31  # with the token before them, 32: what one call decodes


class _Drafts(_Steps):
    """The next tokens of one sequence; some were read together with the one before."""

    def __init__(
        self,
        model: Llama,
        adapter: Adapter | None,
        cache: KVCache,
        hidden: Tensor,
        prompt: Sequence[int],
        length: int,
    ):
        super().__init__(model, adapter, cache, hidden)
        self.lookup = Lookup(prompt, length)
        self.drafted = 0  # tokens of the last draft
        # those that are not yet asked for, and what `read` returns behind each
        self.ahead: list[tuple[int, Callable[[], tuple[Tensor, Tensor | None]]]] = []

    def read(self, tokens: Tensor, most: int) -> tuple[Tensor, Tensor | None]:
        token = int(tokens)
        self.lookup.append(token)
        if self.ahead and self.ahead[0][0] == token:
            self.cache.lengths += 1
            return self.ahead.pop(0)[1]()
        self.lookup.judge(self.drafted, self.drafted - len(self.ahead))
        draft = self.lookup.draft()[: most - 1]
        self.drafted = len(draft)
        read = self._read_all(torch.tensor([[token, *draft]], device=self.model.device))
        # what lies behind the cache's length is written again, unless the draft turns out right
        self.cache.lengths -= len(draft)
        self.ahead = [(token, partial(read, row)) for row, token in enumerate(draft, 1)]
        return read(0)

    def _read_all(self, tokens: Tensor) -> Callable[[int], tuple[Tensor, Tensor | None]]:
        """Reads tokens [1, T]; what `read` returns behind the i-th of them."""
        if (kept := self._kept_in_place()) is not None:
            logits, likeliest = kept.read(tokens)
            return lambda row: (logits[row : row + 1], likeliest[row : row + 1])
        hidden = self._hidden(tokens)[0]
        logits_of = self.model.logits  # what is returned must not hold self, which holds it in turn
        return lambda row: (logits_of(hidden[row : row + 1]), None)


def _allocate(model: Llama, batch_size: int, capacity: int) -> KVCache:
    try:
        return KVCache(model.config, batch_size, capacity, model.dtype, model.device)
    except RuntimeError as error:  # what torch raises on every device that has no more memory
        raise UserError(
            f"there is no memory for a cache of {batch_size} sequences of {capacity} tokens: ask for fewer "
            "new tokens, or decode fewer prompts at once."
        ) from error


def _prefill(
    model: Llama, prompts: Sequence[Sequence[int]], adapter: Adapter | None, cache: KVCache
) -> Tensor:
    """All prompts in one packed pass; the hidden state of each one's last token, [B, C]."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ends = lengths.cumsum(0)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(model.device, torch.int32)
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=model.device)
    return model.hidden_states(
        tokens, adapter, cu_seqlens=cu_seqlens, max_seqlen=int(lengths.max()), cache=cache, last=True
    )


def check_request(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> None:
    if not 0 <= seed < NUM_SEEDS:
        raise UserError(f"seed must lie in 0 .. 2**63 - 1, got {seed}.")
    if max_new_tokens < 0 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise UserError(
            "max_new_tokens and temperature must be finite, not negative, and top_p must lie in (0, 1], got "
            f"{max_new_tokens}, {temperature} and {top_p}."
        )
    vocab_size, context = model.config.vocab_size, model.config.max_seq_len
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} has no tokens.")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(f"prompt {index} holds token ids outside the model's vocabulary of {vocab_size}.")
        if len(prompt) + max_new_tokens > context:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds the "
                f"model's context of {context}: ask for at most {max(context - len(prompt), 0)} new tokens."
            )
