"""The adapter of this folder's model, from disk and back."""

from __future__ import annotations

from pathlib import Path

import torch

from zinit_kernels import checkpoints
from zinit_kernels.console import shown

from .adapter import LlamaAdapter
from .config import AdapterConfig, LlamaConfig
from .errors import UserError, warn
from .fingerprint import is_of_base
from .llama import Llama


def save_adapter(
    path: str | Path,
    adapter: LlamaAdapter,
    model: LlamaConfig,
    format: str = "zinit",
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes the adapter of a `model` atomically; `format` is one of `zinit_kernels.checkpoints.FORMATS`.

    "zinit" alone keeps the metadata (`adapter_metadata` of the base): an official-v1 file fits any base of its shape.
    """
    write_checkpoint(path, checkpoint_of(path, adapter, model, metadata), format)


def checkpoint_of(
    path: str | Path, adapter: LlamaAdapter, model: LlamaConfig, metadata: dict[str, str] | None = None
) -> checkpoints.AdapterCheckpoint:
    """The prompts and gates of an adapter as a file holds them. `path` is where they go, for the error's sentence."""
    if adapter.gates is None:
        raise UserError(f"{path}: an adapter without gates is only for comparison, no format can hold it.")
    return checkpoints.AdapterCheckpoint(
        prompts=adapter.prompts.detach(),
        gates=adapter.gates.detach(),
        gate_activation=adapter.config.gate_activation,
        layers=adapter.layers,
        num_layers=model.num_layers,
        num_heads=model.num_heads_q,
        metadata=metadata or {},
    )


def write_checkpoint(path: str | Path, checkpoint: checkpoints.AdapterCheckpoint, format: str) -> None:
    """Writes it atomically. Raises UserError where the format cannot hold it."""
    try:
        checkpoints.save_adapter(path, checkpoint, format)
    except checkpoints.CheckpointError as error:
        raise UserError(f"{error}.") from error


def load_adapter(
    path: str | Path,
    model: LlamaConfig,
    prompt_length: int | None = None,
    gate_activation: str | None = None,
    base: Llama | None = None,
) -> LlamaAdapter:
    """The adapter of a file, or of a folder that holds one, for a base of this shape.

    prompt_length, gate_activation: as in `checkpoints.load_adapter`. base: the base that the adapter is for; a warning
    is shown if the file has the fingerprint of another one (official-v1 files have none).
    Raises UserError if it is damaged or does not fit; OSError if it cannot be read.
    """
    checkpoint = read_checkpoint(path, prompt_length, gate_activation)
    config = check_checkpoint(path, checkpoint, model, prompt_length, base)
    # a generator of its own, so that loading draws nothing from the program's
    adapter = LlamaAdapter(model, config, torch.Generator())
    fill_adapter(adapter, checkpoint)
    return adapter


def read_checkpoint(
    path: str | Path, prompt_length: int | None = None, gate_activation: str | None = None
) -> checkpoints.AdapterCheckpoint:
    """What the file holds, whatever its format. Raises UserError if it is damaged, OSError if it cannot be read."""
    try:
        return checkpoints.load_adapter(path, prompt_length=prompt_length, gate_activation=gate_activation)
    except checkpoints.CheckpointError as error:
        raise UserError(f"{error}.") from error


def check_checkpoint(
    path: str | Path,
    checkpoint: checkpoints.AdapterCheckpoint,
    model: LlamaConfig,
    prompt_length: int | None = None,
    base: Llama | None = None,
) -> AdapterConfig:
    """The configuration of an adapter whose prompts and gates are all that it has, for a base of this shape."""
    try:
        checkpoint.check_base(model.hidden_size, model.num_layers, model.num_heads_q)
    except checkpoints.CheckpointError as error:
        raise UserError(f"{error}.") from error
    if checkpoint.layers[0] != model.num_layers - len(checkpoint.layers):
        raise UserError(
            f"{path} adapts layers {shown(list(checkpoint.layers))}, only the topmost ones are supported."
        )
    length = checkpoint.prompts.shape[1]
    if prompt_length not in (None, length):
        raise UserError(f"{path} holds {length} prompts in each layer, not {prompt_length}.")
    if base is not None and not is_of_base(checkpoint.metadata, base):
        warn(f"{path} was trained on another base of the same shape: its answers may be nonsense.")
    return AdapterConfig(length, len(checkpoint.layers), checkpoint.gate_activation)


@torch.no_grad()
def fill_adapter(adapter: LlamaAdapter, checkpoint: checkpoints.AdapterCheckpoint) -> None:
    """Puts the file's prompts and gates into the adapter; one gate per layer stands for all its heads."""
    adapter.prompts.copy_(checkpoint.prompts)
    assert adapter.gates is not None  # files have gates
    adapter.gates.copy_(checkpoint.gates)
