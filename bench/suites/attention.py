"""Attention alone: the time of whole sequences (suite attention), of one token against a cache (decode), and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from ..correctness import why_wrong
from ..ledger import Row
from ..machine import device_copy, matrix_product, peak_arithmetic, peak_read, plain_read, why_failed
from ..measure import Clock, Times, captured, in_fresh_process, measure, peak_of
from ..problem import (
    DECODE,
    MEMORY,
    PREFILL,
    SMOKE_DECODE,
    SMOKE_PREFILL,
    Problem,
    Provider,
    Shape,
    make_problem,
    name_of,
)
from ..providers import (
    BACKENDS,
    EACH,
    PLAIN,
    TWICE,
    WITHOUT_PROMPTS,
    decode_providers,
    prefill_providers,
)
from ..runner import Chart, Comparison, Job, Note, Options, Select, Suite, Target, rows_of, speed_over

FORWARD, BOTH = "forward", "forward+backward"
PROMPTS_ONLY = "backward, prompts only"  # what the lowest adapted layer of a frozen model needs
MODES = {"cpu": (FORWARD, BOTH), "cuda": (FORWARD, "backward", BOTH, PROMPTS_ONLY)}
LAYOUTS = ("head-major", "token-major")

# measured in the same rounds: what torch reaches, and what the chip can do at most
PRODUCT, PEAK = "torch.mm, square", "peak arithmetic"
READ, PEAK_READ, COPY = "plain read of the cache", "peak read", "copy of as many bytes"
TRANSFER = {"cpu": READ, "cuda": COPY}
ITSELF = "no prompts"  # in a row's ratios: the same kernel without prompts
PRODUCT_SHARE = "rate / torch.mm's"
PEAK_MB, NEEDED_MB = "peak MB beyond inputs", "outputs and gradients MB"

# bytes per score of a formula that keeps its scores in half and in full precision; twice that for backward
SCORE_BYTES = 24
SCORES_AT_MOST = {"cpu": 4e9, "cuda": 16e9}


def attention_jobs(options: Options) -> list[Job]:
    """One per shape, dtype, mode and state of the caches."""
    kind = options.device.type
    return [
        Job(
            f"attention, {shape.name}, {name_of(dtype)}, {mode}{', cold' if cold else ''}",
            partial(prefill_rows, options, prefill_providers, shape, dtype, mode, cold, dtype),
        )
        for shape in (SMOKE_PREFILL if options.smoke else PREFILL[kind])
        if options.wants_shape(shape.name)
        for dtype in options.dtypes
        for mode in MODES[kind]
        for cold in options.cold
    ]


def decode_jobs(options: Options) -> list[Job]:
    """One per shape, dtype, layout of the cache and state of the chip's caches."""
    return [
        Job(
            f"decode, {shape.name}, {name_of(dtype)}, {layout}{', cold' if cold else ''}",
            partial(decode_rows, options, decode_providers, shape, dtype, layout, cold),
        )
        for shape in (SMOKE_DECODE if options.smoke else DECODE[options.device.type])
        if options.wants_shape(shape.name)
        for dtype in options.dtypes
        for layout in LAYOUTS
        for cold in options.cold
    ]


def memory_jobs(options: Options) -> list[Job]:
    """One per shape, dtype and mode."""
    shapes = SMOKE_PREFILL[:1] if options.smoke else MEMORY[options.device.type]
    return [
        Job(f"memory, {shape.name}, {name_of(dtype)}, {mode}", partial(memory_rows, options, shape, dtype, mode))
        for shape in shapes
        if options.wants_shape(shape.name)
        for dtype in (options.dtypes[:1] if options.smoke else options.dtypes)
        for mode in ((FORWARD,) if options.smoke else (FORWARD, BOTH))
    ]  # fmt: skip


def usable(
    providers: Sequence[Provider], problem: Problem, backward: bool, options: Options, note: Note
) -> Iterator[Provider]:
    """Those that can run the problem and are right on its sibling; the user is told why the others are left out."""
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
    """What is timed in a mode."""
    if mode in (FORWARD, "decode"):
        return provider.prepare(problem)
    tensors = [
        t.detach().requires_grad_(mode != PROMPTS_ONLY or i >= 3) for i, t in enumerate(problem.tensors)
    ]
    call = provider.prepare(problem.with_tensors(*tensors))
    leaves = [t for t in (tensors if provider.prompted else tensors[:3]) if t.requires_grad]
    out = call()
    grad_out = torch.randn_like(out)
    if mode == BOTH:
        return lambda: torch.autograd.grad(call(), leaves, grad_out)
    return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)


