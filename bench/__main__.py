"""The benchmarks: every part against every peer, on whatever machine this is.

    python -m bench attention decode           # suites, appended to bench/results/<chip>/
    python -m bench all --resume               # every suite; again after a Ctrl-C: what is left of it
    python -m bench all --smoke                # every suite on tiny shapes, in under a minute, kept nowhere
    python -m bench bars dropins verify        # what the goals are stated for; ends in the goals, met or missed
    python -m bench goals                      # the goals again, from the ledgers
    python -m bench agree attention            # the last two runs of one commit: how far their ratios differ
    python -m bench profile train              # where the time goes: trace, top kernels, roofline
    python -m bench report                     # ledgers -> docs/benchmarks.md, its pictures, the README's table

A provider whose result differs from the float64 reference gets no figure. Figures are medians of interleaved rounds;
only ratios within a run are compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from . import page, profile, report, runner
from .agreement import agreement
from .chapters import chapters
from .compare import CompareError, compare
from .goals import goals_table, judged
from .ledger import LedgerError
from .suites import SUITES
from .tables import suite_table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESULTS = Path(__file__).resolve().parent / "results"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    suites = (*SUITES, "all")
    parser.add_argument("suites", nargs="+", choices=suites, metavar="suite", help=", ".join(suites))
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="may be repeated (default: all that fit)"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of rounds per setting (default 2)")
    parser.add_argument("--threads", type=int, help="of torch on a CPU (default: torch's own choice)")
    parser.add_argument("--shape", action="append", default=[], help="only shapes with this in their name")
    parser.add_argument(
        "--provider", action="append", default=[], help="only providers with this in their name"
    )
    parser.add_argument(
        "--cold", action="store_true", help="also with the last-level cache emptied before each call"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="the ledgers' folder (default bench/results)"
    )
    parser.add_argument(
        "--base", metavar="REV", help="measure this commit too, in turns, and print both times"
    )
    parser.add_argument(
        "--compile",
        choices=runner.COMPILING,
        default="few",
        help="shapes at which what compiles for 20 s a call is measured too (default few: bench/shapes.py)",
    )
    parser.add_argument(
        "--only", action="append", default=[], help='only jobs with this in their title: "bars, forward"'
    )
    parser.add_argument(
        "--resume", action="store_true", help="without the jobs that this commit has done on this machine"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, a moment each; kept nowhere")
    return parser


def main(command_line: list[str] | None = None) -> int:
    command_line = sys.argv[1:] if command_line is None else command_line
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        if command_line[:1] == ["report"]:
            return report_command(command_line[1:], console)
        if command_line[:1] == ["goals"]:
            return goals_command(command_line[1:], console)
        if command_line[:1] == ["agree"]:
            return agree_command(command_line[1:], console)
        if command_line[:1] == ["profile"]:
            return profile.main(command_line[1:], console)
        arguments = parser().parse_args(command_line)
        if arguments.base:
            return compare_command(arguments, command_line, console)
        return measure_command(arguments, console)
    except (LedgerError, CompareError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 2


def report_command(command_line: list[str], console: Console) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="the ledgers' folder (default bench/results)"
    )
    parser.add_argument(
        "--root", type=Path, default=report.ROOT, help="writes docs/ there, and README.md's table"
    )
    arguments = parser.parse_args(command_line)
    for path in report.write(arguments.results, arguments.root):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return 0


def compare_command(arguments: argparse.Namespace, command_line: list[str], console: Console) -> int:
    at = command_line.index("--base") if "--base" in command_line else -1
    if at < 0 or arguments.smoke:
        raise CompareError("write --base REV as two words, and without --smoke, which keeps no figures")
    console.print(compare(arguments.base, command_line[:at] + command_line[at + 2 :], console))
    return 0


def measure_command(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    default = ("bfloat16",) if device.type == "cuda" else ("float32", "bfloat16")
    options = runner.Options(
        device=device,
        dtypes=tuple(DTYPES[name] for name in arguments.dtype or default),
        seconds=0.01 if arguments.smoke else arguments.seconds,
        smoke=arguments.smoke,
        compiled="none" if arguments.smoke else arguments.compile,
        cold=(False, True) if arguments.cold else (False,),
        only_shapes=tuple(arguments.shape),
        only_providers=tuple(arguments.provider),
        only_jobs=tuple(arguments.only),
        resume=arguments.resume,
    )
    names = list(SUITES) if "all" in arguments.suites else arguments.suites
    with tempfile.TemporaryDirectory() as nowhere:
        results = Path(nowhere) if arguments.smoke else arguments.results
        suites = {name: SUITES[name](options) for name in names}
        rows, failed = runner.run(suites, options, results, console)
    for name in names:
        console.print(suite_table(name, [row for row in rows if row.suite == name]))
    if not rows and not failed and not options.resume:
        console.print(
            "nothing was measured: no shape, or no provider, has such a name or can run here", style="red"
        )
        return 1
    goals = [goal for goal in page.GOALS[device.type] if judged(goal, rows).figures]
    if goals and not arguments.smoke:
        console.print(goals_table(goals, rows))
    return 1 if failed else 0


def goals_command(command_line: list[str], console: Console) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench goals")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="the ledgers' folder (default bench/results)"
    )
    arguments = parser.parse_args(command_line)
    for folder, measured in chapters(arguments.results).items():
        console.print(f"{folder}:", highlight=False)
        console.print(goals_table(page.goals_of(measured), [m.row for m in measured]))
    return 0


def agree_command(command_line: list[str], console: Console) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench agree")
    parser.add_argument("suites", nargs="*", metavar="suite", help="default: all")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="the ledgers' folder (default bench/results)"
    )
    parser.add_argument("--within", type=float, default=0.1, help="a share of the ratio (default 0.1)")
    arguments = parser.parse_args(command_line)
    table, agree = agreement(arguments.results, arguments.suites or list(SUITES), arguments.within)
    console.print(table)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
