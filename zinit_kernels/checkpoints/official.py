"""The formats of the official LLaMA-Adapter repository, written by `torch.save`.

V1, extracted or the whole training file {"model", "optimizer", "epoch", "scaler", "args"}:

    adapter_query.weight    [L * P, C] for the topmost L layers; P is not stored
    layers.N.attention.gate [1, Hq, 1, 1] for every layer N of the base; (1,), raw, before 2023-04-15

V2 multimodal, {"model", "config"}: the same under `llama.`, with biases, LoRA factors, norms and the visual branch
beside it. With LoRA its gate is tanh(gate) * new_gate; that product is read as an identity gate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..console import shown
from .adapter import (
    AdapterCheckpoint,
    CheckpointError,
    Told,
    as_identity,
    as_tanh,
    check_keys,
    check_numbers,
    check_topmost,
    lose,
    stack_rows,
)
from .files import File
from .json_files import parse_object
from .writing import torch_bytes

PROMPT_LENGTH = 10  # of every published adapter
_LONGEST_CONFIG = 10_000  # values; the published ones have three
_QUERY = "adapter_query.weight"
PREFIX_QUERY = "prefix_query.weight"
_V1_BASE = re.compile(  # what a training file holds besides: the whole base
    r"(tok_embeddings|norm|output)\.weight|rope\.freqs|layers\.\d+\.("
    r"attention\.w[qkvo]|feed_forward\.w[123]|attention_norm|ffn_norm)\.weight"
)
_V2_BESIDE = re.compile(
    r"llama\.layers\.\d+\.(attention\.(new_gate|w[qkvo]\.bias|lora_w[qkvo]_l[12]\.weight)|"
    r"feed_forward\.(w[123]\.bias|lora_w[123]_l[12]\.weight)|(attention|ffn)_norm\.weight)|"
    r"llama\.(norm\.weight|output\.bias)|visual_query\.weight|(visual_blocks|visual_proj|clip_proj)(_norm)?\..+"
)


def recognise_v1(file: File) -> bool:
    return _QUERY in file.tensors and any(name.startswith("layers.") for name in file.tensors)


def recognise_v2(file: File) -> bool:
    return _QUERY in file.tensors and any(name.startswith("llama.layers.") for name in file.tensors)


def is_imagebind(file: File) -> bool:
    """Whether it is the sibling of V2 that hears and sees by ImageBind."""
    return PREFIX_QUERY in file.tensors and any(name.startswith("image_bind") for name in file.tensors)


def read_v1(file: File, told: Told) -> AdapterCheckpoint:
    gates = _gates(file, "layers.")
    base = {name for name in file.tensors if _V1_BASE.fullmatch(name)}
    check_keys(file.path, file.tensors, {_QUERY, *_gate_names("layers.", len(gates))}, base)
    prompts, stacked, layers = _topmost(file, gates, told.prompt_length)
    if gates[layers[0]].dim() == 1:  # the first release: one gate for all heads, raw
        return AdapterCheckpoint(prompts, stacked, "identity", layers, len(gates))
    return AdapterCheckpoint(prompts, stacked, "tanh", layers, len(gates), stacked.shape[1])


def read_v2(file: File, told: Told) -> AdapterCheckpoint:
    gates = _gates(file, "llama.layers.")
    extras = {name: file.tensors[name] for name in file.tensors if _V2_BESIDE.fullmatch(name)}
    check_keys(file.path, file.tensors, {_QUERY, *_gate_names("llama.layers.", len(gates))}, extras)
    prompts, stacked, layers = _topmost(file, gates, told.prompt_length)
    activation, factors = "tanh", _lora_factors(file, extras, layers)
    if factors is not None:
        extras |= {name: file.tensors[name] for name in _gate_names("llama.layers.", len(gates))}
        stacked, activation = stacked.tanh() * factors, "identity"
    return AdapterCheckpoint(
        prompts, stacked, activation, layers, len(gates), stacked.shape[1], extras=extras,
        extras_format="official-v2", metadata={"config": _configuration(file)},
    )  # fmt: skip


def write_v1(checkpoint: AdapterCheckpoint, allow_loss: bool) -> bytes:
    check_topmost(checkpoint, "official-v1")
    lose(checkpoint.beside_the_formula(), "official-v1", allow_loss)
    gates = checkpoint.gates.detach().cpu().float()
    heads = checkpoint.num_heads if checkpoint.num_heads is not None else gates.shape[1]
    if heads > 1 or checkpoint.num_heads == 1:
        gates = as_tanh(gates, checkpoint.gate_activation, "official-v1").expand(-1, heads)
        return torch_bytes(_state(checkpoint, gates, "layers.", (1, heads, 1, 1)))
    # the first release's form, for a base whose number of heads is not known
    return torch_bytes(_state(checkpoint, as_identity(gates, checkpoint.gate_activation), "layers.", (1,)))


def write_v2(checkpoint: AdapterCheckpoint, allow_loss: bool) -> bytes:
    check_topmost(checkpoint, "official-v2")
    gate_names = _gate_names("llama.layers.", checkpoint.num_layers)
    own = checkpoint.extras_format in ("", "official-v2") and all(
        name in gate_names or _V2_BESIDE.fullmatch(name) for name in checkpoint.extras
    )
    if checkpoint.layout != "blocked" or not own:
        lose(checkpoint.beside_the_formula(), "official-v2", allow_loss)
    extras = dict(checkpoint.extras) if own and checkpoint.layout == "blocked" else {}
    heads = checkpoint.num_heads or checkpoint.gates.shape[1]
    gates = checkpoint.gates.detach().cpu().float().expand(-1, heads)
    shape = (1, heads, 1, 1)
    originals = {name: extras.pop(name) for name in list(extras) if name in gate_names}
    if originals:
        _check_product(checkpoint, gates, originals, extras)
        state = _state(checkpoint, gates, "llama.layers.", shape) | originals
    else:
        gates = as_tanh(gates, checkpoint.gate_activation, "official-v2")
        state = _state(checkpoint, gates, "llama.layers.", shape)
    config = parse_object(checkpoint.metadata.get("config", "{}"), "official-v2: the adapter's config")
    return torch_bytes({"model": state | extras, "config": config})


def _check_product(
    checkpoint: AdapterCheckpoint,
    gates: Tensor,
    originals: Mapping[str, Tensor],
    extras: Mapping[str, Tensor],
) -> None:
    """CheckpointError unless the adapter's gates are still tanh(gate) * new_gate of the file it was read from."""
    prefixes = [f"llama.layers.{layer}.attention." for layer in checkpoint.layers]
    wanted = {prefix + part for prefix in prefixes for part in ("gate", "new_gate")}
    check_keys("official-v2: the adapter", wanted & (originals.keys() | extras.keys()), wanted)
    for prefix, gate in zip(prefixes, gates, strict=True):
        original, factor = originals[prefix + "gate"].flatten(), extras[prefix + "new_gate"].flatten()
        if original.shape != gate.shape or factor.shape != (1,):
            raise CheckpointError(
                "official-v2: a gate or new_gate of the adapter does not have its layer's shape"
            )
        if not torch.equal(original.float().tanh() * factor.float(), gate):
            raise CheckpointError(
                "official-v2: the gates are no longer the product of the file's gate and new_gate, so neither is known"
            )


