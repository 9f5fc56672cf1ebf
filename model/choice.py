"""The choice of a token from logits: the likeliest, or one drawn from the likeliest ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import UserError

MOST_LIKELY = 256  # tokens among which a nucleus is looked for first
_SMALLEST = torch.finfo(torch.float32).tiny  # below it a temperature would be 0 in float32
NOT_NUMBERS = (
    "the model's logits are not numbers: damaged weights, or a dtype too narrow for them (float16 ends at 65504: try "
    "bfloat16 or float32)."
)


def choose(logits: Tensor, temperature: float, top_p: float, generators: Sequence[torch.Generator]) -> Tensor:
    """One token for each row of logits [B, vocab_size], int64 [B]. Raises UserError where they are no numbers."""
    # one pass for both: in bfloat16 argmax alone takes 4 times as long
    largest, likeliest = logits.max(-1, keepdim=True)
    if not largest.isfinite().all():
        raise UserError(NOT_NUMBERS)
    if temperature == 0:
        return likeliest[..., 0]
    probabilities = _probabilities(logits, largest, temperature)
    nucleus = _nucleus(probabilities, top_p)
    # A race: a token with probability p comes in after a time that is exponential with rate p, and the first one wins.
    # Rounding changes the winner of one token in 100 in bfloat16. Looking up one random number in the cumulative
    # probabilities changes one in 18: every token behind a change of them is shifted.
    shape = probabilities.shape[-1:]
    times = torch.stack([torch.empty(shape).exponential_(generator=generator) for generator in generators])
    return _first(nucleus, times.to(nucleus.device))


def choose_on_device(
    logits: Tensor, temperature: float, top_p: float, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """`choose` without a question that the host would have to wait for: the tokens, and whether the logits are numbers.

    The generators live on the logits' device. All tokens are sorted, which takes a GPU little beside the model.
    """
    largest, likeliest = logits.max(-1, keepdim=True)
    finite = largest.isfinite().all()
    if temperature == 0:
        return likeliest[..., 0], finite
    probabilities = _probabilities(logits, largest, temperature)
    nucleus, _ = _kept(probabilities, *probabilities.sort(-1, descending=True), top_p)
    times = [torch.empty_like(nucleus[0]).exponential_(generator=generator) for generator in generators]
    return _first(nucleus, torch.stack(times)), finite


def _probabilities(logits: Tensor, largest: Tensor, temperature: float) -> Tensor:
    scaled = (logits.float() - largest) / max(temperature, _SMALLEST)  # at most 0: no temperature overflows
    return scaled.softmax(-1)


def _first(nucleus: Tensor, times: Tensor) -> Tensor:
    """The winner of each row's race."""
    return (nucleus / times.clamp_min_(_SMALLEST)).argmax(-1)  # torch may draw a 0, and 0 / 0 would win


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
