"""The next token of each sequence of a batch, and its probability. No sequence's choice depends on the others'."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..choice import NOT_NUMBERS, choose_each
from ..errors import UserError
from .request import SequenceState, TokenLogprobs

_LEAST = -9999.0  # of a log-probability: what OpenAI says where there is none, since JSON has no -infinity
Chosen = tuple[int, TokenLogprobs | None]


def choose_tokens(
    logits: Tensor, sequences: Sequence[SequenceState], likeliest: Tensor | None = None
) -> list[Chosen | Exception]:
    """For each row of logits [B, vocab_size] the token that its sequence goes on with, or why there is none.

    likeliest: each row's likeliest token, int64 [B], -1 where its logits are no numbers; None = not known yet.
    """
    found: list[Chosen | Exception] = [(0, None)] * len(sequences)
    alike: dict[tuple[float, float], list[int]] = {}
    for row, sequence in enumerate(sequences):
        sampling = sequence.request.sampling
        alike.setdefault((sampling.temperature, sampling.top_p), []).append(row)
    for (temperature, top_p), rows in alike.items():
        if likeliest is not None and temperature == 0:
            tokens = likeliest[rows]
        else:
            of_rows = logits if len(rows) == len(logits) else logits[rows]
            tokens = choose_each(of_rows, temperature, top_p, [sequences[row].generator for row in rows])
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if token < 0:
                found[row] = UserError(NOT_NUMBERS)
            else:
                count = sequences[row].request.sampling.logprobs
                found[row] = token, _logprobs(logits[row], token, count)
    return found


def _logprobs(logits: Tensor, token: int, count: int | None) -> TokenLogprobs | None:
    if count is None:
        return None
    logprobs = logits.float().log_softmax(-1).clamp(min=_LEAST)
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    return TokenLogprobs(float(logprobs[token]), list(zip(tokens.tolist(), values.tolist(), strict=True)))
