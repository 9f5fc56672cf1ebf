"""litgpt's and lit-llama's adapters: `torch.save` of {"model": {...}} (litgpt) or of the tensors alone (lit-llama).

    transformer.h.N.attn.adapter_wte.weight [P, C]
    transformer.h.N.attn.gating_factor      [1, 1, Hq, 1], raw, without activation

for the topmost layers. Earlier gates have shape [1, Hq, 1, 1], and lit-llama's first ones [1]: one gate for all heads.
adapter_v2 adds biases, scales and norms. The file does not say which rows of the fused qkv projection its prompts were
trained through (`AdapterCheckpoint.layout`), so the caller must.
"""

from __future__ import annotations

import re

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
from .files import File
from .writing import torch_bytes

LAYOUTS = ("blocked", "interleaved")
_KEY = re.compile(r"transformer\.h\.(\d{1,4})\.attn\.(adapter_wte\.weight|gating_factor)")
_V2_BESIDE = re.compile(  # norms: litgpt's norm_1.weight and lit-llama's rms_1.scale
    r".+\.adapter_(bias|scale)|transformer\.(h\.\d+\.(.*norm.*|rms_[12])|ln_f)\.(weight|bias|scale)"
)


def _names(layer: int) -> tuple[str, str]:
    return f"transformer.h.{layer}.attn.adapter_wte.weight", f"transformer.h.{layer}.attn.gating_factor"


def recognise(file: File) -> bool:
    return any(_KEY.fullmatch(name) for name in file.tensors)


def read(file: File, told: Told) -> AdapterCheckpoint:
    numbers = {int(match[1]) for name in file.tensors if (match := _KEY.fullmatch(name))}
    layers = tuple(range(min(numbers), max(numbers) + 1))
    extras = {name: file.tensors[name] for name in file.tensors if _V2_BESIDE.fullmatch(name)}
    check_keys(file.path, file.tensors, {name for layer in layers for name in _names(layer)}, extras)
    prompts = stack_rows(file.path, "adapter_wte", [file.tensors[_names(layer)[0]] for layer in layers])
    gates = stack_rows(file.path, "gating_factors", [file.tensors[_names(layer)[1]] for layer in layers])
    heads: int | None = gates[0].numel()
    if prompts.dim() != 3:
        shape = tuple(prompts.shape[1:])
        raise CheckpointError(f"{file.path}: an adapter_wte.weight must have shape (P, C), got {shape}")
    if gates.shape[1:] == (1,):
        heads = None  # one gate for all heads of the layer
    elif gates.shape[1:] not in ((1, 1, heads, 1), (1, heads, 1, 1)):
        shape = tuple(gates.shape[1:])
        raise CheckpointError(
            f"{file.path}: a gating_factor must have shape (1, 1, heads, 1) or (1,), got {shape}"
        )
    if told.layout is None:
        raise CheckpointError(
            f"{file.path} does not say through which rows of qkv its prompts were trained: pass --layout interleaved "
            "(layout='interleaved') if by litgpt 0.5.5 or newer, blocked if by an older one, by lit-llama, "
            "or a multi-query model"
        )
    return AdapterCheckpoint(
        prompts, gates.flatten(1), "identity", layers, layers[-1] + 1, heads, layout=told.layout, extras=extras,
        extras_format="litgpt" if extras else "",
    )  # fmt: skip


def write(checkpoint: AdapterCheckpoint, allow_loss: bool) -> bytes:
    check_topmost(checkpoint, "litgpt")
    own = checkpoint.extras_format == "litgpt" and all(map(_V2_BESIDE.fullmatch, checkpoint.extras))
    if checkpoint.extras and not own:
        lose(checkpoint.beside_the_formula(), "litgpt", allow_loss)
    heads = checkpoint.gates.shape[1] if checkpoint.gates.shape[1] > 1 else checkpoint.num_heads
    if heads is None:
        raise CheckpointError(
            "litgpt has a gate for every head, and this adapter does not say how many heads its base has: pass "
            "--num-heads (num_heads=)"
        )
    gates = as_identity(checkpoint.gates.detach().cpu(), checkpoint.gate_activation).expand(-1, heads)
    state = dict(checkpoint.extras) if own else {}
    for row, layer in enumerate(checkpoint.layers):
        prompt, gate = _names(layer)
        state[prompt] = checkpoint.prompts[row].detach().cpu().clone()
        state[gate] = gates[row].reshape(1, 1, heads, 1).clone()
    return torch_bytes({"model": state})
