"""docs/benchmarks.md: every table of every chip, above the conditions it was measured under."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .chapters import OURS, Measured, chapters, conditions_of, grouped, markdown
from .cpu_goals import CPU_GOALS
from .goals import HEADER, Goal, cells, judged, summary
from .gpu_goals import GPU_GOALS
from .ledger import Row, extent
from .tables import columns_of, number

GOALS = {"cpu": CPU_GOALS, "cuda": GPU_GOALS}
PROBES = ("torch.mm, square", "plain read of the cache", "copy of as many bytes")
HEAD = """# Benchmarks

Written by `python -m bench report` from the ledgers under `bench/results/`; not by hand. A provider whose result is not
the float64 reference's has no figure. Times are medians of interleaved rounds, of a call that follows an untimed one of
itself. A factor is the median, over the rounds, of a provider's time divided by this package's in the same round:
**below 1.00x, in bold, the other one is faster**. "Plain SDPA" and "no prompts" compute no prompt branch: they do less
than is asked for. A provider without a figure could not run there, or was not asked to (what compiles, at one length).
"""
ABOUT = {
    "attention": "Whole sequences, P = 10 prompts unless the shape says another number. Time and factors.",
    "decode": "One new token of each of B sequences against S keys in the cache, by its layout in memory.",
    "memory": "Peak megabytes beyond the inputs, and what outputs and gradients need anyway.",
    "train": (
        "Table 11 of the paper: one step (forward, backward, AdamW) of B x T tokens without padding. The hours are "
        "52,002 Alpaca samples, 5 epochs, at the measured rate: padded to 512 tokens as the official script does, and "
        "packed (130 tokens on average)."
    ),
    "generate": (
        "Greedy. The bandwidth limit is reading all weights and the cache once per token, at the measured rate of a "
        "plain read or copy of the weights."
    ),
    "bars": "The settings the goals are stated for; torch.mm in float32 throughout.",
    "dropins": "PEFT's adaption prompts through this package: CPU time of one thread, ms per step and per token.",
    "verify": "The clock of these pages against torch.utils.benchmark, the same call in turns.",
}


def goals_of(rows: Sequence[Measured]) -> Sequence[Goal]:
    """Those that were set for the kind of chip the rows were measured on."""
    return GOALS[str(rows[0].run.conditions["device"])]


def ours_of(group: Sequence[Measured]) -> Row | None:
    """This package's row of one setting: the first of its backends, with prompts, in its plainest form."""
    return next((m.row for m in group if m.row.provider in OURS), None)


def factor(value: float | None) -> str:
    if value is None:
        return ""
    return f"**{value:.2f}x**" if value < 0.995 else f"{value:.2f}x"


def wide_table(rows: Sequence[Measured]) -> list[str]:
    """A line per shape: this package's time and rate, the machine's rate, and every other's factor."""
    ours = next((m.row.provider for m in rows if m.row.provider in OURS), None)
    names = dict.fromkeys(m.row.provider for m in rows)
    probe = next((name for name in names if name in PROBES), "")
    others = [name for name in names if name not in (ours, probe)]
    unit = "GB/s" if rows[0].row.mode == "decode" else "TFLOP/s"
    lines = []
    for (shape, layout), group in grouped(rows, "shape", "layout").items():
        by_name = {m.row.provider: m.row for m in group}
        mine = by_name.get(ours or "")
        line = [", ".join(filter(None, (shape, layout)))]
        line += ["", "", ""] if mine is None else [number(mine.p50_ms), spread(mine), number(rate_of(mine))]
        line += [number(rate_of(by_name.get(probe)))] if probe else []
        for name in others:
            row = by_name.get(name)
            line.append(
                "" if row is None else factor(row.ratios[ours]) if ours in row.ratios else number(row.p50_ms)
            )
        lines.append(line)
    header = ["shape", f"{ours or 'zinit'}, ms", "p20 - p80", unit, *([f"{probe}, {unit}"] if probe else [])]
    return markdown([*header, *others], lines)


def spread(row: Row) -> str:
    return f"{number(row.p20_ms)} - {number(row.p80_ms)}"


