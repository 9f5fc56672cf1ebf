"""python -m zinit_kernels.inspect SRC: what an adapter file is, layer by layer."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

from .checkpoints.adapter import AdapterCheckpoint, CheckpointError
from .checkpoints.formats import identify
from .checkpoints.litgpt import LAYOUTS


def describe(format: str, checkpoint: AdapterCheckpoint) -> str:
    """One line per fact and per layer; the gate as the attention applies it, after its activation."""
    prompts, gates = checkpoint.prompts, checkpoint.gates.float()
    effective = gates.tanh() if checkpoint.gate_activation == "tanh" else gates
    lines = [
        f"format      {format}",
        f"prompts     {prompts.shape[1]} in each of {len(checkpoint.layers)} layers of {checkpoint.num_layers}, "
        f"hidden size {checkpoint.hidden_size}, {str(prompts.dtype).removeprefix('torch.')}",
        f"gates       {gates.shape[1]} a layer, {checkpoint.gate_activation}, "
        f"{str(checkpoint.gates.dtype).removeprefix('torch.')}",
        f"heads       {checkpoint.num_heads or 'not said'}",
    ]
    if checkpoint.layout != "blocked":
        lines.append(f"layout      {checkpoint.layout}")
    lines += [f"{name:<11} {value}" for name, value in sorted(checkpoint.metadata.items())]
    families = Counter(name.rsplit(".", 2)[0].rstrip(".0123456789") for name in checkpoint.extras)
    if checkpoint.extras:
        lines.append(f"beside      {len(checkpoint.extras)} tensors of {checkpoint.extras_format}, kept:")
        lines += [f"            {count:4} {family}" for family, count in sorted(families.items())]
    lines.append("layer   gate: mean      min      max   prompts: rms")
    for layer, prompt, gate in zip(checkpoint.layers, prompts.float(), effective, strict=True):
        rms = float(prompt.square().mean().sqrt())
        lines.append(
            f"{layer:5}   {float(gate.mean()):+10.4f} {float(gate.min()):+8.4f} {float(gate.max()):+8.4f}   {rms:12.4f}"
        )
    return "\n".join(lines)


def source_arguments(parser: argparse.ArgumentParser) -> None:
    """What a file may not say about itself."""
    parser.add_argument(
        "--prompt-length", type=int, metavar="P", help="prompts a layer (official files; default 10)"
    )
    parser.add_argument(
        "--activation",
        choices=("tanh", "identity"),
        help="of the gates, instead of what the format says; identity reproduces the published V1 inference code",
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS, help="of a litgpt file: interleaved if trained by 0.5.5 or newer"
    )
    parser.add_argument("--num-heads", type=int, metavar="H", help="of the base, where the file does not say")


def refuse(error: CheckpointError | OSError) -> int:
    """Shows a sentence; the exit status of bad input."""
    sentence = str(error)
    if isinstance(error, OSError):
        sentence = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or sentence
    print(f"error: {sentence}.", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zinit_kernels.inspect", description=__doc__)
    parser.add_argument("source", metavar="SRC", help="an adapter file, or PEFT's folder")
    source_arguments(parser)
    told = parser.parse_args(arguments)
    try:
        # a litgpt file can be looked at without knowing the rows it was trained through
        found = identify(
            told.source, told.prompt_length, told.activation, told.layout or "blocked", told.num_heads
        )
    except (CheckpointError, OSError) as error:
        return refuse(error)
    print(describe(*found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
