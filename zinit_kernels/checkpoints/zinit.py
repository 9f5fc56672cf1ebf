"""Our own format: safetensors with `prompts` [L, P, C] and `gates` [L, 1 or Hq]; everything else is metadata.

Other tensors of the format that the adapter was converted from are kept as `extra.NAME`, so that the way back is exact.
"""

from __future__ import annotations

import re

from ..console import shortened, shown
from .adapter import AdapterCheckpoint, CheckpointError, Told, check_keys
from .files import File
from .writing import safetensors_bytes

_EXTRA = "extra."


def recognise(file: File) -> bool:
    return file.metadata.get("format") == "zinit-adapter"


def read(file: File, told: Told) -> AdapterCheckpoint:
    metadata = dict(file.metadata)
    extras_format = metadata.pop("extras_format", "")
    names = [name for name in file.tensors if name.startswith(_EXTRA)]
    check_keys(file.path, file.tensors, {"prompts", "gates"}, names if extras_format else ())
    if (version := metadata.pop("version", "")) != "1":
        raise CheckpointError(f"{file.path} is of version {shortened(version)}, this program reads version 1")
    layers = tuple(_number(file, layer, "layers") for layer in metadata.pop("layers", "").split(","))
    num_layers = _number(file, metadata.pop("num_layers", ""), "num_layers")
    num_heads = metadata.pop("num_heads", "")
    activation = metadata.pop("gate_activation", "")
    del metadata["format"]
    return AdapterCheckpoint(
        prompts=file.tensors["prompts"],
        gates=file.tensors["gates"],
        gate_activation=activation,
        layers=layers,
        num_layers=num_layers,
        num_heads=_number(file, num_heads, "num_heads") if num_heads else None,
        layout=metadata.pop("layout", "blocked"),
        metadata=metadata,
        extras={name.removeprefix(_EXTRA): file.tensors[name] for name in names},
        extras_format=extras_format,
    )


def _number(file: File, text: str, name: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        what = f"it says {shown(text)} for a number" if text else "it is missing"
        raise CheckpointError(f"{file.path}: the metadata is damaged ({name!r}): {what}")
    return int(text)


def write(checkpoint: AdapterCheckpoint, allow_loss: bool) -> bytes:
    metadata = checkpoint.metadata | {
        "format": "zinit-adapter",
        "version": "1",
        "gate_activation": checkpoint.gate_activation,
        "layers": ",".join(map(str, checkpoint.layers)),
        "num_layers": str(checkpoint.num_layers),
        "num_heads": "" if checkpoint.num_heads is None else str(checkpoint.num_heads),
    }
    if checkpoint.layout != "blocked":
        metadata["layout"] = checkpoint.layout
    if checkpoint.extras:
        metadata["extras_format"] = checkpoint.extras_format
    extras = {_EXTRA + name: tensor for name, tensor in checkpoint.extras.items()}
    return safetensors_bytes({"prompts": checkpoint.prompts, "gates": checkpoint.gates, **extras}, metadata)
