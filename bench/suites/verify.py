"""The clock itself: plain SDPA by this package's rounds and by torch.utils.benchmark, the same call in turns."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import torch
from torch.utils.benchmark import Timer

from ..clock import Clock
from ..interleave import measure
from ..ledger import Row
from ..problem import make_problem
from ..providers import plain_sdpa
from ..runner import Job, Note, Options
from ..shapes import SMOKE_PREFILL, Shape, decode, prefill
from .attention import name_of

SHAPES = {
    "cpu": [prefill("LLaMA-7B", 1, 128), prefill("LLaMA-7B", 1, 512), decode("LLaMA-7B", 1, 2048)],
    "cuda": [prefill("LLaMA-7B", 32, 512), prefill("LLaMA-7B", 8, 2048), decode("LLaMA-7B", 32, 4096)],
}
TURNS = 5  # of each: the machine's speed drifts by the second
FLOOR, THEIRS = "plain SDPA", "torch.utils.benchmark"


def jobs(options: Options) -> list[Job]:
    """One per shape and dtype."""
    shapes = SMOKE_PREFILL[:1] if options.smoke else SHAPES[options.device.type]
    return [
        Job(f"verify, {shape.name}, {name_of(dtype)}", partial(rows, options, shape, dtype))
        for shape in shapes
        if options.wants_shape(shape.name)
        for dtype in options.dtypes
    ]


def rows(options: Options, shape: Shape, dtype: torch.dtype, note: Note) -> Iterator[Row]:
    problem = make_problem(shape, dtype, options.device)
    call, clock = plain_sdpa(problem), Clock(options.device)
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    mine, theirs, rounds = [], [], 0
    for _ in range(1 if options.smoke else TURNS):
        times = measure({FLOOR: call}, options.seconds / TURNS / 2, clock)
        mine.append(times.median(FLOOR))
        theirs.append(timer.blocked_autorange(min_run_time=max(options.seconds / TURNS / 2, 1e-3)).median)
        rounds += times.rounds
    ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
    for name, found in ((FLOOR, mine), (THEIRS, theirs)):
        low, middle, high = (1e3 * torch.tensor(found).quantile(q).item() for q in (0.2, 0.5, 0.8))
        yield Row(
            suite="verify", shape=shape.name, sizes=shape.sizes, mode="decode" if problem.is_decode else "forward",
            dtype=name_of(dtype), provider=name, rounds=rounds, p20_ms=low, p50_ms=middle, p80_ms=high,
            ratios={THEIRS: ratio} if name == FLOOR else {},
        )  # fmt: skip
