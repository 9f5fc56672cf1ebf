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
    if adapter.gates is None:
        raise UserError(f"{path}: an adapter without gates is only for comparison, no format can hold it.")
    checkpoint = checkpoints.AdapterCheckpoint(
        prompts=adapter.prompts.detach(),
        gates=adapter.gates.detach(),
        gate_activation=adapter.config.gate_activation,
        layers=adapter.layers,
        num_layers=model.num_layers,
        num_heads=model.num_heads_q,
        metadata=metadata or {},
    )
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
    try:
        checkpoint = checkpoints.load_adapter(
            path, prompt_length=prompt_length, gate_activation=gate_activation
        ).check_base(model.hidden_size, model.num_layers, model.num_heads_q)
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
    config = AdapterConfig(length, len(checkpoint.layers), checkpoint.gate_activation)
    # a generator of its own, so that loading draws nothing from the program's
    adapter = LlamaAdapter(model, config, torch.Generator())
    with torch.no_grad():
        adapter.prompts.copy_(checkpoint.prompts)
        adapter.gates.copy_(checkpoint.gates)  # one gate per layer stands for all its heads
    return adapter
