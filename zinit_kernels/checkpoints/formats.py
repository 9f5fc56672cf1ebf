"""The table of formats, and the way in and out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..console import shown
from . import litgpt, official, peft, trainer, zinit
from .adapter import MOST_LAYERS, AdapterCheckpoint, CheckpointError, Told, check_numbers, some
from .files import File, read_file
from .writing import write_together


class Format(NamedTuple):
    """One file format."""

    recognise: Callable[[File], bool]
    read: Callable[[File, Told], AdapterCheckpoint]
    # given allow_loss: the bytes of a file, or of each file of a folder. None: the format is only read
    write: Callable[[AdapterCheckpoint, bool], bytes | dict[str, bytes]] | None


FORMATS: Mapping[str, Format] = {
    "zinit": Format(zinit.recognise, zinit.read, zinit.write),
    "official-v1": Format(official.recognise_v1, official.read_v1, official.write_v1),
    "official-v2": Format(official.recognise_v2, official.read_v2, official.write_v2),
    "peft": Format(peft.recognise, peft.read, peft.write),
    "litgpt": Format(litgpt.recognise, litgpt.read, litgpt.write),
    "trainer": Format(trainer.recognise, trainer.read, None),
}
WRITABLE = tuple(name for name, format in FORMATS.items() if format.write is not None)


def load_adapter(
    path: str | os.PathLike[str],
    *,
    prompt_length: int | None = None,
    gate_activation: str | None = None,
    layout: str | None = None,
    num_heads: int | None = None,
    stack: str | None = None,
) -> AdapterCheckpoint:
    """Reads an adapter of any known format.

    Args:
        path: a file, or a folder that holds one: of `python -m model.train`, `integrations.transformers.save_adapter`,
            PEFT or litgpt, or a checkpoint of transformers' Trainer.
        prompt_length: for the official formats, which do not store it. Default: what a training file's arguments say,
            else 10; refused if the gates that are not 0 then belong to other layers. It must agree with a format that
            does store it.
        gate_activation: "tanh" or "identity", in place of what the format says. "identity" reproduces the published V1
            inference code, which applied gates without the tanh that they were trained with.
        layout: for litgpt, which does not store it: see `AdapterCheckpoint.layout`.
        num_heads: of the base, for PEFT's format and for one gate per layer, which do not say.
        stack: which stack of layers, for a saved model that has several, e.g. CLIP's "vision_model.encoder.layers".

    Raises:
        CheckpointError: no adapter, a damaged one, or one that does not say enough; one sentence. OSError where the
            file cannot be read.
    """
    return identify(path, Told(prompt_length, layout, stack, gate_activation, num_heads))[1]


def identify(path: str | os.PathLike[str], told: Told) -> tuple[str, AdapterCheckpoint]:
    """`load_adapter`, with the format's name."""
    if told.layout not in (None, *litgpt.LAYOUTS):
        raise CheckpointError(f"layout must be one of {', '.join(litgpt.LAYOUTS)}, got {told.layout!r}")
    if told.gate_activation not in (None, "tanh", "identity"):
        raise CheckpointError(f"gate_activation must be tanh or identity, got {shown(told.gate_activation)}")
    file = read_file(Path(path))
    for name, known in FORMATS.items():
        if known.recognise(file):
            said = known.read(file, told)
            checkpoint = replace(
                said,
                gate_activation=told.gate_activation or said.gate_activation,
                num_heads=told.num_heads if said.num_heads is None else said.num_heads,
            )
            _checked(checkpoint, file.path)
            _check_told(said, file.path, told.prompt_length, told.num_heads)
            return name, checkpoint
    if official.is_imagebind(file):
        raise CheckpointError(
            f"{file.path} is an ImageBind-LLM: one prompt a layer ({official.PREFIX_QUERY}), to which a feature of "
            "ImageBind is added; it is not read here, as no encoder of transformers gives that feature"
        )
    raise CheckpointError(
        f"{file.path} is no adapter in a known format ({', '.join(FORMATS)}): it holds {some(file.tensors)}"
    )


