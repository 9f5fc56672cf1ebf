"""The benchmarks of the LLaMA-Adapter paper, each one command.

python -m evaluate mme --base DIR --adapter FILE --data DIR --out DIR    ask a model, and score its answers
python -m evaluate mme --answers DIR                                     score answers that are there already
python -m evaluate vtab --base DIR --data DIR --out DIR                  adapt a transformers model in several ways

"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial

from zinit_kernels.console import shown

from .benchmark_command import run as run_benchmark
from .benchmarks import all_benchmarks
from .judge_command import main as run_judge
from .report import main as run_report
from .shared import UserError, command_name, run_program

Command = Callable[[Sequence[str]], None]
# name -> a line about it, its module in finetune/, and the function there. Imported late: transformers takes seconds.
FINE_TUNING = {
    "vtab": ("VTAB-1k and image classification of that kind, by its protocol", "vtab", "main"),
    "base-to-novel": ("CLIP learns half of the classes, and is tested on both halves", "base_to_novel", "main"),
    "ner": ("named entities in CoNLL files, span F1", "ner", "ner"),
    "srl": ("semantic roles by sentence and predicate, span F1", "ner", "srl"),
    "squad": ("SQuAD 1.1 and 2.0, exact match and F1", "squad", "main"),
    "instruct": ("zero-init prompts beside LoRA of several ranks, on instruction data", "instruct", "main"),
}  # fmt: skip


def commands() -> dict[str, tuple[str, Command]]:
    """Name -> one line about it, and what runs it."""
    found: dict[str, tuple[str, Command]] = {
        name: (benchmark.about, partial(run_benchmark, benchmark))
        for name, benchmark in all_benchmarks().items()
    }
    found["judge"] = ("two models' answers to open questions, compared by a third model", run_judge)
    for name, (about, *place) in FINE_TUNING.items():
        found[name] = (about, partial(_fine_tune, *place))
    found["report"] = ("docs/results.md from the ledgers of this checkout", run_report)
    return found


def _fine_tune(module: str, function: str, arguments: Sequence[str]) -> None:
    getattr(importlib.import_module(f"{__package__}.finetune.{module}"), function)(arguments)


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Runs the command named first with the arguments behind it."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    known = commands()
    if not given or given[0] in ("-h", "--help"):
        width = max(map(len, known))
        lines = [f"    {name:<{width}}  {about}" for name, (about, _) in known.items()]
        text = (__doc__ or "").replace("python -m evaluate", command_name()).rstrip()
        print("\n".join([text, "", *lines]), file=sys.stdout if given else sys.stderr)
        return 0 if given else 2
    name, *rest = given
    if name not in known:
        raise UserError(f"{command_name()} has no command {shown(name)}; it has {', '.join(known)}")
    known[name][1](rest)
    return None


if __name__ == "__main__":
    run_program(main)
