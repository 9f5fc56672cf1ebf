"""python -m zinit_kernels.convert SRC DST --to FORMAT: an adapter from one format into another.

SRC's format is recognised. Nothing is guessed and nothing is lost without a word: what the other format cannot hold is
refused, and named, unless --allow-loss.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .checkpoints import FORMATS, CheckpointError, save_adapter
from .checkpoints.formats import identify
from .inspect import refuse, source_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m zinit_kernels.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="an adapter file, or PEFT's folder")
    parser.add_argument("destination", metavar="DST", help="the file to write; with --to peft a folder")
    parser.add_argument("--to", choices=FORMATS, default="zinit", help="the format to write (default: zinit)")
    parser.add_argument("--allow-loss", action="store_true", help="write what DST's format can hold of it")
    source_arguments(parser)
    told = parser.parse_args(arguments)
    try:
        format, checkpoint = identify(
            told.source, told.prompt_length, told.activation, told.layout, told.num_heads
        )
        save_adapter(told.destination, checkpoint, told.to, allow_loss=told.allow_loss)
    except (CheckpointError, OSError) as error:
        return refuse(error)
    layers = checkpoint.layers
    print(
        f"{told.source} ({format}) -> {told.destination} ({told.to}): {checkpoint.prompts.shape[1]} prompts in layers "
        f"{layers[0]} to {layers[-1]}, {checkpoint.gate_activation} gates"
    )
    if told.to == "litgpt" and checkpoint.layout == "blocked":
        print(
            "note: litgpt from 0.5.5 on projects prompts by other rows of qkv than this adapter was trained through; "
            "zinit_kernels.integrations.litgpt.accelerate(model, layout='blocked') takes the right ones"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