def prepared(
    providers: Iterator[Provider], problem: Problem, mode: str, note: Note
) -> dict[Provider, Callable[[], object]]:
    """The calls, each run once: whatever compiles has compiled, and what does not fit into memory is left out."""
    calls = {}
    for provider in providers:
        if mode == PROMPTS_ONLY and not provider.prompted:
            continue
        try:
            call = timed_call(provider, problem, mode)
            call()
        except Exception as error:  # any: Triton's errors are not RuntimeErrors
            note(f"{provider.name}, {problem.shape.name}, {mode}: no figure, {why_failed(error)}")
            continue
        calls[provider] = call
    return calls


def prefill_rows(
    options: Options,
    providers: Callable[[], Sequence[Provider]],
    shape: Shape,
    dtype: torch.dtype,
    mode: str,
    cold: bool,
    product_dtype: torch.dtype,
    note: Note,
) -> Iterator[Row]:
    """The providers' rows of one setting, torch.mm's in `product_dtype`, and on a CPU the peak in `dtype`."""
    problem = make_problem(shape, dtype, options.device)
    calls = prepared(usable(providers(), problem, mode != FORWARD, options, note), problem, mode, note)
    if not calls:
        return
    product, product_flops = matrix_product(product_dtype, options.device)
    limits = {PRODUCT: (product, product_flops)}
    if options.device.type == "cpu":
        if peak := peak_arithmetic(dtype):
            limits[PEAK] = peak
        else:
            note("the peak arithmetic is not measured: there is no C++ compiler (g++, or CXX)")
    times = timed(options, calls, limits, cold)
    for row in figures("attention", problem, mode, list(calls), times, cold):
        if row.tflops:  # a ratio within the rounds: the median of times, not of rates
            work = row.tflops * 1e9 * (row.p50_ms or 0.0)
            share = work / product_flops / times.ratio(row.provider, PRODUCT)
            row.figures[PRODUCT_SHARE] = share  # type: ignore[index]
        yield row
    for name, (_, flops) in limits.items():
        seconds = times.quantile(name, 0.0) if name == PEAK else times.median(name)
        yield limit_row("attention", problem, mode, name, times, cold, tflops=flops / seconds / 1e12)
    if options.device.type == "cuda" and mode == FORWARD and not cold:
        yield from graph_rows(options, problem, calls, note)


def decode_rows(
    options: Options,
    providers: Callable[[], Sequence[Provider]],
    shape: Shape,
    dtype: torch.dtype,
    layout: str,
    cold: bool,
    note: Note,
) -> Iterator[Row]:
    """The providers' rows of one setting, and what it takes to move as many bytes as the cache holds."""
    problem = make_problem(shape, dtype, options.device, layout)
    calls = prepared(usable(providers(), problem, False, options, note), problem, "decode", note)
    if not calls:
        return
    held, on_gpu = shape.cache_bytes(dtype.itemsize), options.device.type == "cuda"
    if on_gpu:
        limits = {COPY: (device_copy(held, options.device), float(held))}
    else:
        stored = (problem.key, problem.value)
        if layout == "token-major":
            stored = tuple(t.transpose(1, 2) for t in stored)
        limits = {READ: (plain_read(*stored), float(held))}
        if peak := peak_read(held):
            limits[PEAK_READ] = peak
    times = timed(options, calls, limits, cold)
    for name, (_, moved) in limits.items():
        seconds = times.quantile(name, 0.0) if name == PEAK_READ else times.median(name)
        yield limit_row("decode", problem, "decode", name, times, cold, gbps=moved / seconds / 1e9)
    transfer = TRANSFER[options.device.type]
    for row in figures("decode", problem, "decode", list(calls), times, cold):
        row.ratios[transfer] = times.ratio(row.provider, transfer)  # type: ignore[index]
        yield row
    if on_gpu and not cold:
        yield from graph_rows(options, problem, calls, note)


