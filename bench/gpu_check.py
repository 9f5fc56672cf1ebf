"""One command for a fresh NVIDIA machine: build, test, measure, sanitize, and a table of the targets.

    make gpu-check                                # into bench/results/<chip>/, docs/ and README.md
    PY=python3 make gpu-check OUT=/tmp/records    # with the torch that is there, no network, everything in one folder
    make gpu-check                                # again: what the first call left, in as much time
    make gpu-check PART=decode                    # or build, proof, test, sanitize, attention, memory, train, ...

One call takes less than 9 minutes, so it fits a machine that is rented for 15. Every step is a
process with a time limit. A step that is stopped keeps what it has written, and the steps after it still run, in the
time that is left. The order is by importance: first whether the kernels are right, then the figures that the targets
need, last what could take all of the time. Before and after each step gpu-check.json says how far it came. The next
call of the same commit begins with the steps that never ran, then takes those that were stopped or that the machine did
not survive, then those that failed; what is done is not repeated (--again: all of it). Benchmarks go on at the job
where they ended.

All output goes to <chip>/gpu-check.log, which ends with the targets. OUT holds few files, since some machines return
only a few: the ledgers, the log, gpu-check.json and docs.zip.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TextIO

import torch
from rich.console import Console

from zinit_kernels.console import Parser

from .ledger import chips
from .machine import ROOT, commit, folder_name, why_failed
from .problem import COMPILED
from .runner import targets_of, targets_table

RESULTS = ROOT / "bench" / "results"

SHORT = "bfloat16 and (plain or grouped or indexed or paged)"  # the cases for which the sanitizer has time
PROCESSES = 12  # of the tests, which spend most of their time on compiling
SECONDS_OF_ONE_PART = 300.0  # when it is asked for by name
# when pytest is told to stop, it reports the failures, but waits up to 10 s for its processes
GRACE = 12.0


class Step(NamedTuple):
    """A command of a part and the seconds it may take; with the page and pictures, all take less than 9 minutes."""

    part: str
    seconds: float
    command: Sequence[str]
    environment: dict[str, str] = {}


def steps(results: Path) -> list[Step]:
    python = sys.executable
    prove = [python, "-m", "zinit_kernels.check", "--gpu"]
    many = ["-n", str(PROCESSES)] if importlib.util.find_spec("xdist") else []
    tests = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/backends/test_gpu*.py"))
    test = [python, "-m", "pytest", "-vv", *many, *tests, "-k"]
    other_dtypes = "(torch.float32 or torch.float16)"
    short = [python, "-m", "pytest", "-vv", *tests, "-k", f"test_cuda and {SHORT}"]
    return [
        Step("build", 55, [python, "setup.py", "--quiet", "build_ext", "--inplace"], this_chip()),
        # whether backend="auto" takes the kernels here at all; what whole models need later comes first
        Step("proof", 36, [*prove, "--dtype", "bfloat16", "--head-dim", "128", "64"]),
        Step("test", 60, [*test, f"not test_cuda and not {other_dtypes}"]),
        Step("test", 40, [*test, "test_cuda"]),
        Step("attention", 80, bench("attention", results, "--compile", "none")),
        Step("decode", 35, bench("decode", results, "--compile", "none")),
        Step("memory", 15, bench("memory", results, "--compile", "none")),
        Step("train", 50, bench("train", results)),
        Step("generate", 35, bench("generate", results)),
        # the targets' two shapes again, with the providers that compile for a minute
        Step("attention", 45, bench("attention", results, *compiled_jobs())),
        # float32 with 256 dimensions alone compiles for 50 s
        Step("test", 32, [*test, f"not test_cuda and {other_dtypes}"]),
        # without torch's memory cache, in which a stray read would land in another tensor
        *(
            Step("sanitize", seconds, [*sanitizer(tool), *short], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
            for tool, seconds in (("memcheck", 15), ("racecheck", 5), ("synccheck", 5), ("initcheck", 5))
        ),
    ]


def tune(results: Path) -> Step:
    """Run only when named: its rows are not those of the default tile sizes."""
    only = ["--shape", "LLaMA-7B", "--provider", "zinit triton"]
    environment = {"ZINIT_AUTOTUNE": "1"}  # every candidate's time goes to stderr, and so into the log
    return Step("tune", SECONDS_OF_ONE_PART, bench("attention", results / "tuned", *only), environment)


def bench(suite: str, results: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "bench", suite, "--results", str(results)]
    return [*command, "--seconds", "0.4", "--device", "cuda", *options]


def compiled_jobs() -> list[str]:
    return [word for shape in COMPILED for word in ("--only", f"{shape}, bfloat16, forward")]


class Progress:
    """How far the calls of one commit came with each step: a file beside the log."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "gpu-check.json"
        self.reached: dict[str, str] = {}  # step -> begun, stopped, failed or done
        try:
            content = json.loads(self.path.read_text())
            if content["commit"] == commit():
                self.reached = {str(name): str(value) for name, value in content["steps"].items()}
        except (OSError, ValueError, LookupError, AttributeError, TypeError):  # none yet, or half a file
            self.reached = {}

    def note(self, step: Step, reached: str) -> None:
        self.reached[name_of(step)] = reached
        text = json.dumps({"commit": commit(), "steps": self.reached}, indent=1)
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.replace(self.path)

    def left(self, wanted: Sequence[Step]) -> list[Step]:
        """What is not done yet: first what never ran, last what failed. It shares the time of all."""
        ranks = {"": 0, "stopped": 1, "begun": 1, "failed": 2}
        open_steps = [step for step in wanted if self.reached.get(name_of(step), "") != "done"]
        open_steps.sort(key=lambda step: ranks.get(self.reached.get(name_of(step), ""), 2))
        if not open_steps or not self.reached:
            return open_steps
        share = sum(step.seconds for step in wanted) / sum(step.seconds for step in open_steps)
        return [
            step._replace(seconds=share * step.seconds, command=going_on(step.command)) for step in open_steps
        ]


