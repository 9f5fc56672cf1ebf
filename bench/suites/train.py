"""Table 11 of the paper as a benchmark: what fine-tuning the same base costs by each method.

One training step is forward, backward and AdamW on B sequences of T tokens, none of them padding.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from model.config import LlamaConfig
from model.llama import Llama

from ..clock import Clock
from ..conditions import why_failed
from ..contenders import (
    ACCELERATED,
    CONTENDERS,
    EIGHTH,
    OURS,
    PEFT,
    SEVEN_BILLION,
    THREE_BILLION,
    TINY,
    Contender,
    random_base,
    why_wrong,
)
from ..interleave import measure
from ..ledger import Row
from ..peak import in_fresh_process, peak_of, resident
from ..runner import Job, Note, Options
from .attention import name_of

# Alpaca as the paper trained on it: 52,002 samples, 5 epochs; the official script pads every one to 512 tokens,
# and they hold about 130 on average.
SAMPLES, EPOCHS, PADDED, MEAN_LENGTH = 52002, 5, 512, 130
PEAK = "peak GB"


class Base(NamedTuple):
    name: str
    config: LlamaConfig
    batch: int
    seqlen: int
    contenders: tuple[str, ...]


TABLE_11 = tuple(contender.name for contender in CONTENDERS if contender.name != "LoRA r = 32")
BASES = {
    "cpu": [Base("LLaMA-7B's shape at 1/8 width", EIGHTH, 1, 256, TABLE_11)],
    "cuda": [
        # first the one that the goals are stated for: gpu-check may stop what comes after it
        Base("Llama-3.2-3B", THREE_BILLION, 4, 512, (OURS, ACCELERATED, PEFT, "LoRA r = 32")),
        Base("LLaMA-7B", SEVEN_BILLION, 4, 512, TABLE_11),
    ],
}
SMOKE = Base("tiny LLaMA", TINY, 2, 32, TABLE_11)


def jobs(options: Options) -> list[Job]:
    """One per base and dtype: the contenders are timed in turns. On a CPU nobody trains in half precision, so there
    only float32."""
    bases = [SMOKE] if options.smoke else BASES[options.device.type]
    dtypes = options.dtypes if options.device.type == "cuda" else (torch.float32,)
    return [
        Job(f"train, {base.name}, {name_of(dtype)}", partial(rows, options, base, dtype))
        for base in bases
        if options.wants_shape(base.name)
        for dtype in dtypes
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


def usable(options: Options, base: Base, dtype: torch.dtype, note: Note) -> Iterator[Contender]:
    """Those that are here, right on a small sibling, and fit into memory; the others are named with their reason."""
    for contender in CONTENDERS:
        if contender.name not in base.contenders or not options.wants_provider(contender.name):
            continue
        if reason := contender.why_not(options.device) or why_no_memory(
            contender, base, dtype, options.device
        ):
            note(f"{contender.name} left out: {reason}")
        elif wrong := why_wrong(contender, dtype, options.device):
            note(f"{contender.name}, {name_of(dtype)}: no figure, {wrong}")
        else:
            yield contender


def why_no_memory(contender: Contender, base: Base, dtype: torch.dtype, device: torch.device) -> str:
    """Full fine-tuning holds its weights, their gradients and AdamW's three tensors of them beside the frozen base."""
    if device.type == "cpu" or not contender.copies:
        return ""
    with torch.device("meta"):
        needed = 7 * dtype.itemsize * sum(p.numel() for p in Llama(base.config).parameters())
    free = torch.cuda.mem_get_info(device)[0]
    return "" if needed < free else f"it takes {needed / 1e9:.0f} GB and {free / 1e9:.0f} GB are free"


def rows(options: Options, base: Base, dtype: torch.dtype, note: Note) -> Iterator[Row]:
    chosen = list(usable(options, base, dtype, note))
    # before the others are there: a fresh process for each, or on a GPU the model made anew
    peaks = {} if options.smoke else {c.name: peak(c, base, dtype, options.device, note) for c in chosen}
    model = random_base(base.config, dtype, options.device)
    counts: dict[str, int] = {}
    steps: dict[str, Callable[[], object]] = {}
    for contender in chosen:
        try:
            count, step = training_step(contender, model, base)
            step()
        except Exception as error:  # any: out of memory, or a kernel's that does not compile here
            note(f"{contender.name}: no figure, {why_failed(error)}")
            continue
        counts[contender.name], steps[contender.name] = count, step
    if not steps:
        return
    times = measure(steps, options.seconds if options.smoke else 4 * options.seconds, Clock(options.device))
    tokens = base.batch * base.seqlen
    for name in steps:
        seconds = times.median(name)
        rate = tokens / seconds
        figures = {"trainable parameters": counts[name], "tokens/s": rate}
        if bytes_at_most := peaks.get(name):
            figures[PEAK] = bytes_at_most / 1e9
        figures["Alpaca x 5 padded, h"] = SAMPLES * EPOCHS * PADDED / rate / 3600
        figures["Alpaca x 5 packed, h"] = SAMPLES * EPOCHS * MEAN_LENGTH / rate / 3600
        yield Row(
            suite="train", shape=base.name, sizes={"batch": base.batch, "seqlen": base.seqlen}, mode="training step",
            dtype=name_of(dtype), provider=name, rounds=times.rounds, p20_ms=1e3 * times.quantile(name, 0.2),
            p50_ms=1e3 * seconds, p80_ms=1e3 * times.quantile(name, 0.8),
            ratios={other: times.ratio(name, other) for other in (OURS, PEFT) if other != name and other in steps},
            figures=figures,
        )  # fmt: skip


def peak(
    contender: Contender, base: Base, dtype: torch.dtype, device: torch.device, note: Note
) -> int | None:
    """Bytes in use at the worst moment of a step, weights and optimizer included; None where that cannot be had."""
    arguments = (contender.name, base, dtype, device, torch.get_num_threads())
    try:
        return in_fresh_process(peak_alone, *arguments) if device.type == "cpu" else peak_alone(*arguments)
    except Exception as error:  # any: a process that the kernel kills for its memory raises BrokenProcessPool
        note(f"{contender.name}: no peak, {why_failed(error)}")
        return None
    finally:
        torch.cuda.empty_cache()


def peak_alone(name: str, base: Base, dtype: torch.dtype, device: torch.device, threads: int) -> int:
    torch.set_num_threads(threads)
    before = in_use(device)
    contender = next(c for c in CONTENDERS if c.name == name)
    model = random_base(base.config, dtype, device)
    _, step = training_step(contender, model, base)
    del model  # who has a copy of it needs it no more
    step()  # the optimizer has its state now
    return in_use(device) - before + peak_of(step, device)


def in_use(device: torch.device) -> int:
    """Bytes: of the process, or of its tensors on a GPU."""
    gc.collect()
    return resident("VmRSS") if device.type == "cpu" else torch.cuda.memory_allocated()
