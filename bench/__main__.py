"""The benchmarks: every part of the project against every other implementation, on this machine.

    python -m bench attention decode           # suites; their rows are appended to bench/results/<chip>/
    python -m bench all --resume               # every suite but seven_billion; after a Ctrl-C, what is left
    python -m bench all --smoke                # every suite on tiny shapes, in under a minute; keeps nothing
    python -m bench targets dropins verify     # what the targets are stated for; ends in a table of the targets
    python -m bench targets --base HEAD~3      # this tree and another commit, in turns
    python -m bench seven_billion              # a base of 7B shape; writes 13.5 GB into --scratch
    python -m bench verdicts                   # the table of the targets again, from the ledgers
    python -m bench agree attention            # how far the speed-ups of one commit's last two runs differ
    python -m bench profile train              # where the time goes: a trace, the top operators, the machine's limits
    python -m bench project --chip h200        # what the Triton kernels would take there, from their machine code
    python -m bench report                     # ledgers -> docs/benchmarks.md, its pictures, the README's table

A provider whose result differs from the float64 reference gets no figure. Figures are medians of interleaved rounds.
Speeds are stated as "times as fast": above 1 is faster.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from model.program import refuse_several_processes
from zinit_kernels.console import Parser, refuse
from zinit_kernels.console import run as run_program

from .ledger import BenchError, chips, renamed
from .machine import ROOT, why_missing
from .measure import profile_call
from .project.chips import CHIPS, TILED
from .report.page import device_of, page, readme_block, with_block
from .report.plots import draw
from .report.tables import terminal_table
from .runner import COMPILING, Options, judged, run, suites, targets_of, targets_table
from .suites.compare import agreement, compare_commits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESULTS = ROOT / "bench" / "results"
NOTHING = "nothing was measured: no shape, provider or job has such a name, or none can run here"


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    convert.__name__ = kind.__name__  # argparse names it where the text is no number
    return convert


def device(text: str) -> torch.device:
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a device: use cpu or cuda") from error
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text} is not supported: use cpu or cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"torch {torch.__version__} finds no GPU {text}: use cpu")
    return found


def suite_name(*others: str) -> Callable[[str], str]:
    """A suite's name, by an old name too, or one of `others`."""

    def convert(text: str) -> str:
        if (name := renamed(text)) not in (*suites(), *others):
            raise argparse.ArgumentTypeError(
                f"there is no suite {text}: use {', '.join((*suites(), *others))}"
            )
        return name

    return convert


def command_parser(name: str, about: str, *, results: bool = False) -> Parser:
    parser = Parser(prog=f"python -m bench {name}", description=about)
    if results:
        add_results(parser)
    return parser


def add_results(parser: Parser) -> None:
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the ledgers (default bench/results)"
    )


def add_device(parser: Parser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=device, default=default, help=f"cpu or cuda (default here: {default})"
    )