def name_of(step: Step) -> str:
    """A step's name in the file: its command without the interpreter, the folder of the results, and --resume."""
    words = zip(step.command, step.command[1:], strict=False)
    return " ".join(
        [step.part, *(word for before, word in words if before != "--results" and word != "--resume")]
    )


def going_on(command: Sequence[str]) -> Sequence[str]:
    """A benchmark that leaves out the jobs which this commit has finished; other commands as they are."""
    return [*command, "--resume"] if list(command[1:3]) == ["-m", "bench"] else command


def chosen(only: str | None, results: Path) -> list[Step]:
    """All steps except tune's; or the steps of one part, which then have five minutes."""
    if only is None:
        return steps(results)
    mine = [step for step in (*steps(results), tune(results)) if step.part == only]
    share = SECONDS_OF_ONE_PART / sum(step.seconds for step in mine)
    return [step._replace(seconds=share * step.seconds) for step in mine]


def sanitizer(tool: str) -> list[str]:
    """The command without API errors, which torch and Triton expect and handle; only errors in kernels count."""
    folders = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders)) or "compute-sanitizer"
    return [
        program,
        f"--tool={tool}",
        "--error-exitcode=9",
        *(["--report-api-errors=no"] if tool == "memcheck" else []),
    ]


def this_chip() -> dict[str, str]:
    """Builds the CUDA kernels for this chip only (each chip takes as long again); fails where that is impossible."""
    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "ZINIT_CUDA": "1"}


def run_step(step: Step, limit: float, log: TextIO, console: Console) -> str:
    """Runs a step in a process group of its own, so that none of its processes outlives it; output goes to the log.

    Returns how far it came: done, failed or stopped.
    """
    log.write(f"\n===== {step.part}, {limit:.0f} s at most: {' '.join(step.command)}\n")
    log.flush()
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            step.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **step.environment},
        )  # fmt: skip
    except OSError as error:
        said(f"{step.part}: {step.command[0]} cannot be run: {error.strerror}", log, console)
        return "failed"
    try:
        code = process.wait(max(limit, 1))
    except subprocess.TimeoutExpired:
        stop(process)
        said(f"{step.part}: stopped after its {limit:.0f} s; what it had is kept", log, console)
        return "stopped"
    except KeyboardInterrupt:
        stop(process)
        raise
    failed = f"failed with exit code {code}, see the log" if code else "done"
    said(f"{step.part}: {failed}, {time.monotonic() - began:.0f} s", log, console, "yellow" if code else "")
    return "failed" if code else "done"


