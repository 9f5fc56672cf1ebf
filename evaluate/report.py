"""docs/results.md, written from the ledgers and results under evaluate/results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zinit_kernels.console import Parser

from .ledgers import Entry, entries_of, mean, methods_of, table_of, test_figures
from .question import Table
from .shared import UserError, command_name, json_values, note, read_text, write_file
from .tables import text_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "evaluate" / "results", ROOT / "docs" / "results.md"
OURS = "zero-init"
HEAD = """# Results

`python -m evaluate report` writes this page from the ledgers under `evaluate/results/`; do not edit it.

[The commands](evaluate.md) say how figures come about: learning rates are chosen on validation data, with one seed, and
every seed is tested once. A range is from the lowest to the highest seed. Rows marked as quoted were not measured here.
These are small models and few steps, on data that fits a CPU: they show that the commands work, and what was measured,
not what the methods reach elsewhere.
"""


def main(arguments: Sequence[str]) -> None:
    """`python -m evaluate report`."""
    parser = Parser(prog=command_name("report"), description="Writes docs/results.md from the ledgers.")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the runs (default: %(default)s)"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="default: %(default)s")
    options = parser.parse_args(list(arguments))
    text = page(options.results)
    write_file(options.page, text.encode())
    note(f"wrote {options.page}")


def page(results: Path) -> str:
    """The page. Each folder holds about.md, whose first line is a title, and a ledger.jsonl or a result.json."""
    folders = sorted(path.parent for path in results.glob("*/about.md")) if results.is_dir() else []
    if not folders:
        raise UserError(
            f"{results} holds no runs: each is a folder with about.md and ledger.jsonl or result.json."
        )
    return "\n".join([HEAD, *(line for folder in folders for line in _section(folder))]).rstrip() + "\n"


def _section(folder: Path) -> list[str]:
    title, _, about = read_text(folder / "about.md").partition("\n")
    lines = [f"## {title.lstrip('# ').strip()}", "", about.strip(), ""]
    if (folder / "ledger.jsonl").is_file():
        return [*lines, *_of_ledger(folder / "ledger.jsonl")]
    if not (folder / "result.json").is_file():
        raise UserError(f"{folder} holds neither ledger.jsonl nor result.json.")
    found = json.loads(read_text(folder / "result.json"))
    for table in found["tables"]:
        lines += _markdown(Table(table["title"], table["columns"], table["rows"], table["notes"]))
    return lines


def _of_ledger(path: Path) -> list[str]:
    (_, header), *lines = json_values(read_text(path), path)
    run, entries = header["run"], entries_of(path, lines)
    text: list[str] = []
    for task in dict.fromkeys(entry["task"] for entry in entries):
        own = [entry for entry in entries if entry["task"] == task]
        text += _markdown(table_of(task, own, run))
        text += [*_comparison(own), ""]
    commits = ", ".join(dict.fromkeys(entry["commit"] for entry in entries))
    facts = f"Commit {commits}, data {run['data']}, base {run['base']} (fingerprints)."
    return [*text, facts, ""]


def _comparison(entries: Sequence[Entry]) -> list[str]:
    """What the test says of zero-init prompts against each other method, in the first figure."""
    methods = methods_of(entries)
    if OURS not in methods:
        return []
    figure = next(iter(next(entry for entry in entries if entry["kind"] == "test")["figures"]))
    ours = test_figures(entries, OURS, figure)
    lines = []
    for method in methods:
        theirs = test_figures(entries, method, figure)
        if method == OURS:
            continue
        apart = min(ours) > max(theirs) or max(ours) < min(theirs)
        lines.append(
            f"- `{OURS}` against `{method}`, {figure}: {mean(ours) - mean(theirs):+.2f}; the ranges of the seeds "
            f"{'are apart' if apart else 'overlap'}."
        )
    return lines


def _markdown(table: Table) -> list[str]:
    def line(cells: Sequence[Any]) -> str:
        return f"| {' | '.join(text_of(cell).replace('|', '/') for cell in cells)} |"

    rule = f"| --- |{' ---: |' * (len(table.columns) - 1)}"
    title = [f"**{table.title}**", ""] if table.title else []
    return [*title, line(table.columns), rule, *map(line, table.rows), "", *table.notes, ""]
