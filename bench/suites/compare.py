"""Measurements compared with each other: two clocks (suite verify), two runs of one commit, two commits."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer

from ..ledger import RENAMED_SUITES, BenchError, Row, read
from ..machine import ROOT, commit, same_conditions
from ..measure import Clock, measure
from ..problem import Shape, decode, make_problem, name_of, prefill
from ..providers import PLAIN, plain_sdpa
from ..runner import Job, Note, Options, Suite, Target

SHAPES = {
    "cpu": [prefill("LLaMA-7B", 1, 128), prefill("LLaMA-7B", 1, 512), decode("LLaMA-7B", 1, 2048)],
    "cuda": [prefill("LLaMA-7B", 32, 512), prefill("LLaMA-7B", 8, 2048), decode("LLaMA-7B", 32, 4096)],
}
SMOKE = [prefill("CLIP-B/16 text", 1)]
SLICES = 5  # of each clock's time, in turns: the machine's speed drifts by the second
THEIRS = "torch.utils.benchmark"
SLOWER = 0.97  # times as fast, below which two commits differ


def jobs(options: Options) -> list[Job]:
    """One per shape and dtype."""
    return [
        Job(f"verify, {shape.name}, {name_of(dtype)}", partial(clock_rows, options, shape, dtype))
        for shape in (SMOKE if options.smoke else SHAPES[options.device.type])
        if options.wants_shape(shape.name)
        for dtype in options.dtypes
    ]


def clock_rows(options: Options, shape: Shape, dtype: torch.dtype, note: Note) -> Iterator[Row]:
    """Plain SDPA by this package's clock and by torch.utils.benchmark, in turns."""
    problem = make_problem(shape, dtype, options.device)
    call, clock = plain_sdpa(problem), Clock(options.device)
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    seconds = options.seconds / SLICES / 2
    ours, theirs, rounds = [], [], 0
    for _ in range(1 if options.smoke else SLICES):
        times = measure({PLAIN: call}, seconds, clock)
        ours.append(times.median(PLAIN))
        theirs.append(timer.blocked_autorange(min_run_time=max(seconds, 1e-3)).median)
        rounds += times.rounds
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    for name, found in ((PLAIN, ours), (THEIRS, theirs)):
        p20, p50, p80 = (1e3 * torch.tensor(found).quantile(q).item() for q in (0.2, 0.5, 0.8))
        yield Row(
            "verify", shape.name, shape.sizes, "decode" if problem.is_decode else "forward", name_of(dtype), name,
            rounds=rounds, p20_ms=p20, p50_ms=p50, p80_ms=p80, ratios={THEIRS: ratio} if name == PLAIN else {},
        )  # fmt: skip


def difference_of_clocks(row: Row, rows: Sequence[Row]) -> float | None:
    return abs(row.ratios[THEIRS] - 1)


class Pair(NamedTuple):
    """One speed-up as two runs measured it."""

    where: str
    provider: str
    other: str
    first: float
    second: float

    @property
    def difference(self) -> float:
        """As a share: 0.1 where one is 1.1 times the other."""
        return max(self.first, self.second) / min(self.first, self.second) - 1


def last_two(ledger: Path) -> Iterable[tuple[Row, Row]]:
    """Rows that two runs under the same conditions measured; of more than two runs, the last two."""
    alike: dict[tuple[str, ...], list[Row]] = {}
    found: dict[tuple[str, ...], tuple[Row, Row]] = {}
    for run in read(ledger):
        for row in run.rows:
            name = (*row.setting, row.provider)
            rows = alike.setdefault((*name, same_conditions(run.conditions)), [])
            rows.append(row)
            if len(rows) > 1:
                found[name] = (rows[-2], rows[-1])
    return found.values()


def pairs(ledger: Path) -> list[Pair]:
    return [
        Pair(", ".join(filter(None, row.setting[1:5])), row.provider, other, first, second)
        for row, later in last_two(ledger)
        for other in later.ratios
        if (first := row.speed_over(other)) and (second := later.speed_over(other))
    ]


def agreement(results: Path, suites: Sequence[str], within: float) -> tuple[Table, bool]:
    """How far the speed-ups of two runs differ, by ledger, and whether all differ by at most the share `within`."""
    table = Table("ledger", "speed-ups", f"within {100 * within:.0f} %", "median", "worst", "where", box=None)
    worst = -1.0
    for ledger in (path for suite in suites for path in sorted(results.glob(f"*/{suite}.jsonl"))):
        found = sorted(pairs(ledger), key=lambda pair: pair.difference)
        if not found:
            continue
        last = found[-1]
        worst = max(worst, last.difference)
        table.add_row(
            str(ledger.relative_to(results)), str(len(found)), str(sum(pair.difference <= within for pair in found)),
            f"{100 * statistics.median(pair.difference for pair in found):.1f} %", f"{100 * last.difference:.1f} %",
            f"{last.where}: {last.provider} over {last.other}, {last.first:.3g}x and {last.second:.3g}x",
        )  # fmt: skip
    if worst < 0:
        raise BenchError(f"no setting in {results} was measured twice: run the same suite again.")
    return table, worst <= within


