"""Ledgers -> docs/benchmarks.md, its pictures, and the README's table. `python -m bench report`

Of each setting the newest run counts. Every table stands above the conditions it was measured under.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from .cpu_goals import CPU_GOALS
from .goals import Goal
from .gpu_goals import GPU_GOALS
from .ledger import Row, Run, read
from .plots import draw
from .tables import columns_of, number

GOALS = {"cpu": CPU_GOALS, "cuda": GPU_GOALS}
ROOT = Path(__file__).resolve().parent.parent
OURS = ("zinit cpu", "zinit triton", "zinit cuda")
PROBES = ("torch.mm, square", "plain read of the cache", "copy of as many bytes")
BEGIN, END = "<!-- begin: python -m bench report -->", "<!-- end -->"
HEAD = """# Benchmarks

Written by `python -m bench report` from the ledgers under `bench/results/`; not by hand. A provider whose result is not
the float64 reference's has no figure. Times are medians of interleaved rounds; a factor is the median, over the rounds,
of a provider's time divided by this package's in the same round: **below 1.00x the other one is faster**. "Plain SDPA"
computes no prompt branch: it does less than is asked for, and is here as the floor.
"""


class Measured(NamedTuple):
    """A row and the run it was measured in."""

    row: Row
    run: Run


def newest(runs: Iterable[Run]) -> list[Measured]:
    """Of every setting the rows of the last run that measured it, in the order of the ledger."""
    by_setting: dict[tuple[str, ...], list[Measured]] = {}
    for run in runs:
        fresh: set[tuple[str, ...]] = set()
        for row in run.rows:
            if row.setting not in fresh:
                fresh.add(row.setting)
                by_setting[row.setting] = []
            by_setting[row.setting].append(Measured(row, run))
    return [measured for group in by_setting.values() for measured in group]


def grouped(rows: Sequence[Measured], *names: str) -> dict[tuple[str, ...], list[Measured]]:
    """Rows by the values of some of their fields, in the order they came."""
    found: dict[tuple[str, ...], list[Measured]] = {}
    for measured in rows:
        found.setdefault(tuple(getattr(measured.row, name) for name in names), []).append(measured)
    return found


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        f"|{' --- |' * len(header)}",
        *(f"| {' | '.join(cells)} |" for cells in lines),
        "",
    ]


def ours_of(group: Sequence[Measured]) -> Row | None:
    """This package's row of one setting: the first of its backends, with prompts, in its plainest form."""
    return next((m.row for m in group if m.row.provider in OURS), None)


def wide_table(rows: Sequence[Measured]) -> list[str]:
    """A line per shape, a column per provider: ms, and the factor to this package's time in the same round."""
    providers = list(dict.fromkeys(m.row.provider for m in rows if m.row.provider not in PROBES))
    probe = next((m.row.provider for m in rows if m.row.provider in PROBES), None)
    is_decode = rows[0].row.mode == "decode"
    lines = []
    for (shape, layout), group in grouped(rows, "shape", "layout").items():
        ours = ours_of(group)
        by_name = {m.row.provider: m.row for m in group}
        fastest = min((m.row.p50_ms or 0.0) for m in group if m.row.provider in providers)
        cells = [f"{shape}{', ' + layout if layout else ''}"]
        for provider in providers:
            row = by_name.get(provider)
            if row is None:
                cells.append("")
                continue
            text = number(row.p50_ms)
            factor = row.ratios.get(ours.provider) if ours is not None else None
            text += f" ({factor:.2f}x)" if factor is not None else ""
            cells.append(f"**{text}**" if row.p50_ms == fastest else text)
        lines.append([*cells, *(number(rate_of(row)) for row in (ours, by_name.get(probe or "")))])
    unit = "GB/s" if is_decode else "TFLOP/s"
    return markdown(["shape", *(f"{p}, ms" for p in providers), f"ours, {unit}", f"{probe}, {unit}"], lines)


def rate_of(row: Row | None) -> float | None:
    """GB/s of a decode, TFLOP/s of anything else."""
    return None if row is None else row.gbps if row.mode == "decode" else row.tflops


def long_table(rows: Sequence[Measured]) -> list[str]:
    """A line per provider, a column per figure."""
    plain = [m.row for m in rows]
    extra = columns_of(plain)
    timed = any(row.p50_ms for row in plain)
    header = ["shape", "provider", *(["ms", "p20 - p80"] if timed else []), *extra]
    lines = []
    for row in plain:
        cells = [f"{row.shape}, {row.mode}", row.provider]
        if timed:
            cells += [number(row.p50_ms), f"{number(row.p20_ms)} - {number(row.p80_ms)}"]
        for name in extra:
            value = row.ratios.get(name[2:]) if name.startswith("x ") else row.figures.get(name)
            cells.append(
                "" if value is None else f"{value:.2f}x" if name.startswith("x ") else number(value, 4)
            )
        lines.append(cells)
    return markdown(header, lines)


