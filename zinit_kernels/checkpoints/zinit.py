"""Our own format: safetensors `prompts` [L, P, C] and `gates` [L, 1 or Hq]; the rest is metadata.

What another format held beside them lies under `extra.` and that format's name, so that the way back is exact.
"""

from __future__ import annotations

from .adapter import AdapterCheckpoint, CheckpointError, check_keys
from .files import File, safetensors_bytes

_EXTRA = "extra."


def recognise(file: File) -> bool:
    return file.metadata.get("format") == "zinit-adapter"


def read(file: File, prompt_length: int | None, layout: str | None) -> AdapterCheckpoint:
    metadata = dict(file.metadata)
    extras = {name: tensor for name, tensor in file.tensors.items() if name.startswith(_EXTRA)}
    extras_format = metadata.pop("extras_format", "")
    check_keys(file.path, file.tensors, {"prompts", "gates"}, extras if extras_format else ())
    try:
        version = metadata.pop("version")
        layers = tuple(int(layer) for layer in metadata.pop("layers").split(","))
        num_layers, num_heads = int(metadata.pop("num_layers")), metadata.pop("num_heads")
        activation = metadata.pop("gate_activation")
        heads = int(num_heads) if num_heads else None
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{file.path}: the metadata is damaged ({error})") from error
    if version != "1":
        raise CheckpointError(f"{file.path} is of version {version}, this program reads version 1")
    del metadata["format"]
    return AdapterCheckpoint(
        file.tensors["prompts"], file.tensors["gates"], activation, layers, num_layers, heads,
        layout=metadata.pop("layout", "blocked"), metadata=metadata, extras_format=extras_format,
        extras={name.removeprefix(_EXTRA): tensor for name, tensor in extras.items()},
    )  # fmt: skip


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
