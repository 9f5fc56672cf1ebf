"""Rows as tables: how a figure is written, Markdown for the page, and the table that ends a run in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from ..ledger import Measured, Row, grouped

PROBES = {  # what the machine itself can do, measured in the same rounds -> is it a limit
    "torch.mm, square": False,
    "plain read of the cache": False,
    "copy of as many bytes": True,
    "peak arithmetic": True,
    "peak read": True,
}


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent; "" for None."""
    if value is None:
        return ""
    text = f"{value:.{digits}g}"
    return text if "e" not in text else f"{value:.0f}" if abs(value) >= 1 else f"{value:.6f}"


def times_as_fast(value: float | None) -> str:
    """ "2.10x"; in bold below 1, where the other is faster."""
    if value is None:
        return ""
    return f"**{value:.2f}x**" if value < 0.995 else f"{value:.2f}x"


def span(values: Iterable[float | int], digits: str = "", unit: str = "") -> str:
    """ "0.42 to 0.55": the least and the greatest; one of them where they are the same."""
    known = sorted(values)
    return (
        " to ".join(dict.fromkeys(f"{value:{digits}}{unit}" for value in (known[0], known[-1])))
        if known
        else ""
    )


def spread(row: Row) -> str:
    return "" if row.p20_ms is None else f"{number(row.p20_ms)} - {number(row.p80_ms)}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        f"|{' --- |' * len(header)}",
        *(f"| {' | '.join(cells)} |" for cells in lines),
        "",
    ]


def dtypes_of(rows: Iterable[Row]) -> list[str]:
    return sorted({row.dtype for row in rows}, reverse=True)  # float32 first


def others_and_figures(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """The providers that these rows have ratios to, and their other figures, in order of appearance."""
    others = dict.fromkeys(name for row in rows for name in row.ratios)
    return list(others), list(dict.fromkeys(name for row in rows for name in row.figures))


def shape_table(rows: Sequence[Measured]) -> list[str]:
    """A line per shape: this package's time and rate, the machine's rates, and how many times as fast as each other."""
    ours = next((m.row.provider for m in rows if m.row.is_ours), "zinit")
    names = dict.fromkeys(m.row.provider for m in rows)
    probes = [name for name in names if name in PROBES]
    others = [name for name in names if name not in (ours, *probes)]
    unit = "GB/s" if rows[0].row.mode == "decode" else "TFLOP/s"
    lines = []
    for (shape, layout), group in grouped(rows, "shape", "layout").items():
        by_name = {m.row.provider: m.row for m in group}
        mine = by_name.get(ours)
        line = [", ".join(filter(None, (shape, layout)))]
        line += ["", "", ""] if mine is None else [number(mine.p50_ms), spread(mine), number(rate_of(mine))]
        line += [number(rate_of(by_name.get(name))) for name in probes]
        for name in others:
            row = by_name.get(name)  # its time over ours: how many times as fast this package is
            line.append("" if row is None else times_as_fast(row.ratios.get(ours)) or number(row.p50_ms))
        lines.append(line)
    header = ["shape", f"{ours}, ms", "p20 - p80", unit, *(f"{name}, {unit}" for name in probes)]
    return markdown([*header, *(f"over {name}" for name in others)], lines)


def rate_of(row: Row | None) -> float | None:
    """GB/s of a decode, TFLOP/s of anything else."""
    return None if row is None else row.gbps if row.mode == "decode" else row.tflops


def provider_table(rows: Sequence[Measured]) -> list[str]:
    """A line per shape and provider: its time, how many times as fast as others it is, and its other figures."""
    plain = [m.row for m in rows]
    others, figures = others_and_figures(plain)
    timed = any(row.p50_ms for row in plain)
    header = [
        "shape",
        "provider",
        *(["ms", "p20 - p80"] if timed else []),
        *(f"over {o}" for o in others),
        *figures,
    ]
    lines, before = [], ""
    for row in plain:
        title = ", ".join((row.shape, row.mode))
        line = [title if title != before else "", row.provider]
        before = title
        line += [number(row.p50_ms), spread(row)] if timed else []
        line += [times_as_fast(row.speed_over(other)) for other in others]
        line += [number(row.figures.get(name), 4) for name in figures]
        lines.append(line)
    return markdown(header, lines)


def terminal_table(name: str, rows: Sequence[Row]) -> Table:
    """All rows of a suite, with a heading for each setting."""
    others, figures = others_and_figures(rows)
    table = Table(
        "provider", "ms", "p20 - p80", "TFLOP/s", "GB/s", *(f"over {other}" for other in others), *figures,
        title=name, box=None, title_justify="left",
        caption="over X: how many times as fast as X; above 1 is faster" if others else None, caption_justify="left",
    )  # fmt: skip
    setting: tuple[str, ...] = ()
    for row in rows:
        if row.setting != setting:
            setting = row.setting
            table.add_row(f"[bold]{', '.join(p for p in setting[1:] if p not in ('', 'eager', 'warm'))}")
        speeds = [row.speed_over(other) for other in others]
        table.add_row(
            row.provider, number(row.p50_ms), spread(row), number(row.tflops), number(row.gbps),
            *("" if speed is None else f"{speed:.2f}x" for speed in speeds),
            *(number(row.figures.get(figure), 4) for figure in figures),
        )  # fmt: skip
    return table