def rate_of(row: Row | None) -> float | None:
    """GB/s of a decode, TFLOP/s of anything else."""
    return None if row is None else row.gbps if row.mode == "decode" else row.tflops


def long_table(rows: Sequence[Measured]) -> list[str]:
    """A line per provider, a column per figure."""
    plain = [m.row for m in rows]
    extra = columns_of(plain)
    timed = any(row.p50_ms for row in plain)
    header = ["shape", "provider", *(["ms", "p20 - p80"] if timed else [])]
    header += [f"time / {name[2:]}" if name.startswith("x ") else name for name in extra]
    lines = []
    before = ""
    for row in plain:
        title = ", ".join((row.shape, row.mode))
        line = [title if title != before else "", row.provider]
        before = title
        if timed:
            line += [number(row.p50_ms), spread(row)]
        for name in extra:
            value = row.ratios.get(name[2:]) if name.startswith("x ") else row.figures.get(name)
            line.append(
                "" if value is None else f"{value:.2f}x" if name.startswith("x ") else number(value, 4)
            )
        lines.append(line)
    return markdown(header, lines)


def memory_table(rows: Sequence[Measured]) -> list[str]:
    """A line per shape and mode, a column per provider."""
    peak, needed = rows[0].row.figures  # in the order they were written
    names = list(dict.fromkeys(m.row.provider for m in rows))
    lines = []
    for (shape, mode), group in grouped(rows, "shape", "mode").items():
        by_name = {m.row.provider: m.row.figures for m in group}
        most = max(figures[needed] for figures in by_name.values())
        found = [number(by_name[name][peak], 4) if name in by_name else "" for name in names]
        lines.append([f"{shape}, {mode}", number(most, 4), *found])
    return markdown(["shape", needed, *names], lines)


def goals_section(rows: Sequence[Measured]) -> list[str]:
    plain = [m.row for m in rows]
    goals = goals_of(rows)
    verdicts = [judged(goal, plain) for goal in goals]
    lines = [
        [
            f"**{cell}**" if i == 3 and cell.startswith("missed") else cell
            for i, cell in enumerate(cells(goal, verdict))
        ]
        for goal, verdict in zip(goals, verdicts, strict=True)
    ]
    return [
        "### Goals",
        "",
        f"{summary(verdicts)}. A range is over all shapes of a goal.",
        "",
        *markdown(HEADER, lines),
    ]


def title_of(row: Row) -> str:
    parts = (
        row.dtype,
        "" if row.launch == "eager" else "in a CUDA graph",
        "" if row.cache == "warm" else "cold L2",
    )
    return ", ".join(filter(None, (row.mode, *parts)))


def section(suite: str, rows: Sequence[Measured]) -> list[str]:
    found = [f"### {suite.capitalize()}", "", ABOUT[suite], ""]
    if suite in ("attention", "decode", "bars"):
        for group in grouped(rows, "mode", "dtype", "launch", "cache").values():
            found += [f"#### {title_of(group[0].row)}", "", *wide_table(group), *footnotes(group)]
        return found
    table = memory_table if suite == "memory" else long_table
    for (dtype,), group in grouped(rows, "dtype").items():
        found += [f"#### {dtype}", "", *table(group), *footnotes(group)]
    return found


def footnotes(rows: Sequence[Measured]) -> list[str]:
    return [*(f"<sub>{sentence}</sub>" for sentence in conditions_of(rows)), ""]


def page(results: Path, pictures: dict[str, list[str]]) -> str:
    """`pictures` are the file names in docs/figures of each chip's folder."""
    lines = [HEAD]
    for folder, rows in chapters(results).items():
        ledgers = (f"{path.name}, {extent(path)}" for path in sorted((results / folder).glob("*.jsonl")))
        lines += [f"## {rows[0].run.conditions['chip']}", ""]
        lines += [f"Ledgers in `bench/results/{folder}/`: {'; '.join(ledgers)}.", ""]
        lines += [f"![{name.removesuffix('.png')}](figures/{name})\n" for name in pictures.get(folder, ())]
        lines += goals_section(rows)
        by_suite = grouped(rows, "suite")
        for suite in ABOUT:
            if (suite,) in by_suite:
                lines += section(suite, by_suite[(suite,)])
    return "\n".join(lines).rstrip() + "\n"
