"""The settings for which the CPU kernels' targets are stated, measured with the few providers that the targets name.

torch.mm is in float32 throughout, since the targets compare both dtypes with it. SDPA twice + add spends its time on
fresh pages under glibc's default malloc, so its forward is also measured in a process with a tuned one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from ..ledger import Row
from ..measure import in_fresh_process
from ..problem import SMOKE_DECODE, SMOKE_PREFILL, Provider, Shape, decode, name_of, prefill
from ..providers import PLAIN, TWICE, WITHOUT_PROMPTS, decode_providers, prefill_providers
from ..runner import Job, Note, Options, Select, Suite, Target, rows_of, speed_over
from .attention import (
    BOTH,
    FORWARD,
    ITSELF,
    LAYOUTS,
    PRODUCT_SHARE,
    READ,
    decode_rows,
    prefill_rows,
)

MHA, GROUPED = "LLaMA-7B", "Llama-3-8B"  # 32/32 and 32/8 heads
STATED_PREFILL = [
    shape
    for seqlen in (128, 512, 2048)
    for shape in (
        prefill(MHA, 1, seqlen),
        prefill(GROUPED, 1, seqlen),
        prefill("CLIP-B/16 text", 1 if seqlen == 2048 else 4, seqlen),
    )
]
STATED_DECODE = [decode(model, 1, seqlen) for model in (MHA, GROUPED) for seqlen in (512, 2048, 8192)]
DTYPES = ("float32", "bfloat16")
CPU = "zinit cpu"
TUNED = "forward, tuned malloc"
TUNED_MALLOC = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=8589934592"


def jobs(options: Options) -> list[Job]:
    """One per mode, dtype and shape, and per layout of the cache; on a CPU only, for which these targets are."""
    if options.device.type != "cpu":
        return []
    whole = [
        s for s in (SMOKE_PREFILL[:1] if options.smoke else STATED_PREFILL) if options.wants_shape(s.name)
    ]
    against_a_cache = [
        s for s in (SMOKE_DECODE if options.smoke else STATED_DECODE) if options.wants_shape(s.name)
    ]
    found = [
        Job(f"targets, {mode}, {name_of(dtype)}, {shape.name}", partial(whole_rows, options, mode, dtype, shape))
        for mode in (FORWARD, BOTH)
        for dtype in options.dtypes
        for shape in whole
    ]  # fmt: skip
    found += [
        Job(
            f"targets, decode, {name_of(dtype)}, {shape.name}, {layout}",
            partial(cache_rows, options, dtype, shape, layout),
        )
        for dtype in options.dtypes
        for shape in against_a_cache
        for layout in LAYOUTS
    ]
    if not options.smoke:  # it starts a process
        # in the title, since --resume must not take some shapes for all
        some = "".join(f", {part}" for part in options.only_shapes)
        found += [
            Job(f"targets, {TUNED}, {name_of(dtype)}{some}", partial(tuned_rows, options, dtype, whole))
            for dtype in options.dtypes
        ]
    return found


def named(providers: Sequence[Provider], *names: str) -> list[Provider]:
    return [provider for provider in providers if provider.name in names]


def whole_rows(options: Options, mode: str, dtype: torch.dtype, shape: Shape, note: Note) -> Iterator[Row]:
    itself = (f"{CPU}{WITHOUT_PROMPTS}",) if mode == FORWARD else ()

    def providers() -> list[Provider]:
        return named(prefill_providers(), CPU, PLAIN, TWICE, *itself)

    for row in prefill_rows(options, providers, shape, dtype, mode, False, torch.float32, note):
        yield replace(row, suite="targets")


def cache_rows(options: Options, dtype: torch.dtype, shape: Shape, layout: str, note: Note) -> Iterator[Row]:
    def providers() -> list[Provider]:
        return named(decode_providers(), CPU, f"{CPU}{WITHOUT_PROMPTS}", TWICE)

    for row in decode_rows(options, providers, shape, dtype, layout, False, note):
        yield replace(row, suite="targets")


def tuned_rows(options: Options, dtype: torch.dtype, shapes: list[Shape], note: Note) -> Iterator[Row]:
    """What SDPA twice + add gains when malloc keeps its pages; malloc reads its settings when a process starts."""
    found, said = in_fresh_process(
        rows_and_notes, options, dtype, shapes, torch.get_num_threads(), malloc=TUNED_MALLOC
    )
    for text in said:
        note(text)
    yield from (replace(row, mode=TUNED) for row in found if row.provider in (CPU, TWICE))


def rows_and_notes(
    options: Options, dtype: torch.dtype, shapes: list[Shape], threads: int
) -> tuple[list[Row], list[str]]:
    torch.set_num_threads(threads)
    notes: list[str] = []
    rows = [r for shape in shapes for r in whole_rows(options, FORWARD, dtype, shape, notes.append)]
    return rows, notes


def of_length(mode: str, dtype: str, *lengths: int) -> Select:
    """All heads at these lengths."""
    return rows_of(CPU, "targets", mode, *(f"T {length}" for length in lengths), dtype=dtype)


def of_cache(model: str, dtype: str, *lengths: int) -> Select:
    shapes = (f"{model}, B 1, S {length}" for length in lengths)
    return rows_of(CPU, "targets", "decode", *shapes, dtype=dtype)


def product_share(row: Row, rows: Sequence[Row]) -> float | None:
    return row.figures.get(PRODUCT_SHARE)


# The bounds were first stated as ratios of times, which is why they are written as fractions of 1.
TARGETS = (
    *(
        Target(f"{dtype} forward, T = {name}: times as fast as {PLAIN}", of_length(FORWARD, dtype, *lengths),
               speed_over(PLAIN), 1 / ratio)
        for name, lengths, ratios in (("128, 512", (128, 512), (0.55, 0.50)), ("2048", (2048,), (0.80, 0.80)))
        for dtype, ratio in zip(DTYPES, ratios, strict=True)
    ),
    *(
        Target(f"{dtype} forward + backward, T = {length}: times as fast as {PLAIN}", of_length(BOTH, dtype, length),
               speed_over(PLAIN), 1 / ratio)
        for length, ratios in ((128, (0.85, 0.18)), (512, (0.58, 0.10)), (2048, (0.75, 0.13)))
        for dtype, ratio in zip(DTYPES, ratios, strict=True)
    ),
    *(
        Target(f"{dtype} forward, T >= 512: {PRODUCT_SHARE} in float32", of_length(FORWARD, dtype, 512, 2048),
               product_share, bound)
        for dtype, bound in zip(DTYPES, (0.75, 0.80), strict=True)
    ),
    *(
        Target(f"{dtype} decode, {name}: times as fast as {TWICE}", of_cache(model, dtype, 512, 2048, 8192),
               speed_over(TWICE), bound)
        for name, model, bounds in (("MHA", MHA, (1.7, 8.0)), ("32/8 heads", GROUPED, (3.5, 28.0)))
        for dtype, bound in zip(DTYPES, bounds, strict=True)
    ),
    *(
        Target(f"{dtype} decode, {name}, 8192 keys: times as fast as a {READ}", of_cache(model, dtype, 8192),
               speed_over(READ), 1 / ratio)
        for name, model, ratios in (("MHA", MHA, (1.3, 1.4)), ("32/8 heads", GROUPED, (1.8, 2.0)))
        for dtype, ratio in zip(DTYPES, ratios, strict=True)
    ),
    *(
        Target(f"{dtype} forward, {name}: times as fast as without prompts", of_length(FORWARD, dtype, *lengths),
               speed_over(ITSELF), 1 / ratio)
        for name, lengths, ratio in (("T = 128", (128,), 1.12), ("T >= 512", (512, 2048), 1.05))
        for dtype in DTYPES
    ),
    *(
        Target(f"{dtype} decode, 2048 keys and more: times as fast as without prompts",
               rows_of(CPU, "targets", "decode", "S 2048", "S 8192", dtype=dtype), speed_over(ITSELF), 1 / 1.06)
        for dtype in DTYPES
    ),
)  # fmt: skip
SUITES = (
    Suite(
        "targets",
        "The settings for which the CPU kernels' targets are stated. torch.mm is in float32 throughout.",
        jobs,
        targets={"cpu": TARGETS},
        by_shape=True,
    ),
)