def compare_commits(
    base: str, command: Sequence[str], turns: int, console: Console
) -> tuple[Table, list[str]]:
    """The times of commit `base` and of this tree, and the rows that are slower here in every turn.

    Each tree runs its own `python -m bench` in a process of its own, in turns. So `base` needs no module of this tree:
    the two share the command line and the ledger's format.
    """
    times: dict[tuple[str, ...], dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        other = folder / "base"
        try:
            console.print(f"building {base}: this takes minutes", style="dim")
            check_out(base, other)
            for turn in range(turns):
                for label, tree in (("base", other), ("here", ROOT))[:: 1 if turn % 2 else -1]:
                    console.print(f"turn {turn + 1} of {turns}: {label}", style="dim")
                    for row in measured(tree, command, folder / f"{label}{turn}"):
                        key = (*row.setting, row.provider)
                        times.setdefault(key, {}).setdefault(label, []).append(row.p50_ms or 0.0)
        finally:
            git = ["git", "-C", str(ROOT), "worktree"]
            subprocess.run([*git, "remove", "--force", str(other)], capture_output=True, check=False)
            shutil.rmtree(other, ignore_errors=True)
    return speed_table(times, base, turns)


def speed_table(
    times: dict[tuple[str, ...], dict[str, list[float]]], base: str, turns: int
) -> tuple[Table, list[str]]:
    """(setting..., provider) -> label -> ms of each turn, as a table; and the rows that are slower in every turn."""
    table = Table(
        "setting", "provider", f"{base}, ms", f"{commit()}, ms", "times as fast", "each turn", box=None
    )
    slower = []
    for (*setting, provider), by in times.items():
        if any(len(by.get(label, ())) != turns for label in ("base", "here")):
            continue
        speeds = [old / new for old, new in zip(by["base"], by["here"], strict=True)]
        old, new = (statistics.median(by[label]) for label in ("base", "here"))
        where = ", ".join(filter(None, setting))
        table.add_row(
            where, provider, f"{old:.3g}", f"{new:.3g}", f"{statistics.median(speeds):.2f}x",
            f"{min(speeds):.2f} to {max(speeds):.2f}",
        )  # fmt: skip
        if max(speeds) < SLOWER:
            slower.append(f"{where}, {provider}: {statistics.median(speeds):.2f}x")
    return table, slower


def check_out(revision: str, folder: Path) -> None:
    """The commit's tree, with its kernels built there."""
    worktree = ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(folder), revision]
    run(worktree, ROOT, f"check out {revision}")
    run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], folder, f"build {revision}")


def run(command: Sequence[str], folder: Path, what: str) -> str:
    """What the command wrote. Raises BenchError if it fails."""
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if answer.returncode:
        said = (answer.stderr or answer.stdout).strip().splitlines() or [f"exit code {answer.returncode}"]
        raise BenchError(f"could not {what}: {said[-1]}")
    return answer.stdout


def measured(tree: Path, command: Sequence[str], results: Path) -> list[Row]:
    """This package's rows of one run in a tree. Raises BenchError if there are none, with what the run said of it."""
    command = [sys.executable, "-m", "bench", *spelled_for(tree, command), "--results", str(results)]
    said = run(command, tree, f"measure in {tree}")
    rows = [row for path in sorted(results.glob("*/*.jsonl")) for r in read(path) for row in r.rows]
    ours = [row for row in rows if row.is_ours and row.p50_ms]
    if not ours:
        left_out = re.search(r"\S+ \S+ left out: .{1,600}", " ".join(said.split()))
        raise BenchError(
            f"{tree} measured nothing of this package: {left_out[0] if left_out else 'no shape, provider or job fits'}"
        )
    return ours


def spelled_for(tree: Path, command: Sequence[str]) -> list[str]:
    """The command with the names of suites and jobs that the tree knows: old names where it has only those."""
    found = list(command)
    for old, new in RENAMED_SUITES.items():
        if not (tree / "bench" / "suites" / f"{new}.py").exists():
            found = [old + word[len(new) :] if word.partition(",")[0] == new else word for word in found]
    return found


SUITES = (
    Suite(
        "verify",
        "This project's clock against torch.utils.benchmark: plain SDPA by both, in turns.",
        jobs,
        targets={
            "cpu": (
                Target(f"this clock against {THEIRS}, plain SDPA: difference",
                       lambda row: row.suite == "verify" and THEIRS in row.ratios, difference_of_clocks, 0.05,
                       at_most=True),
            )
        },
    ),
)  # fmt: skip
