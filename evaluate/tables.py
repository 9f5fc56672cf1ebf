"""Tables of figures: on the terminal, as JSON, and with quoted rows beside the measured one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from zinit_kernels.console import printable, shortened

from .question import Cell, Quoted, Table


def with_quoted(table: Table, quoted: Sequence[Quoted]) -> Table:
    """The table with a row for each quoted one, marked as such, and its source as a note."""
    rows = [*table.rows]
    notes = [*table.notes]
    for row in quoted:
        rows.append([f"{row.name} (quoted)", *(row.values.get(column) for column in table.columns[1:])])
        notes.append(f"{row.name}: {row.source}, not measured here.")
    return replace(table, rows=rows, notes=notes)


def text_of(cell: Cell) -> str:
    """A float with two decimals, a whole number with commas, None as nothing; a text, which may come from a file, with
    what is not visible as an escape."""
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.2f}"
    return f"{cell:,}" if isinstance(cell, int) else shortened(cell)


def show(tables: Sequence[Table]) -> None:
    """Prints the tables and their notes."""
    console = Console(
        width=None if Console().is_terminal else 160, highlight=False, markup=False, emoji=False
    )
    for table in tables:
        shown = RichTable(title=table.title, title_justify="left")
        for place, column in enumerate(table.columns):
            shown.add_column(shortened(column), justify="right" if place else "left")
        for row in table.rows:
            shown.add_row(*map(text_of, row))
        console.print(shown)
        for sentence in table.notes:
            console.print(printable(sentence))


def as_json(tables: Sequence[Table], run: dict[str, Any]) -> bytes:
    """The run and its tables, as result.json holds them."""
    found = [
        {
            "title": table.title,
            "columns": list(table.columns),
            "rows": [list(row) for row in table.rows],
            "notes": list(table.notes),
        }
        for table in tables
    ]
    return json.dumps({"run": run, "tables": found}, indent=1, ensure_ascii=False).encode() + b"\n"
