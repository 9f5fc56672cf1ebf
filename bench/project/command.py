"""`python -m bench project`: what the Triton kernels would take on a chip, projected from their machine code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from zinit_kernels.backends.triton import configs

from ..ledger import Row
from ..problem import DECODE, PREFILL, PROMPTS, Shape
from ..providers import PLAIN, TWICE
from ..runner import targets_table
from ..suites.attention import ATTENTION_TARGETS, COPY, DECODE_TARGETS, PROMPTS_ONLY, TRITON
from . import launches, published, tutorial
from .chips import CHIPS, COPY_SHARE, LAUNCH_SECONDS, TILED, Chip
from .model import Launch, Projection, project

LABEL = "projection, no GPU has run this"


class Projected(NamedTuple):
    """A mode of a benchmark at a shape, with its launches."""

    mode: str
    shape: Shape
    parts: list[tuple[Launch, Projection]]

    @property
    def seconds(self) -> float:
        return sum(projection.seconds for _, projection in self.parts)


def shapes_of(mode: str, names: Sequence[str] = ()) -> list[Shape]:
    """The GPU benchmarks' shapes with the usual number of prompts.

    names: parts of the names of the wanted ones; none: all.
    """
    every = DECODE["cuda"] if mode == "decode" else PREFILL["cuda"]
    return [
        shape for shape in every
        if shape.prompt_length == PROMPTS
        and (not names or any(name.lower() in shape.name.lower() for name in names))
    ]  # fmt: skip


def projected(chip: Chip, modes: Sequence[str], names: Sequence[str]) -> list[Projected]:
    """names: as in `shapes_of`."""
    return [
        Projected(
            mode, shape, [(launch, project(launch, chip)) for launch in launches.launches(mode, shape, chip)]
        )
        for mode in modes
        for shape in shapes_of(mode, names)
    ]


def _table(title: str, columns: Iterable[str], right: Sequence[str] = ()) -> Table:
    """right: the columns that are justified there."""
    table = Table(title=f"{title}: {LABEL}", box=None, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left")
    return table


def kernels_table(found: Iterable[Projected], chip: Chip) -> Table:
    """A line per launch. share: of the tensor peak, or of the memory bandwidth where the kernel has few products."""
    numbers = ("us", "TFLOP/s", "GB/s", "share of the roof")
    columns = ("shape", "kernel", "blocks/SM", "bound by", "busiest unit", *numbers)
    table = _table(chip.name, columns, right=("blocks/SM", *numbers))
    for call in found:
        for launch, projection in call.parts:
            table.add_row(call.shape.name, launch.kernel.name, *cells(launch, projection, chip))
        if len(call.parts) > 1:
            rate = call.shape.flops(call.mode) / call.seconds / 1e12
            table.add_row(
                call.shape.name, call.mode, "", "", "", f"{1e6 * call.seconds:.1f}", f"{rate:.0f}", "", ""
            )
    return table


def cells(launch: Launch, projection: Projection, chip: Chip) -> list[str]:
    seconds = projection.seconds
    tensor = launch.flops / seconds / chip.tensor_peak
    memory = launch.dram_bytes / seconds / chip.dram_bandwidth
    busy = projection.bounds[projection.busiest] / seconds
    return [
        projection.bound, f"{projection.busiest} {busy:.2f}", str(projection.blocks), f"{1e6 * seconds:.1f}",
        f"{launch.flops / seconds / 1e12:.0f}", f"{launch.dram_bytes / seconds / 1e9:.0f}",
        f"{'tensor' if tensor > memory else 'DRAM'} {max(tensor, memory):.2f}",
    ]  # fmt: skip


def rows(found: Iterable[Projected], chip: Chip) -> list[Row]:
    """As benchmarks write them, for the targets. Others' times are published ones, or bytes at a copy's rate."""
    result = []
    copy = chip.dram_bandwidth * COPY_SHARE
    for call in found:
        shape, seconds, ratios = call.shape, call.seconds, {}
        suite = "decode" if call.mode == "decode" else "attention"
        if call.mode == "decode":
            ratios[COPY] = seconds / (shape.cache_bytes(launches.ITEM) / copy)
        elif plain := published.sdpa_seconds(shape, call.mode == "backward", chip.name):
            ratios[PLAIN] = seconds / plain
            if (
                call.mode == "forward"
            ):  # the prompts read q and write out; the sum reads two outputs, writes one
                passes = 5 * shape.batch * shape.heads_q * shape.seqlen_q * shape.head_dim * launches.ITEM
                ratios[TWICE] = seconds / (plain + passes / copy + 2 * LAUNCH_SECONDS)
        flops = shape.flops(call.mode)
        result.append(
            Row(suite, shape.name, shape.sizes, call.mode, "bfloat16", TRITON, tflops=flops / seconds / 1e12,
                p50_ms=1e3 * seconds, ratios=ratios)
        )  # fmt: skip
        if call.mode == "backward":
            prompts = sum(projection.seconds for _, projection in call.parts[:2])
            result.append(
                Row(suite, shape.name, shape.sizes, PROMPTS_ONLY, "bfloat16", TRITON, p50_ms=1e3 * prompts)
            )
    return result


def tiles_table(stage: str, chip: Chip, names: Sequence[str]) -> Table:
    """Each tile that ZINIT_AUTOTUNE=1 would try, at each shape; the first line of a shape is the written choice."""
    columns = (
        "shape",
        "block_m, block_n, warps, stages",
        "registers",
        "local bytes",
        "blocks/SM",
        "us",
        "TFLOP/s",
    )
    table = _table(f"{chip.name}, tiles of {stage}", columns)
    for shape in shapes_of(TILED[stage], names):
        for tile in configs.candidates(stage, configs.block_of(shape.head_dim), 16, launches.ITEM, chip.arch):
            launch = getattr(launches, stage)(shape, chip, tile)
            projection = project(launch, chip)
            code = launch.kernel.code
            table.add_row(
                shape.name, ", ".join(map(str, tile[:4])), str(code.registers), str(code.local_bytes),
                str(projection.blocks), f"{1e6 * projection.seconds:.1f}",
                f"{launch.flops / projection.seconds / 1e12:.0f}",
            )  # fmt: skip
    return table


def tutorial_table(path: Path) -> tuple[Table, bool]:
    """The validation, and whether every figure lies within the tolerance."""
    sizes = ("chip", "head_dim", "mask", "heads of all sequences", "T")
    table = _table("Triton's fused-attention tutorial", (*sizes, "published", "projected", "error", "tile"))
    found = tutorial.checks(path, CHIPS)
    for check in found:
        series = check.series
        table.add_row(
            series.chip, str(series.head_dim), "causal" if series.causal else "none",
            str(tutorial.columns_of(series, check.seqlen)), str(check.seqlen),
            f"{series.rates[check.seqlen]:.0f}", f"{check.projected:.0f}", f"{100 * check.error:+.0f} %",
            ", ".join(map(str, check.tile)),
        )  # fmt: skip
    worst = max(found, key=lambda check: abs(check.error))
    mean = sum(check.error for check in found) / len(found)
    table.caption = f"mean error {100 * mean:+.1f} %, worst {100 * worst.error:+.0f} %; TFLOP/s"
    return table, abs(worst.error) <= tutorial.TOLERANCE


def run(
    chip: str, modes: Sequence[str], names: Sequence[str], tiles: str, path: Path | None, console: Console
) -> int:
    """Prints what was asked for; the exit code: 1 where the validation fails."""
    if path:
        table, within = tutorial_table(path)
        console.print(table)
        return 0 if within else 1
    if tiles:
        console.print(tiles_table(tiles, CHIPS[chip], names))
        return 0
    found = projected(CHIPS[chip], modes, names)
    console.print(kernels_table(found, CHIPS[chip]))
    if chip in published.CHIPS and found:
        made = rows(found, CHIPS[chip])
        targets = [t for t in (*ATTENTION_TARGETS, *DECODE_TARGETS) if any(t.select(row) for row in made)]
        title = f"the GPU targets, which are stated for an H200: {LABEL}"
        console.print(targets_table(targets, made, title, "projected"))
    return 0