def memory_rows(options: Options, shape: Shape, dtype: torch.dtype, mode: str, note: Note) -> Iterator[Row]:
    """Peak memory of each provider, on a CPU in a process of its own."""
    problem = make_problem(shape, dtype, options.device)
    chosen = [
        p for p in prefill_providers() if WITHOUT_PROMPTS not in p.name and not p.name.startswith(f"{PLAIN},")
    ]
    for provider in usable(chosen, problem, mode != FORWARD, options, note):
        arguments = (provider.name, shape, dtype, options.device, mode, torch.get_num_threads())
        alone = options.device.type == "cpu" and not options.smoke
        try:
            peak, needed = (
                in_fresh_process(peak_and_needed, *arguments) if alone else peak_and_needed(*arguments)
            )
        except Exception as error:  # any: a process that is killed for its memory raises BrokenProcessPool
            note(f"{provider.name}, {shape.name}: no figure, {why_failed(error)}")
            continue
        figures = {PEAK_MB: peak / 1e6, NEEDED_MB: needed / 1e6}
        yield Row(
            "memory", shape.name, shape.sizes, mode, name_of(dtype), provider.name, figures=figures
        )  # fmt: skip


def peak_and_needed(
    name: str, shape: Shape, dtype: torch.dtype, device: torch.device, mode: str, threads: int
) -> tuple[int, int]:
    """Bytes at the peak of the second call, and bytes that no provider can do without: out, and all gradients."""
    torch.set_num_threads(threads)
    provider = next(p for p in prefill_providers() if p.name == name)
    problem = make_problem(shape, dtype, device)
    call = timed_call(provider, problem, mode)
    call()
    out = problem.query.nbytes
    tensors = problem.tensors if provider.prompted else problem.tensors[:3]
    needed = out if mode == FORWARD else out + sum(t.nbytes for t in tensors)
    return peak_of(call, device), needed


def timed(
    options: Options,
    calls: dict[Provider, Callable[[], object]],
    limits: dict[str, tuple[Callable[[], object], float]],
    cold: bool,
) -> Times:
    """The calls and the limits in turns. The peaks are timed before and after the rounds instead.

    A peak starts threads, and the peak read has a buffer of its own. Within the rounds they slowed calls of 0.07 to
    0.4 ms, whose cache would have stayed in the last level, by 20 to 40 % (2-core Zen 5).
    """
    clock = Clock(options.device, cold)
    peaks = {name: call for name, (call, _) in limits.items() if name in (PEAK, PEAK_READ)}
    functions = {p.name: call for p, call in calls.items()}
    functions |= {name: call for name, (call, _) in limits.items() if name not in peaks}
    before = measure(peaks, options.seconds / 8, clock).seconds if peaks else {}
    times = measure(functions, options.seconds, clock).seconds
    after = measure(peaks, options.seconds / 8, clock).seconds if peaks else {}
    return Times({**times, **{name: before[name] + after[name] for name in peaks}})


def limit_row(
    suite: str, problem: Problem, mode: str, name: str, times: Times, cold: bool, **rate: float
) -> Row:
    """The row of what the machine itself can do. A peak's rate is that of its fastest round."""
    return Row(
        suite, problem.shape.name, problem.shape.sizes, mode, name_of(problem.dtype), name,
        layout=problem.layout if problem.is_decode else "", cache="cold" if cold else "warm", **times.in_ms(name),
        **rate,
    )  # fmt: skip


def graph_rows(
    options: Options, problem: Problem, calls: dict[Provider, Callable[[], object]], note: Note
) -> Iterator[Row]:
    """The same calls as replays of CUDA graphs: without what launching costs the host."""
    graphs = {}
    for provider, call in calls.items():
        try:
            graphs[provider] = captured(call)
        except Exception as error:  # any: the others have figures to give
            note(f"{provider.name} in a CUDA graph: no figure, {why_failed(error)}")
    if graphs:
        suite, mode = ("decode", "decode") if problem.is_decode else ("attention", FORWARD)
        times = timed(options, graphs, {}, cold=False)
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
    """A row for each provider, with its ratios to plain attention (the fastest kernel of each round) and others."""
    shape = problem.shape
    plain = [p.name for p in providers if not p.prompted and not p.name.startswith("zinit")]
    for provider in providers:
        name, seconds = provider.name, times.median(provider.name)
        work = shape if provider.prompted else replace(shape, prompt_length=0)
        ratios = {PLAIN: times.ratio(name, *plain)} if plain else {}
        for other in (TWICE, f"{TWICE}, compiled", *(f"zinit {backend}" for backend in BACKENDS)):
            if other in times.seconds and other != name:
                ratios[other] = times.ratio(name, other)
        if f"{name}{WITHOUT_PROMPTS}" in times.seconds:
            ratios[ITSELF] = times.ratio(name, f"{name}{WITHOUT_PROMPTS}")
        yield Row(
            suite, shape.name, shape.sizes, mode, name_of(problem.dtype), name,
            layout=problem.layout if problem.is_decode else "", launch=launch, cache="cold" if cold else "warm",
            tflops=None if mode == PROMPTS_ONLY else work.flops(mode) / seconds / 1e12,
            gbps=shape.cache_bytes(problem.dtype.itemsize) / seconds / 1e9 if problem.is_decode else None,
            ratios=ratios, **times.in_ms(name),
        )  # fmt: skip


