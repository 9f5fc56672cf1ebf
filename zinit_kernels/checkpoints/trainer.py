"""A model saved with the prompts of `zinit_kernels.integrations.transformers` in it: read, never written.

    PREFIX.N.ATTENTION.zinit.prompt         [P, C]     e.g. model.layers.5.self_attn.zinit.prompt
    PREFIX.N.ATTENTION.zinit.gate           [Hq], raw
    PREFIX.N.ATTENTION.zinit.identity_gate  present where the gate is applied as it is; else tanh

for each adapted layer N of the stack of layers PREFIX, among the base's own weights, which are not read. transformers'
Trainer, `save_pretrained`, accelerate and FSDP (full state dicts) write such files; their wrappers add to the names.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor

from .adapter import AdapterCheckpoint, CheckpointError, Told, check_keys, some, stack_rows
from .files import PEFT_WEIGHTS, File

_PART = re.compile(
    r"(?P<layer>.+)\.zinit(?:\.modules_to_save\.(?P<copy>[^.]+))?\.(?P<part>prompt|gate|identity_gate)"
)
_LAYER = re.compile(r"(?P<stack>.*?)\.?\b(?P<index>\d{1,4})\.")
# of DistributedDataParallel, torch.compile, FSDP and activation checkpointing
_WRAPPERS = re.compile(r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_TUNED = re.compile(r".*\.(lora_\w+|ia3_\w+|adaption_\w+|modules_to_save)\b.*")  # PEFT's, beside the prompts
_ORIGINAL = ".original_module."  # PEFT's copy of a module as it was before training


class _Name(NamedTuple):
    stack: str
    layer: int
    part: str


def recognise(file: File) -> bool:
    return any(_PART.fullmatch(name) for name in file.tensors)


def stacks(file: File) -> tuple[str, ...]:
    """The stacks of layers that have prompts, e.g. ("model.layers",); CLIP has two."""
    return tuple(sorted({name.stack for name in _parts(file)}))


def read(file: File, told: Told) -> AdapterCheckpoint:
    found = stacks(file)
    if told.stack is None and len(found) > 1:
        raise CheckpointError(
            f"{file.path} holds adapters of several stacks of layers: pass --stack (stack=) with one of {some(found)}"
        )
    stack = found[0] if told.stack is None else told.stack
    if stack not in found:
        raise CheckpointError(f"{file.path} has prompts in the layers {some(found)}, not in {stack}")
    parts = {(name.layer, name.part): key for name, key in _parts(file).items() if name.stack == stack}
    layers = tuple(sorted({layer for layer, _ in parts}))
    wanted = {f"{layer}.zinit.{part}" for layer in layers for part in ("prompt", "gate")}
    optional = {f"{layer}.zinit.identity_gate" for layer in layers}
    check_keys(file.path, [f"{layer}.zinit.{part}" for layer, part in parts], wanted, optional)
    identity = {layer for layer, part in parts if part == "identity_gate"}
    if identity not in (set(), set(layers)):
        raise CheckpointError(
            f"{file.path}: some layers apply their gates as they are and others through tanh"
        )

    def rows(part: str) -> Tensor:
        return stack_rows(file.path, f"{part}s", [file.tensors[parts[layer, part]] for layer in layers])

    prompts, gates = rows("prompt"), rows("gate")
    if gates.dim() != 2:
        raise CheckpointError(
            f"{file.path}: a zinit.gate must have shape (heads,), got {tuple(gates.shape[1:])}"
        )
    extras = {name: file.tensors[name] for name in _beside(file)}
    return AdapterCheckpoint(
        prompts, gates, "identity" if identity else "tanh", layers, _num_layers(file, stack), gates.shape[1],
        extras=extras, extras_format="peft" if extras else "",
    )  # fmt: skip


def _parts(file: File) -> dict[_Name, str]:
    """Every prompt, gate and mark of the file -> the name of its tensor."""
    parts: dict[_Name, str] = {}
    for name in file.tensors:
        match = _PART.fullmatch(_WRAPPERS.sub("", name))
        if match is None:
            continue
        place = _LAYER.match(f"{match['layer']}.")
        if place is None:
            raise CheckpointError(f"{file.path}: {some([name])} is in no numbered layer")
        part = _Name(place["stack"], int(place["index"]), match["part"])
        if part in parts:  # two adapters of PEFT's modules_to_save, or two wrapped models
            raise CheckpointError(f"{file.path} holds {some([parts[part], name])} for one layer")
        parts[part] = name
    return parts


def _num_layers(file: File, stack: str) -> int:
    """Layers of the stack, from the base's weights where the file has them."""
    places = (_LAYER.match(_WRAPPERS.sub("", name)) for name in file.tensors)
    return 1 + max(int(place["index"]) for place in places if place and place["stack"] == stack)


def _beside(file: File) -> list[str]:
    """Tensors that change the model beside the prompts: all others of a PEFT file, PEFT's of a whole model."""
    others = [
        name
        for name in file.tensors
        if not _PART.fullmatch(_WRAPPERS.sub("", name)) and _ORIGINAL not in name
    ]
    if file.path.name in PEFT_WEIGHTS:
        return others
    return [name for name in others if _TUNED.fullmatch(name)]
