"""python -m zinit_kernels.convert SRC DST --to FORMAT: an adapter from one format into another.

SRC's format is recognised. Nothing is guessed, and nothing is lost silently: what the other format cannot hold is named
and refused, unless --allow-loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .checkpoints import WRITABLE, CheckpointError, save_adapter
from .checkpoints.formats import identify
from .console import Parser, printable, refuse, run
from .inspect import source_arguments, told_by


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; the exit status."""
    parser = Parser.of_module("zinit_kernels.convert", __doc__)
    source_arguments(parser)
    parser.add_argument(
        "destination", type=Path, metavar="DST", help="the file to write; with --to peft a folder"
    )
    parser.add_argument(
        "--to", choices=WRITABLE, default="zinit", help="the format to write (default: zinit)"
    )
    parser.add_argument("--allow-loss", action="store_true", help="write only what DST's format can hold")
    told = parser.parse_args(arguments)
    try:
        format, checkpoint = identify(told.source, told_by(told))
        save_adapter(told.destination, checkpoint, told.to, allow_loss=told.allow_loss)
    except (CheckpointError, OSError) as error:
        return refuse(error)
    layers = checkpoint.layers
    print(
        printable(
            f"{told.source} ({format}) -> {told.destination} ({told.to}): {checkpoint.prompts.shape[1]} prompts in "
            f"layers {layers[0]} to {layers[-1]}, {checkpoint.gate_activation} gates"
        )
    )
    if told.to == "litgpt" and checkpoint.layout == "blocked":
        print(
            "note: litgpt from 0.5.5 on projects prompts by other rows of qkv than this adapter was trained through; "
            "zinit_kernels.integrations.litgpt.accelerate(model, layout='blocked') takes the right ones"
        )
    return 0


if __name__ == "__main__":
    run(main)
