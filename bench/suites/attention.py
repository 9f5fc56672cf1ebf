"""Attention over whole sequences: forward, backward, both, and the backward of the lowest adapted layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from ..clock import Clock, captured
from ..conditions import why_failed
from ..gate import why_wrong
from ..interleave import Times, measure
from ..ledger import Row
from ..probes import matrix_product
from ..problem import Problem, make_problem
from ..providers import ALONE, OURS, TWICE, Provider, prefill_providers
from ..runner import Job, Note, Options
from ..shapes import PREFILL, SMOKE_PREFILL, Shape

SCORE_BYTES = (
    24  # of a formula that keeps all its scores, in half and in full precision; twice that for backward
)
SCORES_AT_MOST = {"cpu": 4e9, "cuda": 16e9}
PROMPTS_ONLY = "backward, prompts only"  # what the lowest adapted layer of a frozen model wants
PRODUCT = "torch.mm, square"  # what the chip's arithmetic can do, measured in the same rounds
NO_PROMPTS = "no prompts"  # the ratio to the same kernel without them
PRODUCT_SHARE = "rate / torch.mm's"
MODES = {
    "cpu": ("forward", "forward+backward"),
    "cuda": ("forward", "backward", "forward+backward", PROMPTS_ONLY),
}


def jobs(options: Options) -> list[Job]:
    """One per shape, dtype, mode and state of the caches."""
    kind = options.device.type
    shapes = SMOKE_PREFILL if options.smoke else PREFILL[kind]
    found = []
    for shape in shapes:
        if not options.wants_shape(shape.name):
            continue
        for dtype in options.dtypes:
            for mode in MODES[kind]:
                for cold in options.cold:
                    title = f"attention, {shape.name}, {name_of(dtype)}, {mode}{', cold' if cold else ''}"
                    run = partial(rows, options, prefill_providers, shape, dtype, mode, cold, dtype)
                    found.append(Job(title, run))
    return found


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def usable(
    providers: Sequence[Provider], problem: Problem, backward: bool, options: Options, note: Note
) -> Iterator[Provider]:
    """Those that can run the problem and are right on its sibling; the others are named with their reason."""
    for provider in providers:
        if not options.wants_provider(provider.name):
            continue
        if provider.batches_only and problem.shape.batch == 1:
            continue
        if provider.compiles and not options.compiles(problem.shape.name, backward):
            continue
        scores = SCORE_BYTES * problem.shape.scores * (2 if backward else 1)
        if provider.quadratic and scores > SCORES_AT_MOST[problem.device.type]:
            note(f"{provider.name} left out of {problem.shape.name}: its scores take {scores / 1e9:.0f} GB")
        elif reason := provider.why_not(problem, backward):
            note(f"{provider.family} left out: {reason}")
        elif wrong := why_wrong(provider, problem, backward):
            note(f"{provider.name}, {problem.shape.name}, {name_of(problem.dtype)}: no figure, {wrong}")
        else:
            yield provider


def timed_call(provider: Provider, problem: Problem, mode: str) -> Callable[[], object]:
    """What the clock runs for a mode."""
    if mode in ("forward", "decode"):
        return provider.prepare(problem)
    tensors = [
        t.detach().requires_grad_(mode != PROMPTS_ONLY or i >= 3) for i, t in enumerate(problem.tensors)
    ]
    call = provider.prepare(problem.with_tensors(*tensors))
    leaves = [t for t in (tensors if provider.prompted else tensors[:3]) if t.requires_grad]
    out = call()
    grad_out = torch.randn_like(out)
    if mode == "forward+backward":
        return lambda: torch.autograd.grad(call(), leaves, grad_out)
    return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)


def prepared(
    providers: Iterator[Provider], problem: Problem, mode: str, note: Note
) -> dict[Provider, Callable[[], object]]:
    """The calls, each run once: what compiles has compiled, and what does not fit into memory is out."""
    calls = {}
    for provider in providers:
        if mode == PROMPTS_ONLY and not provider.prompted:
            continue
        try:
            call = timed_call(provider, problem, mode)
            call()
        except Exception as error:  # any: Triton's are not RuntimeErrors
            note(f"{provider.name}, {problem.shape.name}, {mode}: no figure, {why_failed(error)}")
            continue
        calls[provider] = call
    return calls


def rows(
    options: Options,
    providers: Callable[[], Sequence[Provider]],
    shape: Shape,
    dtype: torch.dtype,
    mode: str,
    cold: bool,
    product_dtype: torch.dtype,
    note: Note,
) -> Iterator[Row]:
    problem = make_problem(shape, dtype, options.device)
    backward = mode != "forward"
    calls = prepared(usable(providers(), problem, backward, options, note), problem, mode, note)
    if calls:
        product, product_flops = matrix_product(product_dtype, options.device)
        functions = {**{p.name: call for p, call in calls.items()}, PRODUCT: product}
        times = measure(functions, options.seconds, Clock(options.device, cold))
        for row in figures("attention", problem, mode, list(calls), times, cold):
            if row.tflops:  # in the same rounds: median of times, not of rates
                work = row.tflops * 1e9 * (row.p50_ms or 0.0)
                share = work / product_flops / times.ratio(row.provider, PRODUCT)
                row.figures[PRODUCT_SHARE] = share  # type: ignore[index]
            yield row
        seconds = times.median(PRODUCT)
        yield Row(
            suite="attention", shape=shape.name, sizes=shape.sizes, mode=mode, dtype=name_of(dtype), provider=PRODUCT,
            cache="cold" if cold else "warm", rounds=times.rounds, p20_ms=1e3 * times.quantile(PRODUCT, 0.2),
            p50_ms=1e3 * seconds, p80_ms=1e3 * times.quantile(PRODUCT, 0.8), tflops=product_flops / seconds / 1e12,
        )  # fmt: skip
    if options.device.type == "cuda" and not backward and not cold:
        yield from graph_rows(options, problem, calls, note)


def graph_rows(
    options: Options, problem: Problem, calls: dict[Provider, Callable[[], object]], note: Note
) -> Iterator[Row]:
    """The same calls as replays of CUDA graphs, without what launching costs the host."""
    graphs = {}
    for provider, call in calls.items():
        try:
            graphs[provider] = captured(call)
        except Exception as error:
            note(f"{provider.name} in a CUDA graph: no figure, {why_failed(error)}")
    if graphs:
        mode = "decode" if problem.is_decode else "forward"
        suite = "decode" if problem.is_decode else "attention"
        clock = Clock(options.device)
        times = measure({p.name: call for p, call in graphs.items()}, options.seconds, clock)
        yield from figures(suite, problem, mode, list(graphs), times, cold=False, launch="graph")


def figures(
    suite: str,
    problem: Problem,
    mode: str,
    providers: Sequence[Provider],
    times: Times,
    cold: bool,
    launch: str = "eager",
) -> Iterator[Row]:
    """Rows of what was timed: ratios to plain attention (the best of its kernels) and to SDPA twice + add."""
    shape = problem.shape
    floors = [p.name for p in providers if not p.prompted and not p.name.startswith("zinit")]
    for provider in providers:
        name, seconds = provider.name, times.median(provider.name)
        work = shape if provider.prompted else replace(shape, prompt_length=0)
        ratios = {"plain SDPA": times.ratio(name, *floors)} if floors else {}
        for other in (TWICE, f"{TWICE}, compiled", *(f"zinit {backend}" for backend in OURS)):
            if other in times.seconds and other != name:
                ratios[other] = times.ratio(name, other)
        if f"{name}{ALONE}" in times.seconds:
            ratios[NO_PROMPTS] = times.ratio(name, f"{name}{ALONE}")
        yield Row(
            suite=suite,
            shape=shape.name,
            sizes=shape.sizes,
            mode=mode,
            dtype=name_of(problem.dtype),
            provider=name,
            layout=problem.layout if problem.is_decode else "",
            launch=launch,
            cache="cold" if cold else "warm",
            rounds=times.rounds,
            p20_ms=1e3 * times.quantile(name, 0.2),
            p50_ms=1e3 * seconds,
            p80_ms=1e3 * times.quantile(name, 0.8),
            tflops=None if mode == PROMPTS_ONLY else work.flops(mode) / seconds / 1e12,
            gbps=shape.cache_bytes(problem.dtype.itemsize) / seconds / 1e9 if problem.is_decode else None,
            ratios=ratios,
        )