def saved_stacks(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The stacks of layers that have prompts in a saved model, e.g. ("model.layers",): `load_adapter`'s `stack`.

    Empty for a file or folder that holds an adapter alone. Raises what `load_adapter` does.
    """
    file = read_file(Path(path))
    return trainer.stacks(file) if trainer.recognise(file) else ()


def save_adapter(
    path: str | os.PathLike[str],
    checkpoint: AdapterCheckpoint,
    format: str = "zinit",
    *,
    allow_loss: bool = False,
) -> None:
    """Writes an adapter in one of the formats `WRITABLE`; "peft" writes a folder. It is whole, or as it was.

    Raises:
        CheckpointError: the format cannot hold a part of the adapter, and not allow_loss. Nothing is written then.
    """
    files = files_of(path, checkpoint, format, allow_loss=allow_loss)
    if set(files) != {Path(path)}:
        Path(path).mkdir(parents=True, exist_ok=True)
    write_together(files)


def files_of(
    path: str | os.PathLike[str],
    checkpoint: AdapterCheckpoint,
    format: str = "zinit",
    *,
    allow_loss: bool = False,
) -> dict[str | os.PathLike[str], bytes]:
    """What `save_adapter` writes, for callers that write it together with files of their own."""
    write = FORMATS[format].write if format in FORMATS else None
    if write is None:
        raise CheckpointError(f"format must be one of {', '.join(WRITABLE)}, got {shown(format)}")
    path = Path(path)
    content = write(_checked(checkpoint, path), allow_loss)
    if isinstance(content, bytes):
        return {path: content}
    return {path / name: part for name, part in content.items()}


def _check_told(
    checkpoint: AdapterCheckpoint, path: Path, prompt_length: int | None, num_heads: int | None
) -> None:
    """CheckpointError if the caller contradicts the file."""
    length = checkpoint.prompts.shape[1]
    if prompt_length not in (None, length):
        raise CheckpointError(
            f"{path} has {length} prompts in each layer, prompt_length says {prompt_length}"
        )
    if None not in (num_heads, checkpoint.num_heads) and num_heads != checkpoint.num_heads:
        raise CheckpointError(f"{path} is for {checkpoint.num_heads} heads, num_heads says {num_heads}")


def _checked(checkpoint: AdapterCheckpoint, path: Path) -> AdapterCheckpoint:
    """The checkpoint, if its parts agree. Numbers are bounded here, before anything is looped over or allocated."""
    prompts, gates, layers = checkpoint.prompts, checkpoint.gates, checkpoint.layers
    rows, heads = len(layers), checkpoint.num_heads
    if not 1 <= checkpoint.num_layers <= MOST_LAYERS:
        raise CheckpointError(
            f"{path}: a base has 1 to {MOST_LAYERS} layers, num_layers says {shown(checkpoint.num_layers)}"
        )
    if prompts.dim() != 3 or prompts.shape[0] != rows or 0 in prompts.shape:
        raise CheckpointError(f"{path}: prompts must have shape ({rows}, P, C), got {tuple(prompts.shape)}")
    width = gates.shape[1] if gates.dim() == 2 else 0
    if width == 0 or gates.shape[0] != rows or (heads is not None and width not in (1, heads)):
        expected = "Hq" if heads is None else heads
        raise CheckpointError(
            f"{path}: gates must have shape ({rows}, 1 or {expected}), got {tuple(gates.shape)}"
        )
    if width == 1 and heads is not None and not 1 <= heads <= checkpoint.hidden_size:
        raise CheckpointError(
            f"{path}: num_heads must be 1 to the hidden size, {checkpoint.hidden_size}, got {shown(heads)}"
        )
    if checkpoint.gate_activation not in ("tanh", "identity"):
        raise CheckpointError(
            f"{path}: gate_activation must be tanh or identity, got {shown(checkpoint.gate_activation)}"
        )
    if list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= checkpoint.num_layers:
        raise CheckpointError(
            f"{path}: layers {shown(list(layers))} are not layers of {checkpoint.num_layers}, in order"
        )
    if checkpoint.layout not in litgpt.LAYOUTS:
        raise CheckpointError(
            f"{path}: layout must be blocked or interleaved, got {shown(checkpoint.layout)}"
        )
    check_numbers(path, (prompts, gates))
    return checkpoint
