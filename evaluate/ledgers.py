"""The entries of fine-tuning ledgers, and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .question import Cell, Table
from .shared import UserError

Entry = dict[str, Any]
_FIELDS = ("task", "kind", "method", "learning_rate", "seed", "figures", "numbers", "seconds", "commit")


def entries_of(path: Path, entries: Sequence[tuple[int, Any]]) -> list[Entry]:
    """The entries of a ledger's lines. Raises UserError for one that is none."""
    for line, entry in entries:
        if not isinstance(entry, dict) or any(name not in entry for name in _FIELDS):
            raise UserError(f"{path}, line {line}: this is no entry of a ledger; move the file away.")
    return [entry for _, entry in entries]


def methods_of(entries: Sequence[Entry]) -> list[str]:
    """The methods that were tested with every seed, in the order in which they were run."""
    tests = [entry for entry in entries if entry["kind"] == "test"]
    seeds = {entry["seed"] for entry in tests}
    found = dict.fromkeys(entry["method"] for entry in tests)
    return [name for name in found if {e["seed"] for e in tests if e["method"] == name} == seeds]


def test_figures(entries: Sequence[Entry], method: str, name: str) -> list[float]:
    """A figure of each seed of a method."""
    return [
        entry["figures"][name] for entry in entries if (entry["method"], entry["kind"]) == (method, "test")
    ]


def table_of(title: str, entries: Sequence[Entry], run: Mapping[str, Any]) -> Table:
    """A row for each method: what it trains, its time, the chosen rate, and the mean and range of each test figure.

    Args:
        entries: of one task. run: of the ledger's header.
    """
    first = next(entry for entry in entries if entry["kind"] == "test")
    (score,) = next(entry["figures"] for entry in entries if entry["kind"] == "validation")
    figures = list(first["figures"])
    # larger is better in a score: "-loss" is the loss with its sign turned, and the table shows the loss
    sign = -1 if score.startswith("-") else 1
    columns = [
        "method",
        "trained numbers",
        "seconds",
        "learning rate",
        f"validation {score.removeprefix('-')}",
    ]
    for name in figures:
        columns += [name, "lowest", "highest"]
    rows: list[list[Cell]] = []
    for method in methods_of(entries):
        own = [entry for entry in entries if entry["method"] == method]
        tests = [entry for entry in own if entry["kind"] == "test"]
        tried = [entry["figures"][score] for entry in own if entry["kind"] == "validation"]
        row: list[Cell] = [method, tests[0]["numbers"], mean([entry["seconds"] for entry in tests])]
        row += [f"{tests[0]['learning_rate']:g}", sign * max(tried)]
        for name in figures:
            values = test_figures(entries, method, name)
            row += [mean(values), min(values), max(values)]
        rows.append(row)
    seeds = sorted({entry["seed"] for entry in entries if entry["kind"] == "test"})
    note = (
        f"Test figures: mean, lowest and highest of the seeds {', '.join(map(str, seeds))}. Trained numbers with the "
        f"head; seconds of one training of {run['steps']} steps of {run['batch_size']}."
    )
    return Table(title, columns, rows, [note])


def mean(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)
