"""The prompts of a transformers model on disk: a folder with a safetensors file for each stack of layers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import checkpoints
from ..checkpoints.files import inside
from ..checkpoints.json_files import read_json
from .architectures import FIRST_ARCHITECTURES, architecture_of
from .layers import (
    Layer,
    attach,
    attention_layers,
    is_sharded,
    plain_name,
    required_adapters,
    sizes,
    values_of,
)

_Model = TypeVar("_Model", bound=nn.Module)
_CONFIG = "adapter.json"


def save_adapter(model: Any, folder: str | Path) -> None:
    """Writes prompts and gates alone: a safetensors file per stack of layers (`zinit_kernels.checkpoints`'s own format)
    and adapter.json, which says what they belong to.

    Of a model that FSDP2 shards, all processes call it, and the first one writes.

    Raises:
        ValueError: no prompts in the model.
    """
    found = required_adapters(model)
    writes = not is_sharded(found[0][1]) or torch.distributed.get_rank() == 0
    folder = Path(folder)
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, str | None] = {}
    contents: dict[str | os.PathLike[str], bytes] = {}
    lengths = {layer.stack: layer.place + 1 for layer in attention_layers(model)}
    for stack in lengths:
        rows = [(layer, adapter) for layer, adapter in found if layer.stack == stack]
        if not rows:  # prompts were added to a part of the model only
            files[stack] = None
            continue
        prompts, gates = zip(*(values_of(adapter) for _, adapter in rows), strict=True)
        checkpoint = checkpoints.AdapterCheckpoint(
            prompts=torch.stack(prompts),
            gates=torch.stack(gates),
            gate_activation=rows[0][1].gate_activation,
            layers=tuple(layer.place for layer, _ in rows),
            num_layers=lengths[stack],
            num_heads=rows[0][1].gate.shape[0],
        )
        name = "adapter.safetensors" if len(lengths) == 1 else f"adapter.{stack}.safetensors"
        if writes:
            contents.update(checkpoints.files_of(folder / name, checkpoint))
        files[stack] = name
    if not writes:
        return
    config = {"model_type": model.config.model_type, "stacks": files}
    contents[folder / _CONFIG] = json.dumps(config, indent=2).encode() + b"\n"
    checkpoints.write_together(contents)


def load_adapter(
    model: _Model, source: str | Path, *, dtype: torch.dtype = torch.float32, **options: Any
) -> _Model:
    """Gives the model the prompts and gates that were saved, in the place of those it has.

    Args:
        source: a folder of `save_adapter`; a folder in which the model's own `save_pretrained`, or Trainer, wrote the
            prompts together with the base; or, for a model with one stack of layers, an adapter file of any format that
            `zinit_kernels.checkpoints` reads, official LLaMA-Adapter and PEFT included. The model may be wrapped
            otherwise than the saved one (by LoRA, by torch.compile), or be its body, or have another head. Of a folder
            in which PEFT saved LoRA weights and the prompts (modules_to_save), PEFT loads the weights first:
            `load_adapter(PeftModel.from_pretrained(model, folder), folder)`.
        dtype: of the parameters. options: `zinit_kernels.checkpoints.load_adapter`'s.

    Raises:
        CheckpointError: in one sentence: damaged, or of another base. ValueError: a dtype without fractions, a model
            with PEFT's prompts. OSError where a file cannot be read. The model is then as it was.
    """
    source = Path(source)
    by_stack: dict[str, list[Layer]] = {}
    for layer in attention_layers(model):
        by_stack.setdefault(layer.stack, []).append(layer)
    made: list[tuple[Layer, Tensor, Tensor]] = []
    activations = set()
    for stack, (path, where) in _saved(source, model, by_stack).items():
        rows = by_stack[stack]
        heads, hidden_size = sizes(rows[0].attention)
        checkpoint = _without_loaded(checkpoints.load_adapter(path, **(options | where)), model, source)
        checkpoint = checkpoint.check_base(hidden_size, len(rows), heads)
        activations.add(checkpoint.gate_activation)
        for row, index in enumerate(checkpoint.layers):
            gate = checkpoint.gates[row].expand(heads).clone()
            made.append((rows[index], checkpoint.prompts[row], gate))
    if len(activations) != 1:
        raise checkpoints.CheckpointError(f"{source}: the stacks differ in their gates' activation")
    attach(model, made, activations.pop(), dtype)
    return model


def _without_loaded(
    checkpoint: checkpoints.AdapterCheckpoint, model: Any, source: Path
) -> checkpoints.AdapterCheckpoint:
    """Without what PEFT saved beside the prompts, which must be in the model already.

    Files name a tensor as a PeftModel does, but for the name of its adapter: lora_A.weight is lora_A.default.weight.
    Models that have PEFT's layers by transformers' own `load_adapter` are no PeftModels.
    """
    if checkpoint.extras_format != "peft":
        return checkpoint
    own: dict[str, Tensor] = {}
    for full, tensor in model.state_dict().items():
        for key in (full, f"base_model.model.{full}"):
            own[key] = tensor
            for name in getattr(model, "peft_config", {}):
                own.setdefault(key.replace(f".{name}.", ".", 1), tensor)
    for key, tensor in checkpoint.extras.items():
        if key not in own or own[key].is_meta or not torch.equal(tensor.to(own[key]), own[key]):
            raise checkpoints.CheckpointError(
                f"{source} also holds {checkpoint.beside_the_formula()}, and the model has no such {key}: load them "
                "first, by PeftModel.from_pretrained(model, folder)"
            )
    return replace(checkpoint, extras={}, extras_format="")


def _saved(
    source: Path, model: Any, by_stack: dict[str, list[Layer]]
) -> dict[str, tuple[Path, dict[str, str]]]:
    """Where the prompts of each stack are, for those that have some: a path, and load_adapter's options for it."""
    if (source / _CONFIG).is_file():
        files = _adapter_files(source, model, by_stack)
        return {stack: (inside(source, name, source / _CONFIG), {}) for stack, name in files.items()}
    if len(by_stack) == 1:
        return {stack: (source, {}) for stack in by_stack}
    stacks = checkpoints.saved_stacks(source)
    if not stacks:
        raise checkpoints.CheckpointError(
            f"{source} is one adapter, and this model has several stacks of layers: {', '.join(by_stack)}"
        )
    matched = _match(stacks, list(by_stack))
    if None in matched.values():
        raise checkpoints.CheckpointError(_other_stacks(source, stacks, by_stack))
    return {str(own): (source, {"stack": saved}) for saved, own in matched.items()}


def _adapter_files(source: Path, model: Any, by_stack: dict[str, list[Layer]]) -> dict[str, str]:
    """The file of every stack that has prompts, as adapter.json of a folder for this model says."""
    config = read_json(source / _CONFIG)
    model_type, files = config.get("model_type"), config.get("stacks")
    if not isinstance(files, dict) or not all(isinstance(name, (str, type(None))) for name in files.values()):
        raise checkpoints.CheckpointError(
            f"{source / _CONFIG} is damaged: its stacks must name a file, or null, for each stack of layers"
        )
    matched = _match(tuple(files), list(by_stack))
    left = set(by_stack) - set(matched.values())
    if None in matched.values() or any(not _is_younger(by_stack[stack]) for stack in left):
        raise checkpoints.CheckpointError(_other_stacks(source, tuple(files), by_stack))
    if model_type != model.config.model_type:
        raise checkpoints.CheckpointError(
            f"{source} is for a model of the type {model_type!r}; this one is a {model.config.model_type!r}"
        )
    found = {str(matched[stack]): name for stack, name in files.items() if name is not None}
    if not found:
        raise checkpoints.CheckpointError(f"{source} holds no prompts")
    return found


def _match(saved: tuple[str, ...], own: list[str]) -> dict[str, str | None]:
    """The model's stack for each saved one; None where there is not exactly one.

    The names are equal, or, without the parts "model" in them, one ends with the other: a body's "layers" are the
    "model.layers" of the model around it, and LLaVA's "model.language_model.layers" is written by transformers as
    "language_model.model.layers".
    """

    def is_same(one: str, other: str) -> bool:
        one, other = (
            "".join(f".{part}" for part in plain_name(name).split(".") if part != "model")
            for name in (one, other)
        )
        return one.endswith(other) or other.endswith(one)

    matched: dict[str, str | None] = {}
    for stack in saved:
        candidates = [name for name in own if is_same(stack, name)]
        exact = [name for name in candidates if plain_name(name) == plain_name(stack)]
        candidates = exact or candidates
        matched[stack] = candidates[0] if len(candidates) == 1 else None
    return matched if len(set(matched.values())) == len(matched) else dict.fromkeys(saved)


def _is_younger(layers: list[Layer]) -> bool:
    """Whether folders were written before this stack's attention had a row: they do not name such a stack."""
    found = architecture_of(layers[0].attention)
    return found is not None and found[0].__name__ not in FIRST_ARCHITECTURES


def _other_stacks(source: Path, saved: tuple[str, ...], own: Iterable[str]) -> str:
    return f"{source} is for layers {', '.join(sorted(saved)) or 'none'}; this model has {', '.join(own)}"