def rate(row: Row, rows: Sequence[Row]) -> float | None:
    return row.tflops


def microseconds(row: Row, rows: Sequence[Row]) -> float | None:
    return None if row.p50_ms is None else 1e3 * row.p50_ms


def share_of_full_backward(row: Row, rows: Sequence[Row]) -> float | None:
    """Its time over that of the whole backward pass."""
    wanted = (row.shape, row.dtype, row.provider, row.cache, row.launch, "backward")
    full = [r.p50_ms for r in rows if (r.shape, r.dtype, r.provider, r.cache, r.launch, r.mode) == wanted]
    return row.p50_ms / full[-1] if full and full[-1] and row.p50_ms else None


def peak_over_needed(row: Row, rows: Sequence[Row]) -> float | None:
    return row.figures[PEAK_MB] / row.figures[NEEDED_MB]


def over_the_fastest_other(row: Row, rows: Sequence[Row]) -> float | None:
    """How many times as fast as the fastest other provider that computes the prompts too, in each round."""
    speeds = (r.ratios.get(row.provider) for r in rows if r.setting == row.setting and r.provider in PROMPTED)
    return min((speed for speed in speeds if speed), default=None)


def plain_rows(provider: str, mode: str) -> Select:
    """A provider's rows in every suite that measures attention, called from Python with warm caches."""
    suites = ("attention", "decode", "targets")
    return lambda row: (row.provider, row.mode) == (provider, mode) and row.suite in suites and row.is_plain


def comparisons(backend: str, title: str, readme_rows: Mapping[str, int]) -> list[Comparison]:
    """A backend against the others, over every shape measured; `readme_rows` are its modes' places in the README."""
    modes = (FORWARD, BOTH, "decode")
    ours = {mode: plain_rows(f"zinit {backend}", mode) for mode in modes}
    no_prompts, transfer = f"{PLAIN} (no prompts)", TRANSFER["cpu" if backend == "cpu" else "cuda"]
    fastest = ("the fastest other that has prompts", over_the_fastest_other)
    plain, twice = (no_prompts, speed_over(PLAIN)), (TWICE, speed_over(TWICE))
    itself = ("itself without prompts", speed_over(ITSELF))
    lines = [(FORWARD, plain), (BOTH, plain), ("decode", twice), *((mode, fastest) for mode in modes)]
    lines += [
        (FORWARD, twice),
        (BOTH, twice),
        ("decode", plain),
        ("decode", (f"a {transfer}", speed_over(transfer))),
    ]
    lines += [(FORWARD, itself), ("decode", itself)]
    return [
        Comparison(
            f"{title}{mode.replace('+', ' + ')}",
            other,
            ours[mode],
            speed,
            readme_rows.get(mode, 0) if i < 3 else 0,
        )
        for i, (mode, (other, speed)) in enumerate(lines)
    ]


PROMPTED = {
    provider.name
    for provider in (*prefill_providers(), *decode_providers())
    if provider.prompted and not provider.name.startswith("zinit")
}
COMPARISONS = {
    "cpu": comparisons("cpu", "", {FORWARD: 1, BOTH: 2, "decode": 3}),
    "cuda": comparisons("triton", "Triton, ", {FORWARD: 1, BOTH: 2})
    + comparisons("cuda", "CUDA, ", {"decode": 3}),
}
TRITON, CUDA = "zinit triton", "zinit cuda"
LLAMA = {T: f"LLaMA-7B, B {16384 // T}, T {T}" for T in (512, 1024, 2048, 4096, 8192)}
LONG = [LLAMA[T] for T in (1024, 2048, 4096, 8192)]
BIG_CACHES = ("LLaMA-7B, B 32, S 4096", "Llama-3-8B, B 64, S 8192")
# 32 query heads on 8 key heads: with 32 key heads, reading 4096 of them takes 14 us at 4.8 TB/s
ONE_STREAM = {S: f"Llama-3-8B, B 1, S {S}" for S in (1024, 4096, 16384)}


