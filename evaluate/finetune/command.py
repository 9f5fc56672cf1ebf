"""What the fine-tuning commands share: their options, their ledger's identity, and their table."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from zinit_kernels.console import Parser

from ..asking import Interrupted
from ..ledgers import Entry, table_of
from ..lines import write_result
from ..models import identity
from ..question import Quoted, Table
from ..shared import UserError, command_name, default_device, messages, open_device, program
from ..tables import as_json, show, with_quoted
from .checkpoint import quiet
from .methods import ABOUT, LEARNING_RATES, Size
from .protocol import Plan, Task, compare

INTERRUPTED = 130  # what a shell reports for Ctrl-C


class Defaults:
    """Of one command."""

    def __init__(self, methods: Sequence[str], steps: int, batch_size: int, seeds: Sequence[int] = (0, 1, 2)):
        self.methods, self.steps, self.batch_size, self.seeds = methods, steps, batch_size, seeds


def parser_of(name: str, description: str, layout: str, defaults: Defaults) -> Parser:
    """The options that all of these commands have."""
    parser = Parser(prog=command_name(name), description=f"{description}. --data: {layout}.")
    parser.add_argument("--base", type=Path, required=True, help="folder of a transformers checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the ledger; the same command goes on there"
    )
    about = "; ".join(f"{method}: {text}" for method, text in ABOUT.items())
    parser.add_argument(
        "--methods",
        default=",".join(defaults.methods),
        help=f"default: %(default)s. {about}".replace("N(0, 1)", "a normal"),
    )
    parser.add_argument(
        "--steps", type=int, default=defaults.steps, help="of each training (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help="default: %(default)s")
    seeds = ",".join(map(str, defaults.seeds))
    parser.add_argument("--seeds", default=seeds, help="one test each (default: %(default)s)")
    parser.add_argument("--prompt-length", type=int, default=10, help="prompts a layer (default: 10)")
    parser.add_argument(
        "--num-layers", type=int, default=30, help="topmost layers that get prompts (default: 30)"
    )
    parser.add_argument(
        "--learning-rates", action="append", default=[], metavar="METHOD=RATE,RATE",
        help="to choose among on the validation data; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--head-learning-rate", type=float, default=1e-2, help="beside a method (default: 0.01)"
    )
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    return parser


def plan_of(options: Any, with_head: bool = True) -> Plan:
    """The plan that the options ask for. Raises UserError for values out of range."""
    for name, most in (("steps", None), ("batch_size", None), ("prompt_length", 128), ("num_layers", None)):
        value = getattr(options, name)
        if value < 1 or (most is not None and value > most):
            bound = f"at least 1{f' and at most {most}' if most else ''}"
            raise UserError(f"--{name.replace('_', '-')} must be {bound}, got {value}.")
    if not 0 < options.head_learning_rate < 1e6:
        raise UserError(f"--head-learning-rate must be above 0, got {options.head_learning_rate}.")
    methods = _unique([word.strip() for word in options.methods.split(",")], "--methods")
    rates = {}
    for text in options.learning_rates:
        method, mark, values = text.partition("=")
        if not mark or method in rates:
            raise UserError(f"--learning-rates must be METHOD=RATE,RATE, once for each method, got {text!r}.")
        if method not in methods and method not in LEARNING_RATES:
            raise UserError(f"--learning-rates names {method!r}, which is none of {', '.join(methods)}.")
        rates[method] = _numbers(values, "--learning-rates", float)
        if not all(0 < rate < 1e6 for rate in rates[method]):
            raise UserError(f"--learning-rates must be above 0, got {text!r}.")
    seeds = _numbers(options.seeds, "--seeds", int)
    if not all(0 <= seed < 1 << 31 for seed in seeds):
        raise UserError(f"--seeds must lie in 0 .. 2**31 - 1, got {options.seeds!r}.")
    return Plan(
        methods, seeds, options.steps, options.batch_size, Size(options.prompt_length, options.num_layers),
        options.head_learning_rate, with_head, open_device(options.device), rates,
    )  # fmt: skip


def _numbers(text: str, option: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return _unique([kind(word) for word in text.split(",")], option)
    except ValueError as error:
        raise UserError(f"{option} takes numbers with commas between, got {text!r}.") from error


def _unique(values: list[Any], option: str) -> list[Any]:
    if len(set(values)) < len(values):
        raise UserError(f"{option} names one of {', '.join(map(str, values))} twice.")
    return values


def run_of(
    command: str, options: Any, plan: Plan, data: str, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What tells a run from another one: its base, data and settings. Methods, seeds and rates may grow."""
    return {
        "command": command, "base": identity(options.base, None)["base"], "data": data, "steps": plan.steps,
        "batch_size": plan.batch_size, "prompts": list(plan.size), "head_learning_rate": plan.head_learning_rate,
        **(more or {}),
    }  # fmt: skip


def digest_of(paths: Iterable[Path]) -> str:
    """Of the files' contents, in order."""
    found = hashlib.sha256()
    for path in paths:
        found.update(path.name.encode("utf-8", "surrogateescape") + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def guarded(run: Callable[[list[str]], None], arguments: Sequence[str]) -> None:
    """Runs a command with what all of them need: one process, one sentence where memory ends."""
    quiet()
    program("lower --batch-size")(run)(list(arguments))


def finish(
    task: Task, plan: Plan, options: Any, run: Mapping[str, Any], quoted: Sequence[Quoted] = ()
) -> None:
    """Compares, and shows the table. Exits with status 130 after Ctrl-C."""
    entries = interruptible_compare(task, plan, options.out, run)
    report([with_quoted(table_of(task.title, entries, run), quoted)], options.out, run)


def interruptible_compare(
    task: Task, plan: Plan, out: Path, run: Mapping[str, Any], name: str = ""
) -> list[Entry]:
    """`compare`; exits with status 130 after Ctrl-C."""
    try:
        return compare(task, plan, out, run, name)
    except Interrupted as stopped:
        messages().print(f"interrupted: {stopped}; the same command goes on from there.")
        sys.exit(INTERRUPTED)


def report(tables: Sequence[Table], out: Path, run: Mapping[str, Any]) -> None:
    """Shows the tables, and writes them as result.json."""
    write_result(out, as_json(tables, dict(run)))
    show(tables)


def command(run: Callable[[list[str]], None]) -> Callable[[Sequence[str]], None]:
    """A command of a function of the arguments."""
    return partial(guarded, run)
