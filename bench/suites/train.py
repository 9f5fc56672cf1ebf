"""Table 11 of the paper as a benchmark: what fine-tuning the same base costs by each method.

One training step is forward, backward and AdamW on B sequences of T tokens, none of them padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from model.config import LlamaConfig
from model.llama import Llama

from ..clock import Clock
from ..contenders import CONTENDERS, EIGHTH, OURS, SEVEN_BILLION, TINY, Contender, random_base
from ..interleave import measure
from ..ledger import Row
from ..peak import in_fresh_process, peak_of, resident
from ..runner import Job, Note, Options
from .attention import name_of

# Alpaca as the paper trained on it: 52,002 samples, 5 epochs; the official script pads every one to 512 tokens,
# and they hold about 130 on average.
SAMPLES, EPOCHS, PADDED, MEAN_LENGTH = 52002, 5, 512, 130


class Base(NamedTuple):
    name: str
    config: LlamaConfig
    batch: int
    seqlen: int


BASES = {
    "cpu": Base("LLaMA-7B's shape at 1/8 width", EIGHTH, 2, 256),
    "cuda": Base("LLaMA-7B", SEVEN_BILLION, 4, 512),
}
SMOKE = Base("tiny LLaMA", TINY, 2, 32)


def jobs(options: Options) -> list[Job]:
    """One: the contenders are timed in turns. Half precision is no way to train on a CPU, so there only float32."""
    base = SMOKE if options.smoke else BASES[options.device.type]
    dtypes = options.dtypes if options.device.type == "cuda" else (torch.float32,)
    return [
        Job(f"train, {base.name}, {name_of(dtype)}", partial(rows, options, base, dtype)) for dtype in dtypes
    ]


def training_step(contender: Contender, model: Llama, base: Base) -> tuple[int, Callable[[], object]]:
    """(trainable parameters, a call that does one step)"""
    parameters, loss_of = contender.build(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, base.config.vocab_size, (base.batch, base.seqlen), generator=random)
    tokens = tokens.to(model.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(tokens)
        loss.backward()
        optimizer.step()

    return sum(p.numel() for p in parameters), step


def rows(options: Options, base: Base, dtype: torch.dtype, note: Note) -> Iterator[Row]:
    model = random_base(base.config, dtype, options.device)
    counts: dict[str, int] = {}
    steps: dict[str, Callable[[], object]] = {}
    for contender in CONTENDERS:
        if not options.wants_provider(contender.name):
            continue
        if reason := contender.why_not():
            note(f"{contender.name} left out: {reason}")
            continue
        try:
            counts[contender.name], steps[contender.name] = training_step(contender, model, base)
            steps[contender.name]()
        except RuntimeError as error:  # out of memory on a small chip
            counts.pop(contender.name, None), steps.pop(contender.name, None)
            note(f"{contender.name}: no figure, {str(error).partition(chr(10))[0]}")
    if not steps:
        return
    times = measure(steps, options.seconds if options.smoke else 4 * options.seconds, Clock(options.device))
    tokens = base.batch * base.seqlen
    for name in steps:
        seconds = times.median(name)
        rate = tokens / seconds
        figures = {"trainable parameters": counts[name], "tokens/s": rate}
        if not options.smoke:  # a fresh process for each
            figures["peak GB"] = peak(name, base, dtype, options) / 1e9
        figures["Alpaca x 5 padded, h"] = SAMPLES * EPOCHS * PADDED / rate / 3600
        figures["Alpaca x 5 packed, h"] = SAMPLES * EPOCHS * MEAN_LENGTH / rate / 3600
        yield Row(
            suite="train", shape=base.name, sizes={"batch": base.batch, "seqlen": base.seqlen}, mode="training step",
            dtype=name_of(dtype), provider=name, rounds=times.rounds, p20_ms=1e3 * times.quantile(name, 0.2),
            p50_ms=1e3 * seconds, p80_ms=1e3 * times.quantile(name, 0.8),
            ratios={} if name == OURS or OURS not in steps else {OURS: times.ratio(name, OURS)},
            figures=figures,
        )  # fmt: skip


def peak(name: str, base: Base, dtype: torch.dtype, options: Options) -> int:
    """Bytes in use at the worst moment of a step, weights and optimizer included."""
    if options.device.type == "cpu":
        return in_fresh_process(peak_alone, name, base, dtype, options.device, torch.get_num_threads())
    torch.cuda.empty_cache()
    return peak_alone(name, base, dtype, options.device, torch.get_num_threads())


def peak_alone(name: str, base: Base, dtype: torch.dtype, device: torch.device, threads: int) -> int:
    torch.set_num_threads(threads)
    before = resident("VmRSS") if device.type == "cpu" else torch.cuda.memory_allocated()
    model = random_base(base.config, dtype, device)
    contender = next(c for c in CONTENDERS if c.name == name)
    _, step = training_step(contender, model, base)
    step()  # the optimizer has its state now
    held = (resident("VmRSS") if device.type == "cpu" else torch.cuda.memory_allocated()) - before
    return held + peak_of(step, device)
