"""The one command for a fresh NVIDIA machine: build, test, sanitize, measure, and a table of the goals.

    make gpu-check                                # into bench/results/<chip>/, docs/ and README.md
    PY=python3 make gpu-check OUT=/tmp/records    # with the torch that is there, without a network, all into one folder
    make gpu-check PART=decode                    # or build, test, sanitize, attention, memory, train, generate, tune

Every part is a process with a time limit; what a part has written stays when it is stopped, and the parts after it run
all the same, in the time that the ones before left. All output is in <chip>/gpu-check.log, which ends in the goals.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from rich.console import Console

from .chapters import chapters
from .conditions import folder_name
from .goals import goals_table
from .gpu_goals import GPU_GOALS
from .ledger import LedgerError
from .report import ROOT, write

SHORT = "bfloat16 and (plain or grouped or indexed or paged)"  # cases that the sanitizer has time for
PROCESSES = 12  # of the tests, which compile most of their time


class Part(NamedTuple):
    """Commands, and the seconds they may take together: under 9 minutes for all parts."""

    commands: Sequence[Sequence[str]]
    limit: float
    environment: dict[str, str] = {}


def parts(results: Path) -> dict[str, Part]:
    python = sys.executable
    bench = [python, "-m", "bench"]
    kept = ["--results", str(results), "--seconds", "0.4", "--device", "cuda"]
    tests = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_gpu*.py"))
    many = ["-n", str(PROCESSES)] if importlib.util.find_spec("xdist") else []
    tuned = ["--results", str(results / "tuned"), *kept[2:], "--provider", "zinit triton"]
    return {
        "build": Part([[python, "setup.py", "--quiet", "build_ext", "--inplace"]], 80, this_chip()),
        # the CUDA kernels first: they are compiled already
        "test": Part(
            [
                [python, "-m", "pytest", *many, *tests, "-k", "test_cuda"],
                [python, "-m", "pytest", *many, *tests, "-k", "not test_cuda"],
                [python, "-m", "zinit_kernels.check"],
            ],
            110,
        ),
        "sanitize": Part(
            [
                [*sanitizer(tool), python, "-m", "pytest", "-x", *tests, "-k", f"test_cuda and {SHORT}"]
                for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
            ],
            100,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # else a stray read lands in the cache's next tensor
        ),
        "attention": Part([[*bench, "attention", *kept]], 85),
        "decode": Part([[*bench, "decode", *kept, "--compile", "none"]], 35),
        "memory": Part([[*bench, "memory", *kept, "--compile", "none"]], 15),
        "train": Part([[*bench, "train", *kept]], 60),
        "generate": Part([[*bench, "generate", *kept]], 40),
        "tune": Part(
            [[*bench, "attention", "--shape", "LLaMA-7B", *tuned]],
            300,
            {"ZINIT_AUTOTUNE": "1", "TRITON_PRINT_AUTOTUNING": "1"},
        ),
    }


ALONE = ("tune",)  # asked for by name, never part of the whole: its rows are not those of the defaults


def sanitizer(tool: str) -> list[str]:
    """torch and Triton make calls whose errors they expect: only those of kernels count."""
    folders = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders)) or "compute-sanitizer"
    return [
        program,
        f"--tool={tool}",
        "--error-exitcode=9",
        *(["--report-api-errors=no"] if tool == "memcheck" else []),
    ]


def this_chip() -> dict[str, str]:
    """Kernels for it alone: those for every chip of a list take the compilers several times as long."""
    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}


def run_part(name: str, part: Part, limit: float, log: TextIO, console: Console) -> bool:
    """Runs a part's commands until the time is over; its output goes to the log as it comes."""
    began = time.monotonic()
    fine = True
    for i, command in enumerate(part.commands):
        left = limit - (time.monotonic() - began)
        fine &= run_command(name, command, left / (len(part.commands) - i), part.environment, log, console)
    if fine:
        console.print(f"{name}: done in {time.monotonic() - began:.0f} s", highlight=False)
    return fine


def run_command(
    name: str,
    command: Sequence[str],
    limit: float,
    environment: dict[str, str],
    log: TextIO,
    console: Console,
) -> bool:
    """A group of processes of its own, so that nothing of it outlives its time: asked to stop, then made to."""
    log.write(f"\n===== {name}: {' '.join(command)}\n")
    log.flush()
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
    except OSError as error:
        said(f"{name}: {command[0]} cannot be run: {error.strerror}", log, console)
        return False
    try:
        code = process.wait(max(limit, 1))
    except subprocess.TimeoutExpired:
        stop(process)
        said(f"{name}: stopped after its {limit:.0f} s; what it had is kept", log, console)
        return False
    except KeyboardInterrupt:
        stop(process)
        raise
    if code:
        said(f"{name}: failed with exit code {code}, see the log", log, console)
    return code == 0


def stop(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does, so that a suite says what it keeps; a second later by force."""
    for how in (signal.SIGINT, signal.SIGKILL):
        os.killpg(process.pid, how)
        try:
            process.wait(2)
            break
        except subprocess.TimeoutExpired:
            continue


def said(text: str, log: TextIO, console: Console) -> None:
    console.print(text, style="yellow", highlight=False, soft_wrap=True)
    log.write(f"{text}\n")


def main() -> int:
    known = parts(Path())
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="ledgers, log, page and pictures go there")
    parser.add_argument(
        "--part", choices=known, metavar="PART", help=f"one instead of all: {', '.join(known)}"
    )
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    if not torch.cuda.is_available():
        console.print(
            f"gpu-check{' PART=' + arguments.part if arguments.part else ''} needs an NVIDIA GPU that torch can use; "
            f"torch {torch.__version__} finds none (torch.cuda.is_available() is False). `make test` and `make bench` "
            "run without one.", style="red", soft_wrap=True,
        )  # fmt: skip
        return 2
    results = arguments.out.resolve() if arguments.out else ROOT / "bench" / "results"
    return check(results, arguments.out.resolve() if arguments.out else ROOT, arguments.part, console)


def check(results: Path, root: Path, only: str | None, console: Console) -> int:
    """Runs the parts; whatever happens, the log ends in the goals and the page is written."""
    known = parts(results)
    names = [only] if only else [name for name in known if name not in ALONE]
    folder = results / folder_name(torch.cuda.get_device_name() if torch.cuda.is_available() else "no chip")
    folder.mkdir(parents=True, exist_ok=True)
    began, allowed, done = time.monotonic(), 0.0, []
    with (folder / "gpu-check.log").open("a", encoding="utf-8") as log:
        try:
            for name in names:
                allowed += known[name].limit
                done.append(run_part(name, known[name], allowed - (time.monotonic() - began), log, console))
        except KeyboardInterrupt:
            said("stopped: what was done is kept", log, console)
        finally:
            if only not in ("build", "test", "sanitize"):  # which measure nothing
                conclude(results, root, log, console)
    console.print(f"everything is in {results}", highlight=False, soft_wrap=True)
    return 0 if len(done) == len(names) and all(done) else 1


def conclude(results: Path, root: Path, log: TextIO, console: Console) -> None:
    """The goals, into the log too, and the page with its pictures."""
    try:
        rows = [
            m.row
            for measured in chapters(results).values()
            for m in measured
            if "cuda" in m.run.conditions["device"]
        ]
        for target in (Console(file=log, width=140), console):
            target.print(goals_table(GPU_GOALS, rows))
        if rows:
            write(results, root)
    except LedgerError as error:
        said(f"no page and no goals: {error}", log, console)


if __name__ == "__main__":
    sys.exit(main())
