"""Decoding: one new token per sequence against a cache, and how near that is to reading the cache at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from ..clock import Clock
from ..interleave import measure
from ..ledger import Row
from ..probes import device_copy, plain_read
from ..problem import Problem, make_problem
from ..providers import Provider, decode_providers
from ..runner import Job, Note, Options
from ..shapes import DECODE, SMOKE_DECODE, Shape
from .attention import figures, graph_rows, name_of, prepared, usable

LAYOUTS = ("head-major", "token-major")
PROBE = {"cpu": "plain read of the cache", "cuda": "copy of as many bytes"}


def jobs(options: Options) -> list[Job]:
    """One per shape, dtype, layout of the cache and state of the caches of the chip."""
    found = []
    for shape in SMOKE_DECODE if options.smoke else DECODE[options.device.type]:
        if not options.wants_shape(shape.name):
            continue
        for dtype in options.dtypes:
            for layout in LAYOUTS:
                for cold in options.cold:
                    title = f"decode, {shape.name}, {name_of(dtype)}, {layout}{', cold' if cold else ''}"
                    run = partial(rows, options, decode_providers, shape, dtype, layout, cold)
                    found.append(Job(title, run))
    return found


def probe(problem: Problem) -> Callable[[], object]:
    """Moves as many bytes as the cache has, as fast as this machine can."""
    if problem.device.type == "cuda":
        return device_copy(problem.shape.cache_bytes(problem.dtype.itemsize), problem.device)
    stored = (problem.key, problem.value)
    if problem.layout == "token-major":
        stored = tuple(t.transpose(1, 2) for t in stored)
    return plain_read(*stored)


def rows(
    options: Options,
    providers: Callable[[], Sequence[Provider]],
    shape: Shape,
    dtype: torch.dtype,
    layout: str,
    cold: bool,
    note: Note,
) -> Iterator[Row]:
    problem = make_problem(shape, dtype, options.device, layout)
    calls = prepared(usable(providers(), problem, False, options, note), problem, "decode", note)
    if not calls:
        return
    name = PROBE[options.device.type]
    functions = {**{p.name: call for p, call in calls.items()}, name: probe(problem)}
    times = measure(functions, options.seconds, Clock(options.device, cold))
    seconds = times.median(name)
    yield Row(
        suite="decode", shape=shape.name, sizes=shape.sizes, mode="decode", dtype=name_of(dtype), provider=name,
        layout=layout, cache="cold" if cold else "warm", rounds=times.rounds, p20_ms=1e3 * times.quantile(name, 0.2),
        p50_ms=1e3 * seconds, p80_ms=1e3 * times.quantile(name, 0.8),
        gbps=shape.cache_bytes(dtype.itemsize) / seconds / 1e9,
    )  # fmt: skip
    for row in figures("decode", problem, "decode", list(calls), times, cold):
        row.ratios[name] = times.ratio(row.provider, name)  # type: ignore[index]
        yield row
    if options.device.type == "cuda" and not cold:
        yield from graph_rows(options, problem, calls, note)
