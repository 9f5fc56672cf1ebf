"""python -m zinit_kernels.inspect SRC: what an adapter file is, layer by layer."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .checkpoints.adapter import AdapterCheckpoint, CheckpointError, Told, name_of
from .checkpoints.formats import identify
from .checkpoints.litgpt import LAYOUTS
from .console import Parser, refuse, run, shortened


def describe(format: str, checkpoint: AdapterCheckpoint) -> str:
    """One line per fact and per layer. Gates are shown as the attention applies them, after their activation."""
    prompts, gates = checkpoint.prompts, checkpoint.gates.float()
    effective = gates.tanh() if checkpoint.gate_activation == "tanh" else gates
    lines = [
        f"format      {format}",
        f"prompts     {prompts.shape[1]} in each of {len(checkpoint.layers)} layers of {checkpoint.num_layers}, "
        f"hidden size {checkpoint.hidden_size}, {name_of(prompts.dtype)}",
        f"gates       {gates.shape[1]} a layer, {checkpoint.gate_activation}, {name_of(checkpoint.gates.dtype)}",
        f"heads       {checkpoint.num_heads or 'not said'}",
    ]
    if checkpoint.layout != "blocked":
        lines.append(f"layout      {checkpoint.layout}")
    for name, value in sorted(checkpoint.metadata.items()):
        lines.append(f"{shortened(name):<11} {shortened(value)}")
    families = Counter(name.rsplit(".", 2)[0].rstrip(".0123456789") for name in checkpoint.extras)
    if checkpoint.extras:
        lines.append(
            f"beside      {len(checkpoint.extras)} tensors of {shortened(checkpoint.extras_format)}, kept:"
        )
        lines += [f"            {count:4} {shortened(family)}" for family, count in sorted(families.items())]
    lines.append("layer   gate: mean      min      max   prompts: rms")
    for layer, prompt, gate in zip(checkpoint.layers, prompts.float(), effective, strict=True):
        rms = float(prompt.square().mean().sqrt())
        lines.append(
            f"{layer:5}   {float(gate.mean()):+10.4f} {float(gate.min()):+8.4f} {float(gate.max()):+8.4f}   {rms:12.4f}"
        )
    return "\n".join(lines)


def source_arguments(parser: argparse.ArgumentParser) -> None:
    """The adapter to read, and what its file may not say."""
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="an adapter's file, or a folder that holds one"
    )
    parser.add_argument(
        "--prompt-length", type=int, metavar="P", help="prompts per layer (official files; default 10)"
    )
    parser.add_argument(
        "--activation",
        choices=("tanh", "identity"),
        help="of the gates, instead of what the format says; identity reproduces the published V1 inference code",
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS, help="of a litgpt file: interleaved if trained by 0.5.5 or newer"
    )
    parser.add_argument("--num-heads", type=int, metavar="H", help="of the base, if the file does not say")
    parser.add_argument(
        "--stack", metavar="NAME", help="which layers of a saved model, if it has several adapted stacks"
    )


def told_by(options: argparse.Namespace) -> Told:
    """The answers to `source_arguments`."""
    return Told(options.prompt_length, options.layout, options.stack, options.activation, options.num_heads)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; the exit status."""
    parser = Parser(prog="python -m zinit_kernels.inspect", description=__doc__)
    source_arguments(parser)
    told = parser.parse_args(arguments)
    try:
        # a litgpt file can be looked at without knowing which rows it was trained through
        found = identify(told.source, told_by(told)._replace(layout=told.layout or "blocked"))
    except (CheckpointError, OSError) as error:
        return refuse(error)
    print(describe(*found))
    return 0


if __name__ == "__main__":
    run(main)
