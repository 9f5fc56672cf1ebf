"""Generation: tokens per second, time to the first, and how near that is to streaming the weights and the cache once.

The same base and the same prompts, greedy, adapted and not: this project's loop and transformers' generate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.adapter import LlamaAdapter
from model.config import LlamaConfig
from model.generation import generate
from model.llama import Llama

from ..clock import Clock
from ..conditions import why_failed, why_missing
from ..contenders import ACCELERATED, EIGHTH, PEFT, ROUNDING, SEVEN_BILLION, TINY, our_adapter, random_base
from ..interleave import measure
from ..ledger import Row
from ..peers import in_litgpt, in_peft, in_peft_accelerated, in_transformers
from ..probes import device_copy, plain_read
from ..runner import Job, Note, Options
from .attention import name_of


class Base(NamedTuple):
    name: str
    config: LlamaConfig
    prompt: int  # tokens
    new: int
    batches: tuple[int, ...]


BASES = {
    "cpu": Base("LLaMA-7B's shape at 1/8 width", EIGHTH, 64, 32, (1, 4)),
    "cuda": Base("LLaMA-7B", SEVEN_BILLION, 128, 32, (1, 32)),
}
SMOKE = Base("tiny LLaMA", TINY, 8, 4, (1,))
Generate = Callable[[Tensor, int], Tensor]  # (prompts [B, T], N): the N new tokens of each, [B, N]
Scores = Callable[[Tensor], Tensor]  # tokens [B, T] -> logits [B, T, V], without a cache


def jobs(options: Options) -> list[Job]:
    """One per dtype and number of sequences."""
    base = SMOKE if options.smoke else BASES[options.device.type]
    return [
        Job(f"generate, {base.name}, B {batch}, {name_of(dtype)}", partial(rows, options, base, batch, dtype))
        for dtype in options.dtypes
        for batch in base.batches
    ]


def zinit(base: Llama, adapter: LlamaAdapter | None) -> tuple[Generate, Scores]:
    def run(prompts: Tensor, new: int) -> Tensor:
        new_tokens = generate(base, prompts.tolist(), adapter, max_new_tokens=new, temperature=0, eos_ids=[])
        return torch.tensor(new_tokens)

    return run, lambda tokens: base.logits(base.hidden_states(tokens, adapter))


def zinit_adapted(base: Llama) -> tuple[Generate, Scores]:
    return zinit(base, our_adapter(base).requires_grad_(False))


def by_transformers(make: Callable[[Llama], Any], base: Llama) -> tuple[Generate, Scores]:
    model = make(base).eval()

    def run(prompts: Tensor, new: int) -> Tensor:
        tokens = model.generate(
            prompts, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0
        )
        return tokens[:, prompts.shape[1] :]

    return run, lambda tokens: model(tokens).logits


def by_litgpt(base: Llama) -> tuple[Generate, Scores]:
    """Its loop takes one sequence; its cache is made once."""
    from litgpt.generate.base import generate as generate_one

    model = in_litgpt(base).eval()

    def run(prompts: Tensor, new: int) -> Tensor:
        length = prompts.shape[1] + new
        if model.mask_cache is None or model.mask_cache.shape[-1] < length:
            model.set_kv_cache(1, length, device=prompts.device, dtype=base.dtype)
        return generate_one(model, prompts[0], length, temperature=0.0, include_prompt=False)[None]

    return run, model


class Generator(NamedTuple):
    """A way to generate: `build` makes it of a base."""

    name: str
    build: Callable[[Llama], tuple[Generate, Scores]]
    needs: tuple[str, ...] = ()
    one_sequence: bool = False


HF, BOTH = ("transformers",), ("transformers", "peft")
GENERATORS = (
    Generator("zinit, adapted", zinit_adapted),
    Generator("zinit, base alone", partial(zinit, adapter=None)),
    Generator(ACCELERATED, partial(by_transformers, in_peft_accelerated), BOTH),
    Generator(PEFT, partial(by_transformers, in_peft), BOTH),
    Generator("transformers, base alone", partial(by_transformers, in_transformers), HF),
    Generator("litgpt adapter", by_litgpt, ("litgpt",), one_sequence=True),
)


@torch.no_grad()
def why_wrong(generator: Generator, dtype: torch.dtype, device: torch.device) -> str:
    """ "" where the tokens that a tiny model decodes are, to rounding, the likeliest by a pass without a cache."""
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(TINY.vocab_size, (1, 9), generator=random).to(device)
    try:
        run, scores = generator.build(random_base(TINY, dtype, device))
        made = run(prompts, 8).to(device)
        logits = scores(torch.cat([prompts, made], 1))[:, prompts.shape[1] - 1 : -1].float()
    except Exception as error:  # any: what raises is red, and the others go on
        return why_failed(error)
    lost = (logits.amax(-1) - logits.gather(-1, made[..., None])[..., 0]).max() / logits.std()
    return (
        ""
        if lost <= ROUNDING[dtype]
        else f"wrong result: a token {lost:.2g} standard deviations from the best"
    )


def usable(options: Options, batch: int, dtype: torch.dtype, note: Note) -> Iterator[Generator]:
    """Those that are here and right on a tiny model; the others are named with their reason."""
    for generator in GENERATORS:
        if not options.wants_provider(generator.name):
            continue
        if reason := why_missing(*generator.needs):
            note(f"{generator.name} left out: {reason}")
        elif generator.one_sequence and batch > 1:
            note(f"{generator.name} left out of batches: it takes one sequence")
        elif wrong := why_wrong(generator, dtype, options.device):
            note(f"{generator.name}, {name_of(dtype)}: no figure, {wrong}")
        else:
            yield generator


def rows(options: Options, base: Base, batch: int, dtype: torch.dtype, note: Note) -> Iterator[Row]:
    model = random_base(base.config, dtype, options.device)
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, base.config.vocab_size, (batch, base.prompt), generator=random).to(
        options.device
    )
    calls: dict[str, Callable[[], object]] = {}
    for generator in usable(options, batch, dtype, note):
        run, _ = generator.build(model)
        calls[f"{generator.name}, first"] = partial(run, prompts, 1)
        calls[f"{generator.name}, all"] = partial(run, prompts, base.new)
    if not calls:
        return
    weights = list(model.state_dict().values())
    on_device = options.device.type == "cuda"
    calls["probe"] = (
        device_copy(sum(w.nbytes for w in weights), options.device) if on_device else plain_read(*weights)
    )
    times = measure(calls, options.seconds if options.smoke else 4 * options.seconds, Clock(options.device))
    limit = sum(w.nbytes for w in weights) / times.median("probe")  # bytes per second
    streamed = bytes_per_token(model, batch, base.prompt + base.new // 2)
    for name in dict.fromkeys(call.rpartition(", ")[0] for call in calls if call != "probe"):
        first, everything = times.median(f"{name}, first"), times.median(f"{name}, all")
        per_step = (everything - first) / (base.new - 1)
        yield Row(
            suite="generate", shape=base.name, mode=f"B {batch}, {base.prompt} + {base.new} tokens",
            sizes={"batch": batch, "prompt": base.prompt, "new_tokens": base.new}, dtype=name_of(dtype), provider=name,
            rounds=times.rounds, p20_ms=1e3 * times.quantile(f"{name}, all", 0.2), p50_ms=1e3 * everything,
            p80_ms=1e3 * times.quantile(f"{name}, all", 0.8), gbps=streamed / per_step / 1e9,
            ratios={
                other: times.ratio(f"{name}, all", f"{other}, all")
                for other in (GENERATORS[0].name, PEFT)
                if other != name and f"{other}, all" in calls
            },
            figures={
                "tokens/s": batch / per_step,
                "first token ms": 1e3 * first,
                "of the bandwidth limit": streamed / per_step / limit,
            },
        )  # fmt: skip


def bytes_per_token(model: Llama, batch: int, seqlen: int) -> int:
    """What decoding one token of each sequence must read: all weights but the embedding's, and the cache."""
    config = model.config
    weights = sum(w.nbytes for name, w in model.state_dict().items() if name != "embed_tokens.weight")
    keys_and_values = 2 * config.num_layers * config.num_heads_kv * config.head_dim * model.dtype.itemsize
    return weights + batch * seqlen * keys_and_values
