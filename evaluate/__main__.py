"""The benchmarks of the LLaMA-Adapter paper, each one command.

python -m evaluate mme --base DIR --adapter FILE --data DIR --out DIR    ask a model, and score its answers
python -m evaluate mme --answers DIR                                     score answers that are there already

"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

from zinit_kernels.console import shown

from .benchmark_command import run as run_benchmark
from .benchmarks import all_benchmarks
from .shared import UserError, command_name, run_program

Command = Callable[[Sequence[str]], None]


def commands() -> dict[str, tuple[str, Command]]:
    """Name -> one line about it, and what runs it."""
    found = all_benchmarks()
    return {name: (benchmark.about, partial(run_benchmark, benchmark)) for name, benchmark in found.items()}


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
