"""Peak memory of attention: what a call takes beyond its inputs, beside what its outputs and gradients need anyway."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ..conditions import why_failed
from ..ledger import Row
from ..peak import in_fresh_process, peak_of
from ..problem import make_problem
from ..providers import ALONE, prefill_providers
from ..runner import Job, Note, Options
from ..shapes import SMOKE_PREFILL, Shape, prefill
from .attention import name_of, timed_call, usable

SHAPES = {
    "cpu": [prefill("LLaMA-7B", 1, 2048)],  # 5 s a figure: a process for each
    "cuda": [prefill("LLaMA-7B", max(1, 16384 // seqlen), seqlen) for seqlen in (512, 2048, 8192)],
}
MODES = ("forward", "forward+backward")
PEAK, NEEDED = "peak MB beyond inputs", "outputs and gradients MB"


def jobs(options: Options) -> list[Job]:
    """One per shape, dtype and mode."""
    shapes = SMOKE_PREFILL[:1] if options.smoke else SHAPES[options.device.type]
    return [
        Job(f"memory, {shape.name}, {name_of(dtype)}, {mode}", partial(rows, options, shape, dtype, mode))
        for shape in shapes
        if options.wants_shape(shape.name)
        for dtype in (options.dtypes[:1] if options.smoke else options.dtypes)
        for mode in (MODES[:1] if options.smoke else MODES)
    ]


def rows(options: Options, shape: Shape, dtype: torch.dtype, mode: str, note: Note) -> Iterator[Row]:
    problem = make_problem(shape, dtype, options.device)
    plain = [p for p in prefill_providers() if ALONE not in p.name and not p.name.startswith("plain SDPA,")]
    for provider in usable(plain, problem, mode != "forward", options, note):
        arguments = (provider.name, shape, dtype, options.device, mode, torch.get_num_threads())
        alone = options.device.type == "cpu" and not options.smoke
        try:
            peak, needed = (
                in_fresh_process(peak_and_needed, *arguments) if alone else peak_and_needed(*arguments)
            )
        except Exception as error:
            note(f"{provider.name}, {shape.name}: no figure, {why_failed(error)}")
            continue
        yield Row(
            "memory", shape.name, shape.sizes, mode, name_of(dtype), provider.name,
            figures={PEAK: peak / 1e6, NEEDED: needed / 1e6},
        )  # fmt: skip


def peak_and_needed(
    name: str, shape: Shape, dtype: torch.dtype, device: torch.device, mode: str, threads: int
) -> tuple[int, int]:
    """Bytes at the peak of the second call, and bytes of what it cannot do without: out, and all gradients."""
    torch.set_num_threads(threads)
    provider = next(p for p in prefill_providers() if p.name == name)
    problem = make_problem(shape, dtype, device)
    call = timed_call(provider, problem, mode)
    call()
    out = problem.query.nbytes
    tensors = problem.tensors if provider.prompted else problem.tensors[:3]
    needed = out if mode == "forward" else out + sum(t.nbytes for t in tensors)
    return peak_of(call, device), needed