def _configuration(file: File) -> str:
    """The file's configuration as JSON."""
    waiting: list[object] = [file.arguments]
    for _ in range(_LONGEST_CONFIG):
        if not waiting:
            return json.dumps(dict(file.arguments), default=shown)
        value = waiting.pop()
        if isinstance(value, dict):
            if not all(isinstance(name, str) for name in value):
                raise CheckpointError(f"{file.path}: its config has a name that is no text")
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
    raise CheckpointError(f"{file.path}: its config is larger than any configuration, or holds itself")


def _gates(file: File, prefix: str) -> dict[int, Tensor]:
    pattern = re.compile(re.escape(prefix) + r"(\d{1,4})\.attention\.gate")
    return {int(m[1]): file.tensors[name] for name in file.tensors if (m := pattern.fullmatch(name))}


def _gate_names(prefix: str, num_layers: int) -> list[str]:
    return [f"{prefix}{layer}.attention.gate" for layer in range(num_layers)]


def _topmost(
    file: File, by_layer: Mapping[int, Tensor], prompt_length: int | None
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """(prompts [L, P, C], gates [L, 1 or Hq], the L layers), which are the topmost ones."""
    query, num_layers = file.tensors[_QUERY], len(by_layer)
    check_numbers(file.path, (query, *by_layer.values()))
    length: Any = prompt_length
    if length is None:
        length = file.arguments.get("adapter_len", PROMPT_LENGTH)
    if not isinstance(length, int) or length < 1:
        raise CheckpointError(
            f"{file.path}: the prompt length must be a positive whole number, got {shown(length)}"
        )
    if query.dim() != 2 or query.shape[0] % length or not 1 <= query.shape[0] // length <= num_layers:
        raise CheckpointError(
            f"{file.path}: {_QUERY} {tuple(query.shape)} is not a whole number of at most "
            f"{num_layers} layers of {length} prompts; the format does not store P: pass prompt_length"
        )
    layers = tuple(range(num_layers - query.shape[0] // length, num_layers))
    trained = {layer for layer, gate in by_layer.items() if bool(gate.any())}
    if prompt_length is None and trained and trained != set(layers):
        raise CheckpointError(
            f"{file.path}: with {length} prompts a layer it would adapt {len(layers)} layers, but {len(trained)} "
            "have a gate that is not 0; the format does not store P: pass prompt_length"
        )
    if trained - set(layers):  # what the caller says does not fit: these gates would be dropped
        raise CheckpointError(
            f"{file.path}: with {length} prompts a layer it would adapt the topmost {len(layers)} of {num_layers} "
            f"layers, and layer {min(trained)} has a gate that is not 0: prompt_length must be smaller"
        )
    adapted = [by_layer[layer] for layer in layers]  # [1, Hq, 1, 1]; before 2023-04-15 [1]
    stacked = stack_rows(file.path, "gates", adapted)
    if adapted[0].shape not in ((1,), (1, adapted[0].numel(), 1, 1)):
        shape = tuple(adapted[0].shape)
        raise CheckpointError(f"{file.path}: a gate must have shape (1, heads, 1, 1) or (1,), got {shape}")
    return query.float().unflatten(0, (len(layers), length)), stacked.flatten(1).float(), layers


def _lora_factors(file: File, extras: Mapping[str, Tensor], layers: tuple[int, ...]) -> Tensor | None:
    names = [f"llama.layers.{layer}.attention.new_gate" for layer in layers]
    if not any(name in extras for name in names):
        return None
    check_keys(file.path, [name for name in names if name in extras], names)
    factors = stack_rows(file.path, "new_gates", [extras[name] for name in names])
    if factors[0].numel() != 1:
        raise CheckpointError(
            f"{file.path}: new_gate must hold one number, got shape {tuple(factors.shape[1:])}"
        )
    return factors.float().reshape(-1, 1)


def _state(
    checkpoint: AdapterCheckpoint, gates: Tensor, prefix: str, shape: tuple[int, ...]
) -> dict[str, Tensor]:
    """The tensors of a file; gates [L, 1 or Hq], each written in `shape`."""
    rows = dict(zip(checkpoint.layers, gates, strict=True))
    state = {_QUERY: checkpoint.prompts.detach().cpu().float().flatten(0, 1)}
    for layer, name in enumerate(_gate_names(prefix, checkpoint.num_layers)):
        state[name] = rows.get(layer, torch.zeros(gates.shape[1])).clone().reshape(shape)
    return state
