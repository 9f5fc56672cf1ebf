"""Generation: ragged prompts in one packed pass into the cache, then one token for every sequence at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .errors import UserError
from .llama import Adapter, KVCache, Llama, select_sequences
from .lookup import Lookup

NUM_SEEDS = 1 << 63  # a seed is below this
MOST_LIKELY = 256  # tokens among which a nucleus is looked for first
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
    answers of 12 tokens, alone and 15 at once, 3 of 30 in bfloat16 at temperature 0 and 5 at 1; none in float32.

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
    if lookup:
        draft = _Drafts(model, adapter, cache, prompts[0], min(lookup, MOST_DRAFT))
    for step in range(1, max_new_tokens + 1):
        tokens = choose(model.logits(hidden), temperature, top_p, [generators[i] for i in rows])
        for index, token in zip(rows, tokens.tolist(), strict=True):
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
            cache, tokens, rows = cache.select(kept), tokens[kept], [rows[row] for row in kept]
            adapter = select_sequences(adapter, kept)
        if lookup:
            hidden = draft.after(int(tokens), max_new_tokens - step)
        else:
            hidden = model.hidden_states(tokens[:, None], adapter, cache=cache)[:, 0]
    return outputs


MOST_DRAFT = 31  # with the token before them, 32: what one call decodes


class _Drafts:
    """The hidden states of one sequence, token by token; some were computed together with the one before."""

    def __init__(
        self, model: Llama, adapter: Adapter | None, cache: KVCache, prompt: Sequence[int], length: int
    ):
        self.model, self.adapter, self.cache, self.lookup = model, adapter, cache, Lookup(prompt, length)
        self.ahead: list[tuple[int, Tensor]] = []  # the draft's tokens, and the hidden state behind each

    def after(self, token: int, most: int) -> Tensor:
        """The hidden state [1, C] behind the next token. `most`: tokens that may be asked for, this one too."""
        self.lookup.append(token)
        if self.ahead and self.ahead[0][0] == token:
            self.cache.lengths += 1
            return self.ahead.pop(0)[1]
        draft = self.lookup.draft()[: most - 1]
        tokens = torch.tensor([[token, *draft]], device=self.model.device)
        hidden = self.model.hidden_states(tokens, self.adapter, cache=self.cache)[0]
        # what lies behind the cache's length is written again, unless the draft turns out right
        self.cache.lengths -= len(draft)
        self.ahead = list(zip(draft, hidden[1:, None], strict=True))
        return hidden[:1]


def choose(logits: Tensor, temperature: float, top_p: float, generators: Sequence[torch.Generator]) -> Tensor:
    """One token for each row of logits [B, vocab_size], int64 [B]. Raises UserError where they are no numbers."""
    # one pass for both: in bfloat16 argmax alone takes 4 times as long
    largest, likeliest = logits.max(-1, keepdim=True)
    if not largest.isfinite().all():
        raise UserError(
            "the model's logits are not numbers: damaged weights, or a dtype too narrow for them (float16 ends at "
            "65504: try bfloat16 or float32)."
        )
    if temperature == 0:
        return likeliest[..., 0]
    smallest = torch.finfo(torch.float32).tiny  # below it a temperature would be 0 in float32
    scaled = (logits.float() - largest) / max(temperature, smallest)  # at most 0: no temperature overflows
    probabilities = scaled.softmax(-1)
    nucleus = _nucleus(probabilities, top_p)
    # A race: a token with probability p comes in after a time that is exponential with rate p, and the first one wins.
    # Rounding changes the winner of one token in 100 in bfloat16. Looking up one random number in the cumulative
    # probabilities changes one in 18: every token behind a change of them is shifted.
    shape = probabilities.shape[-1:]
    times = torch.stack([torch.empty(shape).exponential_(generator=generator) for generator in generators])
    times = times.clamp_min_(smallest).to(nucleus.device)  # torch may draw a 0, and 0 / 0 would win
    return (nucleus / times).argmax(-1)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities [B, vocab_size], with 0 for the tokens outside of each row's smallest set that reaches top_p.

    The set rarely holds more than a few tokens. Sorting 49,152 probabilities takes 3.6 ms on one core, finding the
    largest 256 takes 0.1. Only rows whose largest do not reach top_p are sorted. Each row is decided by itself: so a
    sequence's tokens do not depend on the others.
    """
    count = probabilities.shape[-1]
    ordered, order = probabilities.topk(min(MOST_LIKELY, count), -1)
    nucleus, reached = _kept(probabilities, ordered, order, top_p)
    # sums of probabilities are off by rounding: near top_p, let all tokens decide
    short = reached <= top_p + 1e-6
    if count > MOST_LIKELY and short.any():
        rows = probabilities[short]
        nucleus[short], _ = _kept(rows, *rows.sort(-1, descending=True), top_p)
    return nucleus


def _kept(probabilities: Tensor, ordered: Tensor, order: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The nucleus among the tokens `order`, whose probabilities fall, and the probability [B] of all of `order`."""
    sums = ordered.cumsum(-1)
    outside = sums - ordered > top_p
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(outside, 0)), sums[..., -1]


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
    hidden = model.hidden_states(
        tokens, adapter, cu_seqlens=cu_seqlens, max_seqlen=int(lengths.max()), cache=cache
    )
    return hidden[ends - 1]


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
