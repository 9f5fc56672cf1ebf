"""PEFT's adaption prompts: `adapter_model.safetensors` and `adapter_config.json`.

    base_model.model.model.layers.N.self_attn.adaption_prompt  [1, P, C], the base's dtype
    base_model.model.model.layers.N.self_attn.adaption_gate    [1], raw, no activation

for the topmost layers. GPT-2's files look alike and mean something else: there PEFT adds the prompts behind the output
projection.
"""

from __future__ import annotations

import json
import re

import torch

from ..console import shown
from .adapter import (
    AdapterCheckpoint,
    CheckpointError,
    Told,
    as_identity,
    check_keys,
    check_topmost,
    lose,
    stack_rows,
)
from .files import PEFT_CONFIG, PEFT_WEIGHTS, File
from .writing import safetensors_bytes

_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d{1,4})\.self_attn\.adaption_(prompt|gate)")
_GPT2 = re.compile(r".*\.h\.\d+\.attn\.adaption_(prompt|gate)")


def _names(layer: int) -> tuple[str, str]:
    prefix = f"base_model.model.model.layers.{layer}.self_attn.adaption_"
    return prefix + "prompt", prefix + "gate"


def recognise(file: File) -> bool:
    return any(_KEY.fullmatch(name) or _GPT2.fullmatch(name) for name in file.tensors)


def read(file: File, told: Told) -> AdapterCheckpoint:
    if any(_GPT2.fullmatch(name) for name in file.tensors):
        raise CheckpointError(
            f"{file.path} is for GPT-2, whose adaption prompts PEFT adds behind the output projection: another formula "
            "than LLaMA-Adapter's, which no other format can hold"
        )
    numbers = {int(match[1]) for name in file.tensors if (match := _KEY.fullmatch(name))}
    layers = tuple(range(min(numbers), max(numbers) + 1))
    check_keys(file.path, file.tensors, {name for layer in layers for name in _names(layer)})
    prompts = stack_rows(file.path, "adaption_prompts", [file.tensors[_names(layer)[0]] for layer in layers])
    gates = stack_rows(file.path, "adaption_gates", [file.tensors[_names(layer)[1]] for layer in layers])
    if prompts.dim() != 4 or prompts.shape[1] != 1:
        shape = tuple(prompts.shape[1:])
        raise CheckpointError(f"{file.path}: an adaption_prompt must have shape (1, P, C), got {shape}")
    if gates.shape[1:] != (1,):
        shape = tuple(gates.shape[1:])
        raise CheckpointError(f"{file.path}: an adaption_gate must have shape (1,), got {shape}")
    config = file.arguments
    weights = {"peft_type": "ADAPTION_PROMPT", "adapter_len": prompts.shape[2], "adapter_layers": len(layers)}
    for name, value in weights.items():
        if config and config.get(name) != value:
            raise CheckpointError(
                f"{file.path.with_name(PEFT_CONFIG)} says {name} = {shown(config.get(name))}, the weights say {value!r}"
            )
    kept = {name: config[name] for name in ("base_model_name_or_path", "task_type") if config.get(name)}
    return AdapterCheckpoint(
        prompts[:, 0],
        gates,
        "identity",
        layers,
        layers[-1] + 1,
        metadata={name: value if isinstance(value, str) else shown(value) for name, value in kept.items()},
    )


def write(checkpoint: AdapterCheckpoint, allow_loss: bool) -> dict[str, bytes]:
    check_topmost(checkpoint, "peft")
    gates = as_identity(checkpoint.gates.detach().cpu(), checkpoint.gate_activation)
    losses = []
    if not torch.equal(gates, gates[:, :1].expand_as(gates)):
        losses.append(
            f"{gates.shape[1]} gates in each layer (it has one; their mean would be written, the gates differ from it "
            f"by up to {float((gates - gates.mean(1, keepdim=True)).abs().max()):.3g})"
        )
    if beside := checkpoint.beside_the_formula():
        losses.append(beside)
    lose(" and ".join(losses), "peft", allow_loss)
    one = gates[:, :1] if not losses else gates.mean(1, keepdim=True)
    tensors = {}
    for row, layer in enumerate(checkpoint.layers):
        prompt, gate = _names(layer)
        tensors[prompt] = checkpoint.prompts[row : row + 1]
        tensors[gate] = one[row]
    config = {
        "peft_type": "ADAPTION_PROMPT",
        "task_type": checkpoint.metadata.get("task_type", "CAUSAL_LM"),
        "base_model_name_or_path": checkpoint.metadata.get("base_model_name_or_path"),
        "target_modules": "self_attn",
        "adapter_len": checkpoint.prompts.shape[1],
        "adapter_layers": len(checkpoint.layers),
        "inference_mode": True,
    }
    return {
        PEFT_WEIGHTS[0]: safetensors_bytes(tensors, {"format": "pt"}),
        PEFT_CONFIG: json.dumps(config, indent=2, sort_keys=True).encode() + b"\n",
    }
