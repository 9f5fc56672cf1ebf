"""The table of formats, and the way in and out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from . import litgpt, official, peft, zinit
from .adapter import AdapterCheckpoint, CheckpointError, check_numbers, some
from .files import File, read_file, write_atomically


class Format(NamedTuple):
    """How to recognise a file, read it (prompt_length, layout), and write one (allow_loss): bytes, or a folder's."""

    recognise: Callable[[File], bool]
    read: Callable[[File, int | None, str | None], AdapterCheckpoint]
    write: Callable[[AdapterCheckpoint, bool], bytes | dict[str, bytes]]


FORMATS: Mapping[str, Format] = {
    "zinit": Format(zinit.recognise, zinit.read, zinit.write),
    "official-v1": Format(official.recognise_v1, official.read_v1, official.write_v1),
    "official-v2": Format(official.recognise_v2, official.read_v2, official.write_v2),
    "peft": Format(peft.recognise, peft.read, peft.write),
    "litgpt": Format(litgpt.recognise, litgpt.read, litgpt.write),
}


def load_adapter(
    path: str | os.PathLike[str],
    *,
    prompt_length: int | None = None,
    gate_activation: str | None = None,
    layout: str | None = None,
    num_heads: int | None = None,
) -> AdapterCheckpoint:
    """Reads an adapter of any known format; `path` is a file, or PEFT's folder.

    Args:
        prompt_length: only for the official formats, which do not store it (default: what a training file's
            arguments say, else 10, refused where the gates that are not 0 belong to other layers); another format's
            must agree.
        gate_activation: replaces what the format says; "identity" reproduces the published V1 inference code,
            which applied gates trained with tanh raw.
        layout: only for litgpt, which does not store it: see `AdapterCheckpoint.layout`.
        num_heads: of the base, for PEFT's format and the first V1 release, which do not say.

    Raises:
        CheckpointError: in one sentence; OSError where the file cannot be read.
    """
    return identify(path, prompt_length, gate_activation, layout, num_heads)[1]


def identify(
    path: str | os.PathLike[str],
    prompt_length: int | None = None,
    gate_activation: str | None = None,
    layout: str | None = None,
    num_heads: int | None = None,
) -> tuple[str, AdapterCheckpoint]:
    """`load_adapter`, with the format's name."""
    if layout not in (None, *litgpt.LAYOUTS):
        raise CheckpointError(f"layout must be one of {', '.join(litgpt.LAYOUTS)}, got {layout!r}")
    file = read_file(Path(path))
    for name, known in FORMATS.items():
        if known.recognise(file):
            said = known.read(file, prompt_length, layout)
            checkpoint = replace(
                said,
                gate_activation=gate_activation or said.gate_activation,
                num_heads=num_heads if said.num_heads is None else said.num_heads,
            )
            _checked(checkpoint, file.path)
            _check_told(said, file.path, prompt_length, num_heads)
            return name, checkpoint
    raise CheckpointError(
        f"{path} is no adapter in a known format ({', '.join(FORMATS)}): it holds {some(file.tensors)}"
    )


def save_adapter(
    path: str | os.PathLike[str],
    checkpoint: AdapterCheckpoint,
    format: str = "zinit",
    *,
    allow_loss: bool = False,
) -> None:
    """Writes an adapter atomically: the file is there whole, or as it was before. "peft" writes a folder.

    Raises:
        CheckpointError: where the format has no room for something, unless allow_loss. Nothing is written then.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    path = Path(path)
    content = FORMATS[format].write(_checked(checkpoint, path), allow_loss)
    if isinstance(content, bytes):
        write_atomically(path, content)
        return
    path.mkdir(parents=True, exist_ok=True)
    for name, part in content.items():
        write_atomically(path / name, part)


def _check_told(
    checkpoint: AdapterCheckpoint, path: Path, prompt_length: int | None, num_heads: int | None
) -> None:
    """What the caller said about a file may not contradict it."""
    length = checkpoint.prompts.shape[1]
    if prompt_length not in (None, length):
        raise CheckpointError(
            f"{path} has {length} prompts in each layer, prompt_length says {prompt_length}"
        )
    if num_heads is not None and not 1 <= num_heads <= checkpoint.hidden_size:
        raise CheckpointError(
            f"{path}: num_heads must be 1 to the hidden size, {checkpoint.hidden_size}, got {num_heads}"
        )
    if None not in (num_heads, checkpoint.num_heads) and num_heads != checkpoint.num_heads:
        raise CheckpointError(f"{path} is for {checkpoint.num_heads} heads, num_heads says {num_heads}")


def _checked(checkpoint: AdapterCheckpoint, path: Path) -> AdapterCheckpoint:
    prompts, gates, layers = checkpoint.prompts, checkpoint.gates, checkpoint.layers
    rows = len(layers)
    if prompts.dim() != 3 or prompts.shape[0] != rows or prompts.shape[1] == 0:
        raise CheckpointError(f"{path}: prompts must have shape ({rows}, P, C), got {tuple(prompts.shape)}")
    heads = "Hq" if checkpoint.num_heads is None else checkpoint.num_heads
    if gates.dim() != 2 or gates.shape[0] != rows or (heads != "Hq" and gates.shape[1] not in (1, heads)):
        raise CheckpointError(
            f"{path}: gates must have shape ({rows}, 1 or {heads}), got {tuple(gates.shape)}"
        )
    if checkpoint.gate_activation not in ("tanh", "identity"):
        raise CheckpointError(
            f"{path}: gate_activation must be tanh or identity, got {checkpoint.gate_activation!r}"
        )
    if (
        list(layers) != sorted(set(layers))
        or not rows
        or layers[0] < 0
        or layers[-1] >= checkpoint.num_layers
    ):
        raise CheckpointError(
            f"{path}: layers {list(layers)} are not layers of {checkpoint.num_layers}, in order"
        )
    if checkpoint.layout not in litgpt.LAYOUTS:
        raise CheckpointError(f"{path}: layout must be blocked or interleaved, got {checkpoint.layout!r}")
    check_numbers(path, (prompts, gates))
    return checkpoint
