"""The next token of each sequence of a batch, and its probability. No sequence's choice depends on the others'."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..choice import NOT_NUMBERS, choose_each
from ..errors import UserError
from .request import SequenceState, TokenLogprobs

_LEAST = -9999.0  # of a log-probability: what OpenAI says where there is none, since JSON has no -infinity
Chosen = tuple[int, TokenLogprobs | None]


def choose_tokens(logits: Tensor, sequences: Sequence[SequenceState]) -> list[Chosen | Exception]:
    """For each row of logits [B, vocab_size] the token that its sequence goes on with, or why there is none."""
    found: list[Chosen | Exception] = [(0, None)] * len(sequences)
    alike: dict[tuple[float, float], list[int]] = {}
    for row, sequence in enumerate(sequences):
        sampling = sequence.request.sampling
        alike.setdefault((sampling.temperature, sampling.top_p), []).append(row)
    for (temperature, top_p), rows in alike.items():
        for row, token in _choose(logits, rows, temperature, top_p, sequences):
            found[row] = token
    return found


def _choose(
    logits: Tensor, rows: list[int], temperature: float, top_p: float, sequences: Sequence[SequenceState]
) -> list[tuple[int, Chosen | Exception]]:
    """Of the rows that are sampled alike, together."""
    chosen = logits if len(rows) == len(logits) else logits[rows]
    generators = [sequences[row].generator for row in rows]
    tokens = choose_each(chosen, temperature, top_p, generators).tolist()
    found: list[tuple[int, Chosen | Exception]] = []
    for row, token in zip(rows, tokens, strict=True):
        if token < 0:
            found.append((row, UserError(NOT_NUMBERS)))
        else:
            logprobs = _logprobs(logits[row], token, sequences[row].request.sampling.logprobs)
            found.append((row, (token, logprobs)))
    return found


def _logprobs(logits: Tensor, token: int, count: int | None) -> TokenLogprobs | None:
    if count is None:
        return None
    logprobs = logits.float().log_softmax(-1).clamp(min=_LEAST)
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    return TokenLogprobs(float(logprobs[token]), list(zip(tokens.tolist(), values.tolist(), strict=True)))
