"""Rows as tables, for the terminal and for Markdown: one cell format for both."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .ledger import Row


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent; "" for None."""
    if value is None:
        return ""
    text = f"{value:.{digits}g}"
    return text if "e" not in text else f"{value:.0f}" if abs(value) >= 1 else f"{value:.6f}"


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The ratios and figures that these rows have, in the order they came."""
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys([f"x {name}" for name in row.ratios]))
    for row in rows:
        names.update(dict.fromkeys(row.figures))
    return list(names)


def cells(row: Row, extra: Sequence[str]) -> list[str]:
    """A row's cells under `HEADER` and the extra columns."""
    spread = "" if row.p20_ms is None else f"{number(row.p20_ms)} - {number(row.p80_ms)}"
    found = [row.provider, number(row.p50_ms), spread, number(row.tflops), number(row.gbps)]
    for name in extra:
        value = row.ratios.get(name[2:]) if name.startswith("x ") else row.figures.get(name)
        found.append(f"{value:.2f}" if name.startswith("x ") and value is not None else number(value, 4))
    return found


HEADER = ["provider", "ms", "p20 - p80", "TFLOP/s", "GB/s"]


def suite_table(name: str, rows: Sequence[Row]) -> Table:
    """All rows of a suite, a section for each setting."""
    extra = columns_of(rows)
    table = Table(*HEADER, *extra, title=name, box=None, title_justify="left")
    setting: tuple[str, ...] = ()
    for row in rows:
        if row.setting != setting:
            setting = row.setting
            title = ", ".join(part for part in setting[1:] if part not in ("", "eager", "warm"))
            table.add_row(f"[bold]{title}")
        table.add_row(*cells(row, extra))
    return table