def measure_parser() -> Parser:
    parser = Parser.of_module("bench", __doc__)
    names = ", ".join((*suites(), "all"))
    parser.add_argument("suites", nargs="+", type=suite_name("all"), metavar="suite", help=names)
    add_device(parser)
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable (default: all that fit)")
    parser.add_argument(
        "--seconds", type=positive(float), default=2.0, help="of rounds per setting (default 2)"
    )
    parser.add_argument("--threads", type=positive(int), help="of torch on a CPU (default: torch's choice)")
    parser.add_argument("--shape", action="append", default=[], help="only shapes with this in their name")
    parser.add_argument(
        "--provider", action="append", default=[], help="only providers with this in their name"
    )
    parser.add_argument(
        "--only", action="append", default=[], type=renamed,
        help='only jobs with this in their title: "targets, forward"',
    )  # fmt: skip
    parser.add_argument(
        "--cold", action="store_true", help="also with the last-level cache emptied before each call"
    )
    parser.add_argument(
        "--compile", choices=COMPILING, default="few",
        help="shapes at which providers that compile for 20 s a call are measured too (default few)",
    )  # fmt: skip
    add_results(parser)
    parser.add_argument(
        "--resume", action="store_true", help="skip the jobs that this commit has finished here"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, a moment each; keeps nothing")
    parser.add_argument(
        "--scratch", type=Path, help="folder for large files (default: the system's for temporary files)"
    )
    parser.add_argument("--base", metavar="REV", help="measure this commit too, in turns, and compare")
    parser.add_argument("--turns", type=positive(int), default=3, help="of each tree with --base (default 3)")
    return parser  # fmt: skip


def measure_command(command: list[str], console: Console) -> int:
    arguments = measure_parser().parse_args(command)
    refuse_several_processes()  # they would slow each other down
    if arguments.base:
        if arguments.smoke:
            raise BenchError("--base compares figures, and --smoke keeps none: leave one of them out.")
        if arguments.results != RESULTS or arguments.resume:
            raise BenchError(
                "--base keeps no ledger, so it has no use for --results or --resume: leave them out."
            )
        return compare_command(arguments, command, console)
    if arguments.scratch and not arguments.scratch.is_dir():
        raise BenchError(f"--scratch {arguments.scratch} is not a folder.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    default = ("bfloat16",) if arguments.device.type == "cuda" else ("float32", "bfloat16")
    options = Options(
        device=arguments.device,
        dtypes=tuple(DTYPES[name] for name in arguments.dtype or default),
        seconds=0.01 if arguments.smoke else arguments.seconds,
        smoke=arguments.smoke,
        compiled="none" if arguments.smoke else arguments.compile,
        cold=(False, True) if arguments.cold else (False,),
        only_shapes=tuple(arguments.shape),
        only_providers=tuple(arguments.provider),
        only_jobs=tuple(arguments.only),
        resume=arguments.resume,
        scratch=arguments.scratch,
    )
    wanted = {
        name: suite
        for name, suite in suites().items()
        if name in arguments.suites or ("all" in arguments.suites and suite.in_all)
    }
    with tempfile.TemporaryDirectory() as nowhere:
        results = Path(nowhere) if arguments.smoke else arguments.results
        rows, failed = run({n: s.jobs(options) for n, s in wanted.items()}, options, results, console)
    for name in wanted:
        if found := [row for row in rows if row.suite == name]:
            console.print(terminal_table(name, found))
    if not rows and not failed and not options.resume:
        raise BenchError(NOTHING)
    targets = [target for target in targets_of(options.device.type) if judged(target, rows).figures]
    if targets and not arguments.smoke:
        console.print(targets_table(targets, rows))
    return 1 if failed else 0


def compare_command(arguments: argparse.Namespace, command: list[str], console: Console) -> int:
    mine = Parser(add_help=False, allow_abbrev=False)
    mine.add_argument("--base")
    mine.add_argument("--turns")
    _, shared = mine.parse_known_args(command)
    table, slower = compare_commits(arguments.base, shared, arguments.turns, console)
    console.print(table)
    if not table.row_count:
        raise BenchError(NOTHING)
    console.print(f"{len(slower)} of {table.row_count} rows are slower by more than 3 % in every turn")
    for line in slower:
        console.print(f"slower: {line}", highlight=False, soft_wrap=True)
    return 1 if slower else 0


def report_command(command: list[str], console: Console) -> int:
    parser = command_parser("report", "Writes the page, its pictures and the README's table.", results=True)
    parser.add_argument("--root", type=Path, default=ROOT, help="writes docs/ there, and README.md's table")
    arguments = parser.parse_args(command)
    for path in write_report(arguments.results, arguments.root):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return 0


def write_report(results: Path, root: Path) -> list[Path]:
    """Writes all that is made from the ledgers, and deletes pictures of these chips that are not made any more."""
    measured, known = chips(results), suites()
    figures, readme = root / "docs" / "figures", root / "README.md"
    if readme.exists():
        with_block(readme.read_text(), "")  # before anything is written: it may have no place for the table
    figures.mkdir(parents=True, exist_ok=True)
    pictures = {folder: draw(rows, known, figures, folder) for folder, rows in measured.items()}
    for folder in measured:
        for path in figures.iterdir():
            if re.fullmatch(rf"{folder}-[a-z_]+\.png", path.name) and path.name not in pictures[folder]:
                path.unlink()
    texts = {root / "docs" / "benchmarks.md": page(measured, known, pictures)}
    if readme.exists():
        texts[readme] = with_block(readme.read_text(), readme_block(measured, pictures))
    for path, text in texts.items():
        path.write_text(text)
    return [*texts, *(figures / name for found in pictures.values() for name in found)]


def verdicts_command(command: list[str], console: Console) -> int:
    parser = command_parser("verdicts", "The table of the targets, from the ledgers.", results=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only chips of this kind (default: all)")
    arguments = parser.parse_args(command)
    for folder, measured in chips(arguments.results).items():
        kind = device_of(measured)
        if arguments.device in (None, kind):
            console.print(f"{folder}:", highlight=False)
            console.print(targets_table(targets_of(kind), [m.row for m in measured]))
    return 0


def agree_command(command: list[str], console: Console) -> int:
    about = "How far the speed-ups of two runs under the same conditions differ; exit code 1 above --within."
    parser = command_parser("agree", about, results=True)
    parser.add_argument("suites", nargs="*", type=suite_name(), metavar="suite", help="default: all")
    parser.add_argument("--within", type=positive(float), default=0.1, help="a share (default 0.1)")
    arguments = parser.parse_args(command)
    table, agree = agreement(arguments.results, arguments.suites or list(suites()), arguments.within)
    console.print(table)
    return 0 if agree else 1


def profile_command(command: list[str], console: Console) -> int:
    about = "Profiles a suite's call: a trace for https://ui.perfetto.dev, the top operators, the machine's limits."
    parser = command_parser("profile", about)
    parser.add_argument("what", choices=[name for name, suite in suites().items() if suite.profiled])
    add_device(parser)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32"
    )
    parser.add_argument("--out", type=Path, default=Path("out/profile"), help="folder of the trace")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one step")
    arguments = parser.parse_args(command)
    refuse_several_processes()
    dtype = DTYPES[arguments.dtype or ("bfloat16" if arguments.device.type == "cuda" else "float32")]
    options = Options(arguments.device, (dtype,), smoke=arguments.smoke)
    profiled = suites()[arguments.what].profiled
    assert profiled is not None
    trace = arguments.out / f"{arguments.what}.json"
    profile_call(*profiled(options), arguments.device, dtype, trace, arguments.smoke, console)
    console.print(f"wrote {trace}: open it at https://ui.perfetto.dev", highlight=False, soft_wrap=True)
    return 0


def project_command(command: list[str], console: Console) -> int:
    about = (
        "What the Triton kernels would take on a chip: a projection from their machine code and the chip's published "
        "figures. No GPU runs anything. Needs triton, and takes up to a minute."
    )
    parser = command_parser("project", about)
    parser.add_argument("--chip", choices=CHIPS, default="h200", help="default: h200")
    parser.add_argument(
        "--mode", action="append", choices=("forward", "backward", "decode"), help="repeatable (default: all)"
    )
    parser.add_argument("--shape", action="append", default=[], help="only shapes with this in their name")
    parser.add_argument(
        "--tiles", choices=TILED, default="", help="project each tile that tuning would try for this kernel"
    )
    parser.add_argument(
        "--tutorial", type=Path, metavar="FILE",
        help="check the model: Triton's 06-fused-attention.py, against its published speeds on an H100; exit code 1 "
        "where one differs by more than 15 %%",
    )  # fmt: skip
    arguments = parser.parse_args(command)
    if missing := why_missing("triton"):
        raise BenchError(f"{missing}: pip install 'zinit_kernels[triton]'")
    from .project import command as project

    modes = arguments.mode or ["forward", "backward", "decode"]
    return project.run(arguments.chip, modes, arguments.shape, arguments.tiles, arguments.tutorial, console)


COMMANDS = {
    "project": project_command,
    "report": report_command,
    "verdicts": verdicts_command,
    "goals": verdicts_command,  # its name until November 2026, as "bars" was that of the suite "targets"
    "agree": agree_command,
    "profile": profile_command,
}


def main(command: list[str] | None = None) -> int:
    command = sys.argv[1:] if command is None else command
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        if command and command[0] in COMMANDS:
            return COMMANDS[command[0]](command[1:], console)
        return measure_command(command, console)
    except BenchError as error:
        return refuse(error)


if __name__ == "__main__":
    run_program(main)