def conditions_line(rows: Sequence[Measured]) -> list[str]:
    """The runs behind a table: chip, commit, versions, load."""
    lines = []
    for run in dict.fromkeys(m.run.identity for m in rows):
        facts = next(m.run.conditions for m in rows if m.run.identity == run)
        libraries = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        rounds = [m.row.rounds for m in rows if m.run.identity == run]
        lines.append(
            f"{facts['chip']} ({facts['instructions']}), {facts['time']}, commit {facts['commit']}, {libraries}, "
            f"load {facts['load']}, malloc {facts['malloc']}, {min(rounds)} to {max(rounds)} rounds."
        )
    return [*(f"<sub>{line}</sub>" for line in lines), ""]


def title_of(row: Row) -> str:
    parts = (
        row.dtype,
        "" if row.launch == "eager" else "in a CUDA graph",
        "" if row.cache == "warm" else "cold L2",
    )
    return ", ".join(filter(None, (row.mode, *parts)))


def section(suite: str, rows: Sequence[Measured]) -> list[str]:
    found = [f"### {suite.capitalize()}", ""]
    if suite in ("attention", "decode"):
        for group in grouped(rows, "mode", "dtype", "launch", "cache").values():
            found += [f"#### {title_of(group[0].row)}", "", *wide_table(group), *conditions_line(group)]
    else:
        for (dtype,), group in grouped(rows, "dtype").items():
            found += [f"#### {dtype}", "", *long_table(group), *conditions_line(group)]
    return found


def chapters(results: Path) -> dict[str, list[Measured]]:
    """chip's folder -> what counts of its ledgers; raises LedgerError where one cannot be believed."""
    found: dict[str, list[Measured]] = {}
    for path in sorted(results.glob("*/*.jsonl")):
        found.setdefault(path.parent.name, []).extend(newest(read(path)))
    return found


def goals_of(rows: Sequence[Measured]) -> Sequence[Goal]:
    """Those that were set for the kind of chip the rows were measured on."""
    return GOALS[str(rows[0].run.conditions["device"])]


def page(results: Path, pictures: dict[str, list[str]]) -> str:
    """docs/benchmarks.md; `pictures` are the file names in docs/figures of each chip's folder."""
    lines = [HEAD]
    for folder, rows in chapters(results).items():
        lines += [f"## {rows[0].run.conditions['chip']}", "", f"Ledgers: `bench/results/{folder}/`", ""]
        lines += [f"![{name}](figures/{name})" for name in pictures.get(folder, ())] + [""]
        for (suite,), group in grouped(rows, "suite").items():
            lines += section(suite, group)
    return "\n".join(lines).rstrip() + "\n"


def span(values: Sequence[float]) -> str:
    """ "0.42 - 0.55": least and greatest."""
    return "" if not values else f"{min(values):.2f} - {max(values):.2f}"


README_RATIOS = ("plain SDPA", "SDPA twice + add")


def readme_table(results: Path) -> str:
    """The README's summary: this package's time over a peer's, its range over all shapes of a length."""
    lines: list[str] = []
    for folder, rows in chapters(results).items():
        mine = [
            m for m in rows if m.row.provider in OURS and (m.row.launch, m.row.cache) == ("eager", "warm")
        ]
        dtypes = sorted({m.row.dtype for m in mine}, reverse=True)
        found: dict[str, dict[str, list[float]]] = {}
        for row in (m.row for m in mine):
            length = (
                f"S = {row.sizes['seqlen_k']}" if row.mode == "decode" else f"T = {row.sizes['seqlen_q']}"
            )
            for peer in README_RATIOS:
                if peer in row.ratios:
                    by_dtype = found.setdefault(f"{row.mode}, {length}: time / {peer}", {})
                    by_dtype.setdefault(row.dtype, []).append(row.ratios[peer])
        header = [str(rows[0].run.conditions["chip"]), *dtypes]
        lines += markdown(
            header, ([what, *(span(by.get(d, [])) for d in dtypes)] for what, by in found.items())
        )
        ledgers = ", ".join(
            f"`bench/results/{folder}/{suite}.jsonl`" for suite in sorted({m.row.suite for m in mine})
        )
        lines += [f"From {ledgers}; plain SDPA computes no prompts.", ""]
    return "\n".join(lines).rstrip()


def with_table(readme: str, table: str) -> str:
    """The README with what stands between the two marks replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"README.md must hold {BEGIN!r} and, after it, {END!r}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def write(results: Path, root: Path = ROOT) -> list[Path]:
    """Everything that is generated from the ledgers; the files written."""
    docs = root / "docs"
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    pictures = {
        folder: draw([m.row for m in rows], docs / "figures", folder)
        for folder, rows in chapters(results).items()
    }
    files = {docs / "benchmarks.md": page(results, pictures)}
    readme = root / "README.md"
    if readme.exists():
        files[readme] = with_table(readme.read_text(), readme_table(results))
    for path, text in files.items():
        path.write_text(text)
    return [*files, *(docs / "figures" / name for names in pictures.values() for name in names)]