def stop(process: subprocess.Popen[bytes]) -> None:
    """First as Ctrl-C does, so that tests and suites report what they have; then by force."""
    for how in (signal.SIGINT, signal.SIGKILL):
        os.killpg(process.pid, how)
        try:
            process.wait(GRACE)
            break
        except subprocess.TimeoutExpired:
            continue


def said(text: str, log: TextIO, console: Console, style: str = "yellow") -> None:
    console.print(text, style=style, highlight=False, soft_wrap=True)
    log.write(f"{text}\n")
    log.flush()


def main() -> int:
    known = dict.fromkeys(step.part for step in (*steps(Path()), tune(Path())))
    parser = Parser.of_module("bench.gpu_check", __doc__)
    parser.add_argument("--out", type=Path, help="ledgers, log, page and pictures go there")
    parser.add_argument(
        "--part", choices=known, metavar="PART", help=f"one instead of all: {', '.join(known)}"
    )
    parser.add_argument("--again", action="store_true", help="also what this commit has done already")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    if not torch.cuda.is_available():
        console.print(
            f"gpu-check{' PART=' + arguments.part if arguments.part else ''} needs an NVIDIA GPU that torch can use; "
            f"torch {torch.__version__} finds none (torch.cuda.is_available() is False). `make test` and `make bench` "
            "run without one.", style="red", soft_wrap=True,
        )  # fmt: skip
        return 2
    out = arguments.out.resolve() if arguments.out else None
    wanted = chosen(arguments.part, out or RESULTS)
    return check(out, wanted, console, goes_on=not arguments.again and arguments.part is None)


def check(out: Path | None, wanted: Sequence[Step], console: Console, goes_on: bool = False) -> int:
    """Runs the steps; whatever happens, the log ends with the targets, and the page is written.

    goes_on: without the steps that this commit has done already.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # as nohup and & start it: the steps would ignore it too, and be killed before they say what failed
        signal.signal(signal.SIGINT, signal.default_int_handler)
    results = out or RESULTS
    folder = results / folder_name(torch.cuda.get_device_name() if torch.cuda.is_available() else "no chip")
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(folder)
    if goes_on:
        wanted = progress.left(wanted)
        if not wanted:
            console.print(
                "every step is done for this commit; --again repeats them, PART= one part", highlight=False
            )
    began, allowed, done = time.monotonic(), 0.0, []
    with (folder / "gpu-check.log").open("a", encoding="utf-8") as log:
        try:
            for step in wanted:
                allowed += step.seconds
                progress.note(step, "begun")
                reached = run_step(step, allowed - (time.monotonic() - began), log, console)
                progress.note(step, reached)
                done.append(reached == "done")
        except KeyboardInterrupt:
            said("stopped: what was done is kept", log, console)
        finally:
            if any(
                step.part not in ("build", "proof", "test", "sanitize") for step in wanted
            ):  # which measure nothing
                conclude(results, out, log, console)
    console.print(f"everything is in {results}", highlight=False, soft_wrap=True)
    return 0 if len(done) == len(wanted) and all(done) else 1


def conclude(results: Path, out: Path | None, log: TextIO, console: Console) -> None:
    """The targets, also into the log, and the page with its pictures: into the checkout, or into OUT's docs.zip."""
    try:
        ledgers = chips(results) if any(results.glob("*/*.jsonl")) else {}
        rows = [m.row for of in ledgers.values() for m in of if m.run.conditions["device"] == "cuda"]
        for target in (Console(file=log, width=140), console):
            target.print(targets_table(targets_of("cuda"), rows))
        if not rows:
            return
        with TemporaryDirectory() as folder:
            root = Path(folder) if out else ROOT
            command = [
                sys.executable,
                "-m",
                "bench",
                "report",
                "--results",
                str(results),
                "--root",
                str(root),
            ]
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)
            if out:
                shutil.make_archive(str(out / "docs"), "zip", folder)
    except Exception as error:  # any: the figures are on disk, and the log says why there is no page
        said(f"no page: {why_failed(error)}", log, console)


if __name__ == "__main__":
    sys.exit(main())
