"""The one command for a fresh NVIDIA machine: build, test, sanitize, measure, and a table of the goals.

    make gpu-check                                # or, without a network: PY=python3 make gpu-check OUT=/tmp/records
    make gpu-check PART=decode                    # or build, test, sanitize, attention, memory, train, generate, tune

Every part is a process with a time limit; what a part has written stays when it is stopped, and the parts after it run
all the same. All output is in OUT/gpu-check.log, which ends in the goals.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from rich.console import Console

from .goals import goals_table
from .gpu_goals import GPU_GOALS
from .ledger import LedgerError, Row, read
from .report import write

ROOT = Path(__file__).resolve().parent.parent
GPU_TESTS = "tests/test_gpu.py"


class Part(NamedTuple):
    """Commands, and the seconds they may take together: 9 minutes for all parts."""

    commands: Sequence[Sequence[str]]
    limit: float
    environment: dict[str, str] = {}


def parts(results: Path) -> dict[str, Part]:
    python = sys.executable
    bench = [python, "-m", "bench"]
    kept = ["--results", str(results), "--seconds", "0.4", "--device", "cuda"]
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    short = [python, "-m", "pytest", GPU_TESTS, "-k", "plain or grouped or indexed or paged"]
    return {
        "build": Part([[python, "setup.py", "--quiet", "build_ext", "--inplace"]], 150),
        "test": Part([[python, "-m", "pytest", GPU_TESTS]], 120),
        "sanitize": Part(
            [
                [sanitizer, f"--tool={tool}", "--error-exitcode=9", *short]
                for tool in ("memcheck", "racecheck")
            ],
            60,
        ),
        "attention": Part([[*bench, "attention", *kept, "--compile=none"]], 70),
        "decode": Part([[*bench, "decode", *kept, "--compile=none"]], 40),
        "memory": Part([[*bench, "memory", *kept, "--compile=none"]], 20),
        "train": Part([[*bench, "train", *kept]], 50),
        "generate": Part([[*bench, "generate", *kept]], 40),
        "tune": Part(
            [
                [
                    *bench,
                    "attention",
                    *kept,
                    "--provider",
                    "zinit triton",
                    "--compile=none",
                    "--shape",
                    "LLaMA-7B",
                ]
            ],
            60,
            {"ZINIT_AUTOTUNE": "1", "TRITON_PRINT_AUTOTUNING": "1"},
        ),
    }


ALONE = ("tune",)  # asked for by name, never part of the whole: its rows are not those of the defaults


def run_part(name: str, part: Part, log: TextIO, console: Console) -> bool:
    """Runs a part's commands until one fails or the time is over; its output goes to the log as it comes."""
    began = time.monotonic()
    for command in part.commands:
        left = part.limit - (time.monotonic() - began)
        log.write(f"\n===== {name}: {' '.join(command)}\n")
        log.flush()
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=max(left, 1),
                env={**os.environ, **part.environment}, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            console.print(
                f"{name}: stopped after its {part.limit:.0f} s; what it had is kept", style="yellow"
            )
            return False
        except FileNotFoundError:
            console.print(f"{name}: {command[0]} is not here", style="yellow")
            return False
        if code:
            console.print(f"{name}: failed with exit code {code}, see the log", style="red")
            return False
    console.print(f"{name}: done in {time.monotonic() - began:.0f} s")
    return True


def measured(results: Path) -> list[Row]:
    """The rows of every ledger that can be believed."""
    rows: list[Row] = []
    for path in sorted(results.glob("*/*.jsonl")):
        try:
            rows += [row for run in read(path) for row in run.rows]
        except LedgerError as error:
            print(error, file=sys.stderr)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench", help="log, ledgers and pictures (default bench/)"
    )
    parser.add_argument("--part", choices=parts(Path()), help="one part instead of all")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    if not torch.cuda.is_available():
        console.print(
            "gpu-check needs an NVIDIA GPU that torch can use; torch.cuda.is_available() is False here. `make test` "
            "and `make bench` run without one.", style="red",
        )  # fmt: skip
        return 2
    out = arguments.out.resolve()
    results = out / "results"
    out.mkdir(parents=True, exist_ok=True)
    known = parts(results)
    names = [arguments.part] if arguments.part else [name for name in known if name not in ALONE]
    with (out / "gpu-check.log").open("a", encoding="utf-8") as log:
        done = [run_part(name, known[name], log, console) for name in names]
        rows = measured(results)
        if rows:
            write(results, out)
            for target in (console, Console(file=log, width=140)):
                target.print(goals_table(GPU_GOALS, rows))
    console.print(f"everything is in {out}", highlight=False, soft_wrap=True)
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
