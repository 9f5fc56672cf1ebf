"""The choice of a token from logits: the likeliest, or one drawn from the likeliest ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zinit_kernels import operators
from zinit_kernels.packed import NATIVE

from .errors import UserError

_CHOOSE = operators.operator("choose", "cpu")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SMALLEST = torch.finfo(torch.float32).tiny  # below it a temperature would be 0 in float32
NOT_NUMBERS = (
    "the model's logits are not numbers: damaged weights, or a dtype too narrow for them (float16 ends at 65504: try "
    "bfloat16 or float32)."
)


def choose(logits: Tensor, temperature: float, top_p: float, generators: Sequence[torch.Generator]) -> Tensor:
    """One token for each row of logits [B, vocab_size], int64 [B]. Raises UserError where they are no numbers."""
    chosen = choose_each(logits, temperature, top_p, generators)
    tokens_of(chosen)
    return chosen


def tokens_of(chosen: Tensor) -> list[int]:
    """What was chosen for each row. Raises UserError where a row's logits are no numbers, which -1 says."""
    tokens: list[int] = chosen.tolist()
    if min(tokens, default=0) < 0:
        raise UserError(NOT_NUMBERS)
    return tokens


def choose_each(
    logits: Tensor, temperature: float, top_p: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """The same, with -1 for a row whose logits are no numbers: it changes nothing for the others.

    A race: a token with probability p comes in after a time that is exponential with rate p, and the first one of the
    nucleus wins. Rounding changes the winner of one token in 100 in bfloat16. Looking up one random number in the
    cumulative probabilities changes one in 18: every token behind a change of them is shifted. A generator gives one
    seed for each token; a token's time depends on the seed and its number alone (`times`).

    On a CPU a kernel does this, in 36 us for 49,152 logits. The tensor operations below take milliseconds, and tens of
    them where another process has a core: each operation waits for all threads.
    """
    seeds = [_seed(generator) for generator in generators] if temperature else []
    temperature = _bounded(temperature)
    if NATIVE and logits.device.type == "cpu" and logits.dtype in _FLOATS:
        chosen: Tensor = _CHOOSE(
            logits.contiguous(), temperature, top_p, torch.tensor(seeds, dtype=torch.int64)
        )
        return chosen
    # one pass for both: in bfloat16 argmax alone takes 4 times as long
    largest, likeliest = logits.max(-1, keepdim=True)
    if temperature == 0:
        first = likeliest[..., 0]
    else:
        nucleus = _nucleus(_probabilities(logits, largest, temperature), top_p)
        drawn_times = torch.stack([times(seed, nucleus.shape[-1]) for seed in seeds])
        first = _first(nucleus, drawn_times.to(nucleus.device))
    return first.masked_fill(~largest[..., 0].isfinite(), -1)


def _seed(generator: torch.Generator) -> int:
    """The next number of a generator, any int64."""
    return int(torch.empty((), dtype=torch.int64).random_(-(1 << 63), None, generator=generator))


def times(seed: int, count: int) -> Tensor:
    """Exponential times [count] of a race, float64: minus the logarithm of splitmix64's numbers after the seed."""
    x = torch.arange(1, count + 1) * _signed(0x9E3779B97F4A7C15) + seed  # modulo 2**64, as all that follows
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shifted(x, 31)
    return -((_shifted(x, 12).double() + 0.5) * 2.0**-52).log()


def _signed(number: int) -> int:
    return number - (1 << 64)


def _shifted(x: Tensor, places: int) -> Tensor:
    """x to the right, with zeros from the left."""
    return x >> places & ((1 << (64 - places)) - 1)


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
    nucleus = _nucleus(_probabilities(logits, largest, temperature), top_p)
    times = [torch.empty_like(nucleus[0]).exponential_(generator=generator) for generator in generators]
    return _first(nucleus, torch.stack(times)), finite


def _probabilities(logits: Tensor, largest: Tensor, temperature: float) -> Tensor:
    scaled = (logits.float() - largest) / _bounded(temperature)  # at most 0: no temperature overflows
    return scaled.softmax(-1)


def _bounded(temperature: float) -> float:
    """A temperature that divides 0 and -infinity as they should be, in float32: not 0 / 0 or -infinity * 0."""
    return min(max(temperature, _SMALLEST), 1 / _SMALLEST) if temperature else 0.0


def _first(nucleus: Tensor, times: Tensor) -> Tensor:
    """The winner of each row's race."""
    return (nucleus / times.clamp_min_(_SMALLEST)).argmax(-1)  # torch may draw a 0, and 0 / 0 would win


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities [B, vocab_size], with 0 for the tokens outside of each row's smallest set that reaches top_p.

    Of equal tokens the lower one is taken first.
    """
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    reached = ordered.double().cumsum(-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(reached > top_p, 0))
