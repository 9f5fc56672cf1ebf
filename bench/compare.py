"""Two commits side by side on the same machine: `python -m bench attention --base HEAD~3`.

Each tree measures in processes of its own, in turns; a figure is the median over the turns.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .conditions import ROOT, commit
from .ledger import Row, read

TURNS = 3


class CompareError(Exception):
    """A commit that cannot be measured, and why."""


def checkout(revision: str, folder: Path) -> None:
    """The commit's tree, built there."""
    run(
        ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(folder), revision],
        ROOT,
        f"check out {revision}",
    )
    run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], folder, f"build {revision}")


def run(command: Sequence[str], folder: Path, what: str) -> None:
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise CompareError(f"could not {what}: {(answer.stderr or answer.stdout).strip().splitlines()[-1]}")


def measured(tree: Path, arguments: Sequence[str], results: Path) -> list[Row]:
    """This package's rows of one run in a tree."""
    run([sys.executable, "-m", "bench", *arguments, "--results", str(results)], tree, f"measure in {tree}")
    rows = [row for path in sorted(results.glob("*/*.jsonl")) for r in read(path) for row in r.rows]
    return [row for row in rows if row.provider.startswith("zinit") and row.p50_ms]


def compare(base: str, arguments: Sequence[str], console: Console) -> Table:
    """Times of `base`, times of this tree, and this tree's over the base's."""
    times: dict[tuple[str, ...], dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        other = folder / "base"
        try:
            checkout(base, other)
            for turn in range(TURNS):
                for label, tree in (("base", other), ("here", ROOT))[:: 1 if turn % 2 else -1]:
                    console.print(f"turn {turn + 1} of {TURNS}: {label}", style="dim")
                    for row in measured(tree, arguments, folder / f"{label}{turn}"):
                        key = (*row.setting, row.provider)
                        times.setdefault(key, {}).setdefault(label, []).append(row.p50_ms or 0.0)
        finally:
            shutil.rmtree(other, ignore_errors=True)
            subprocess.run(["git", "-C", str(ROOT), "worktree", "prune"], check=False)
    table = Table("setting", "provider", f"{base}, ms", f"{commit()}, ms", "here / base", box=None)
    for (*setting, provider), by in times.items():
        if by.keys() == {"base", "here"}:
            old, new = (statistics.median(by[label]) for label in ("base", "here"))
            table.add_row(
                ", ".join(filter(None, setting)), provider, f"{old:.3g}", f"{new:.3g}", f"{new / old:.2f}x"
            )
    return table
