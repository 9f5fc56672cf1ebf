"""Generation: tokens per second, time to the first, and how near that is to streaming the weights and the cache once.

The same base and the same prompts, greedy, adapted and not: this project's loop and transformers' generate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import LlamaConfig
from model.generate import generate
from model.llama import Llama

from ..clock import Clock
from ..conditions import why_missing
from ..contenders import (
    EIGHTH,
    SEVEN_BILLION,
    TINY,
    in_transformers,
    our_adapter,
    peft_adapter,
    random_base,
)
from ..interleave import measure
from ..ledger import Row
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
    "cpu": Base("LLaMA-7B's shape at 1/8 width", EIGHTH, 128, 32, (1, 8)),
    "cuda": Base("LLaMA-7B", SEVEN_BILLION, 128, 128, (1, 32)),
}
SMOKE = Base("tiny LLaMA", TINY, 8, 4, (1,))
Generate = Callable[[Tensor, int], object]  # (prompts [B, T], new tokens)


def jobs(options: Options) -> list[Job]:
    """One per dtype and number of sequences."""
    base = SMOKE if options.smoke else BASES[options.device.type]
    return [
        Job(f"generate, {base.name}, B {batch}, {name_of(dtype)}", partial(rows, options, base, batch, dtype))
        for dtype in options.dtypes
        for batch in base.batches
    ]


def ours(model: Llama, adapter: object) -> Generate:
    return lambda prompts, new: generate(
        model, prompts.tolist(), adapter, max_new_tokens=new, temperature=0, eos_ids=[]
    )


def theirs(model: object) -> Generate:
    return lambda prompts, new: model.generate(  # type: ignore[attr-defined]
        prompts, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0
    )


def generators(options: Options, model: Llama, note: Note) -> dict[str, Generate]:
    adapter = our_adapter(model).requires_grad_(False)
    found = {"zinit, adapted": ours(model, adapter), "zinit, base alone": ours(model, None)}
    for name, build, needs in (
        ("PEFT adaption prompt", peft_adapter, ("transformers", "peft")),
        ("transformers, base alone", in_transformers, ("transformers",)),
    ):
        if reason := why_missing(*needs):
            note(f"{name} left out: {reason}")
        else:
            found[name] = theirs(build(model).eval())
    return {name: run for name, run in found.items() if options.wants_provider(name)}


def rows(options: Options, base: Base, batch: int, dtype: torch.dtype, note: Note) -> Iterator[Row]:
    model = random_base(base.config, dtype, options.device)
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, base.config.vocab_size, (batch, base.prompt), generator=random).to(
        options.device
    )
    calls: dict[str, Callable[[], object]] = {}
    for name, run in generators(options, model, note).items():
        calls[f"{name}, first"] = partial(run, prompts, 1)
        calls[f"{name}, all"] = partial(run, prompts, base.new)
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
