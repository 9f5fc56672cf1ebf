"""The settings that the CPU kernels' goals are stated for, timed with the few others that the goals name.

Forward and backward stand beside float32's torch.mm whatever their dtype, decoding beside a plain read of the cache.
SDPA twice + add spends its time on fresh pages under glibc's default malloc, so its forward is also timed in a process
with a tuned one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from ..ledger import Row
from ..peak import in_fresh_process
from ..providers import ALONE, TWICE, Provider, decode_providers, prefill_providers
from ..runner import Job, Note, Options
from ..shapes import BARS_DECODE, BARS_PREFILL, SMOKE_DECODE, SMOKE_PREFILL, Shape
from . import attention, decode
from .attention import name_of

FUSED, FLOOR = "zinit cpu", "plain SDPA"
MODES = ("forward", "forward+backward")
TUNED = "forward, tuned malloc"
TUNED_MALLOC = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=8589934592"


def jobs(options: Options) -> list[Job]:
    """One per mode, dtype and shape, and per layout of the cache; those goals are for a CPU alone."""
    if options.device.type != "cpu":
        return []
    prefill_shapes = [
        s for s in (SMOKE_PREFILL[:1] if options.smoke else BARS_PREFILL) if options.wants_shape(s.name)
    ]
    decode_shapes = [
        s for s in (SMOKE_DECODE if options.smoke else BARS_DECODE) if options.wants_shape(s.name)
    ]
    found = [
        Job(
            f"bars, {mode}, {name_of(dtype)}, {shape.name}",
            partial(prefill_rows, options, mode, dtype, shape),
        )
        for mode in MODES
        for dtype in options.dtypes
        for shape in prefill_shapes
    ]
    found += [
        Job(
            f"bars, decode, {name_of(dtype)}, {shape.name}, {layout}",
            partial(decode_rows, options, dtype, shape, layout),
        )
        for dtype in options.dtypes
        for shape in decode_shapes
        for layout in decode.LAYOUTS
    ]
    if not options.smoke:  # a process of its own
        some = "".join(f", {part}" for part in options.only_shapes)  # --resume: these are not all of them
        found += [
            Job(f"bars, {TUNED}, {name_of(dtype)}{some}", partial(tuned_rows, options, dtype, prefill_shapes))
            for dtype in options.dtypes
        ]
    return found


def prefill_few() -> list[Provider]:
    return [p for p in prefill_providers() if p.name in (FUSED, FUSED + ALONE, FLOOR, TWICE)]


def prefill_pair() -> list[Provider]:
    return [p for p in prefill_few() if p.name != FUSED + ALONE]


def decode_few() -> list[Provider]:
    return [p for p in decode_providers() if p.name in (FUSED, FUSED + ALONE, TWICE)]


def prefill_rows(options: Options, mode: str, dtype: torch.dtype, shape: Shape, note: Note) -> Iterator[Row]:
    few = prefill_few if mode == "forward" else prefill_pair
    for row in attention.rows(options, few, shape, dtype, mode, False, torch.float32, note):
        yield replace(row, suite="bars")


def decode_rows(options: Options, dtype: torch.dtype, shape: Shape, layout: str, note: Note) -> Iterator[Row]:
    for row in decode.rows(options, decode_few, shape, dtype, layout, False, note):
        yield replace(row, suite="bars")


def tuned_rows(options: Options, dtype: torch.dtype, shapes: list[Shape], note: Note) -> Iterator[Row]:
    """What the rival gains when malloc keeps its pages; malloc reads its settings when a process starts."""
    found, said = in_fresh_process(
        rows_and_notes, options, dtype, shapes, torch.get_num_threads(), malloc=TUNED_MALLOC
    )
    for text in said:
        note(text)
    yield from (replace(row, mode=TUNED) for row in found if row.provider in (FUSED, TWICE))


def rows_and_notes(
    options: Options, dtype: torch.dtype, shapes: list[Shape], threads: int
) -> tuple[list[Row], list[str]]:
    torch.set_num_threads(threads)
    notes: list[str] = []
    return [
        r for shape in shapes for r in prefill_rows(options, "forward", dtype, shape, notes.append)
    ], notes