ATTENTION_TARGETS = (
    *(
        Target(f"Triton forward, T = {T}: TFLOP/s", rows_of(TRITON, "attention", FORWARD, LLAMA[T]), rate, bound)
        for T, bound in ((512, 300), (1024, 380), (2048, 430), (4096, 460), (8192, 480))
    ),
    Target("Triton forward: times as fast as the best plain SDPA",
           rows_of(TRITON, "attention", FORWARD, *LLAMA.values()), speed_over(PLAIN), 1 / 1.10),
    *(
        Target(f"Triton forward, T = {T}: times as fast as {TWICE}", rows_of(TRITON, "attention", FORWARD, LLAMA[T]),
               speed_over(TWICE, f"{TWICE}, compiled"), 1 / ratio)
        for T, ratio in ((512, 0.60), (2048, 0.85))
    ),
    Target("Triton backward, T = 1024 to 8192: times as fast as the best plain SDPA",
           rows_of(TRITON, "attention", "backward", *LONG), speed_over(PLAIN), 1 / 1.20),
    Target("Triton backward of the lowest adapted layer: share of a full backward's time",
           rows_of(TRITON, "attention", PROMPTS_ONLY, *LLAMA.values()), share_of_full_backward, 0.15, at_most=True),
    Target("CUDA forward, T = 2048: times as fast as Triton", rows_of(CUDA, "attention", FORWARD, LLAMA[2048]),
           speed_over(TRITON), 0.60),
)  # fmt: skip
DECODE_TARGETS = (
    Target("Triton decode, B = 32, S = 4096: share of the copy's bandwidth",
           rows_of(TRITON, "decode", "decode", "LLaMA-7B, B 32, S 4096", "Llama-3-8B, B 32, S 4096"),
           speed_over(COPY), 0.80),
    Target("CUDA decode, big caches: share of the copy's bandwidth", rows_of(CUDA, "decode", "decode", *BIG_CACHES),
           speed_over(COPY), 0.88),
    *(
        Target(f"CUDA decode, one stream, S = {S}, in a graph: us",
               rows_of(CUDA, "decode", "decode", ONE_STREAM[S], launch="graph"), microseconds, bound, at_most=True)
        for S, bound in ((1024, 7), (4096, 9), (16384, 24))
    ),
    Target(f"CUDA decode, one stream: times as fast as {TWICE}",
           rows_of(CUDA, "decode", "decode", *ONE_STREAM.values()), speed_over(TWICE), 1 / 0.5),
    Target("CUDA decode: times as fast as without prompts",
           rows_of(CUDA, "decode", "decode", *ONE_STREAM.values(), *BIG_CACHES), speed_over(ITSELF), 1 / 1.03),
    Target("CUDA decode, an adapter for each sequence: times as fast as one for all",
           rows_of(f"{CUDA}{EACH}", "decode", "decode", "Llama-3-8B, B 64, S 8192"), speed_over(CUDA), 1 / 1.05),
)  # fmt: skip
MEMORY_TARGETS = (
    Target("Triton peak memory / outputs and gradients", rows_of(TRITON, "memory", BOTH, *LLAMA.values()),
           peak_over_needed, 1.02, at_most=True),
)  # fmt: skip
SUITES = (
    Suite(
        "attention",
        "Attention over whole sequences, with 10 prompts unless the shape says otherwise.",
        attention_jobs,
        targets={"cuda": ATTENTION_TARGETS},
        comparisons=COMPARISONS,
        by_shape=True,
    ),
    Suite(
        "decode",
        "Attention of one new token in each of B sequences, against S keys in the cache, by the cache's layout in "
        "memory.",
        decode_jobs,
        targets={"cuda": DECODE_TARGETS},
        by_shape=True,
    ),
    Suite(
        "memory",
        "Peak memory of attention beyond its inputs, beside the bytes that its outputs and gradients take.",
        memory_jobs,
        targets={"cuda": MEMORY_TARGETS},
        charts=(
            Chart(
                PEAK_MB,
                f"Attention with prompts takes {{}} times the memory of {TWICE}",
                "zinit cpu",
                TWICE,
                higher_is_better=False,
                reference=NEEDED_MB,
            ),
        ),
    ),
)
