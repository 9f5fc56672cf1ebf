"""The commands ner and srl: named entities and semantic roles."""

from __future__ import annotations

from ..shared import UserError
from .command import Defaults, command, digest_of, finish, parser_of, plan_of, run_of
from .tagging import Tagging
from .token_files import LAYOUT, files_of

ALL = ("head", "bias", "one-softmax", "random-gates", "lora", "zero-init")


def _run(name: str, about: str, roles: bool, arguments: list[str]) -> None:
    parser = parser_of(name, about, LAYOUT, Defaults(ALL, steps=500, batch_size=32))
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a sentence (default: 128)")
    options = parser.parse_args(arguments)
    plan = plan_of(options)
    if options.max_length < 8:
        raise UserError(f"--max-length must be at least 8, got {options.max_length}.")
    files = files_of(options.data)
    task = Tagging(options.base, options.data, roles, options.max_length)
    run = run_of(name, options, plan, digest_of(files), {"max_length": options.max_length})
    finish(task, plan, options, run)


@command
def ner(arguments: list[str]) -> None:
    """Named entities: `python -m evaluate ner`."""
    _run("ner", "Named entities in CoNLL columns, F1 as seqeval and conlleval count it", False, arguments)


@command
def srl(arguments: list[str]) -> None:
    """Semantic roles: `python -m evaluate srl`."""
    _run("srl", "Semantic roles by sentence and predicate, F1 of the spans", True, arguments)
