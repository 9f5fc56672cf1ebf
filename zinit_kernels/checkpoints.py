"""Adapters on disk: one neutral form in memory, and a table of the file formats that hold it.

A format is a row of `FORMATS`: how to recognise it, how to read it into an `AdapterCheckpoint`, how to write
one. Keys are strict, and a gate's activation is a stored fact wherever the format has room for it, never a
guess of the reader's.

    zinit        our own: safetensors `prompts` [L, P, C], `gates` [L, 1 or Hq], the rest as metadata
    official-v1  LLaMA-Adapter V1 (arXiv 2303.16199), extracted or as the whole training file:
    `adapter_query.weight`
                 [L * P, C] for the topmost L layers, `layers.N.attention.gate` [1, Hq, 1, 1] for every layer
                 N
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor


class CheckpointError(ValueError):
    """A file is not an adapter, or not one for this base. The message is one sentence."""


@dataclass(frozen=True)
class AdapterCheckpoint:
    """What every format says about an adapter."""

    prompts: Tensor  # [L, P, C], lowest layer first
    gates: Tensor  # [L, 1 or Hq], raw
    gate_activation: str  # tanh or identity
    layers: tuple[int, ...]  # the base's layers that the L rows belong to
    num_layers: int  # of the base
    num_heads: int | None = None  # of the base; None where the format does not say
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def hidden_size(self) -> int:
        return self.prompts.shape[2]

    def check_base(self, hidden_size: int, num_layers: int, num_heads: int) -> AdapterCheckpoint:
        """Itself if it was made for a base of these sizes; CheckpointError that names both if not."""
        heads = num_heads if self.num_heads is None else self.num_heads
        if (self.hidden_size, self.num_layers, heads) != (hidden_size, num_layers, num_heads):
            raise CheckpointError(
                f"the adapter is for a base of hidden size {self.hidden_size}, {self.num_layers} layers and "
                f"{heads} heads; this base has hidden size {hidden_size}, {num_layers} layers "
                f"and {num_heads} heads"
            )
        if self.gates.shape[1] not in (1, num_heads):
            raise CheckpointError(
                f"the adapter has {self.gates.shape[1]} gates in each layer, this base has {num_heads} heads"
            )
        return self


class File(NamedTuple):
    """The content of a file before anybody knows its format."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    arguments: Mapping[str, Any]  # the command line a training file keeps


class Format(NamedTuple):
    recognise: Callable[[File], bool]
    read: Callable[[File, int | None, str | None], AdapterCheckpoint]
    write: Callable[[AdapterCheckpoint], bytes]


def load_adapter(
    path: str | os.PathLike[str], *, prompt_length: int | None = None, gate_activation: str | None = None
) -> AdapterCheckpoint:
    """Reads an adapter of any known format.

    prompt_length: only for official-v1, which does not store it (default: what a training file's arguments
    say, else 10, refused where the gates that are not 0 belong to other layers). gate_activation: replaces
    what the format says; "identity" reproduces the published V1 inference code, which applied gates trained
    with tanh raw. Raises CheckpointError, and OSError where the file cannot be read.
    """
    file = _read_file(Path(path))
    for known in FORMATS.values():
        if known.recognise(file):
            return _checked(known.read(file, prompt_length, gate_activation), file.path)
    raise CheckpointError(
        f"{path} is no adapter in a known format ({', '.join(FORMATS)}): it holds {_some(file.tensors)}"
    )


def save_adapter(path: str | os.PathLike[str], checkpoint: AdapterCheckpoint, format: str = "zinit") -> None:
    """Writes an adapter atomically: the file is there whole, or as it was before."""
    if format not in FORMATS:
        raise CheckpointError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    write_atomically(path, FORMATS[format].write(_checked(checkpoint, Path(path))))


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """A new file beside `path`, flushed to disk, renamed over it. An OSError leaves what was there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)  # a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _read_file(path: Path) -> File:
    with open(path, "rb") as opened:  # a missing file is an OSError that names it
        head = opened.read(9)
    if head[8:9] == b"{":  # the length of the header, then the header
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                return File(path, {name: file.get_tensor(name) for name in names}, file.metadata() or {}, {})
        except SafetensorError as error:
            raise CheckpointError(f"{path} is a truncated or damaged safetensors file: {error}") from error
    try:
        # a training file keeps its arguments in a Namespace, which is no more than a dictionary
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds Python objects beside tensors, so it was not loaded") from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:  # OSError: its end is missing
        raise CheckpointError(
            f"{path} is truncated, or neither safetensors nor a file of torch.save"
        ) from error
    arguments: Mapping[str, Any] = {}
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        told = content.get("args")
        arguments = vars(told) if isinstance(told, argparse.Namespace) else {}
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError(f"{path} does not hold a dictionary of tensors")
    return File(path, content, {}, arguments)


def _checked(checkpoint: AdapterCheckpoint, path: Path) -> AdapterCheckpoint:
    prompts, gates, layers = checkpoint.prompts, checkpoint.gates, checkpoint.layers
    rows = len(layers)
    if prompts.dim() != 3 or prompts.shape[0] != rows or prompts.shape[1] == 0:
        raise CheckpointError(f"{path}: prompts must have shape ({rows}, P, C), got {tuple(prompts.shape)}")
    heads = "Hq" if checkpoint.num_heads is None else checkpoint.num_heads
    if gates.dim() != 2 or gates.shape[0] != rows or (heads != "Hq" and gates.shape[1] not in (1, heads)):
        raise CheckpointError(
            f"{path}: gates must have shape ({rows}, 1 or {heads}), got {tuple(gates.shape)}"
        )
    if checkpoint.gate_activation not in ("tanh", "identity"):
        raise CheckpointError(
            f"{path}: gate_activation must be tanh or identity, got {checkpoint.gate_activation!r}"
        )
    if (
        list(layers) != sorted(set(layers))
        or not rows
        or layers[0] < 0
        or layers[-1] >= checkpoint.num_layers
    ):
        raise CheckpointError(
            f"{path}: layers {list(layers)} are not layers of {checkpoint.num_layers}, in order"
        )
    for name, tensor in (("prompts", prompts), ("gates", gates)):
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: {name} must be finite floating-point numbers")
    return checkpoint


def _is_zinit(file: File) -> bool:
    return file.metadata.get("format") == "zinit-adapter"


def _read_zinit(file: File, prompt_length: int | None, gate_activation: str | None) -> AdapterCheckpoint:
    _strict(file, expected={"prompts", "gates"})
    metadata = dict(file.metadata)
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
    prompts, gates = file.tensors["prompts"], file.tensors["gates"]
    return AdapterCheckpoint(
        prompts, gates, gate_activation or activation, layers, num_layers, heads, metadata
    )


def _write_zinit(checkpoint: AdapterCheckpoint) -> bytes:
    metadata = checkpoint.metadata | {
        "format": "zinit-adapter",
        "version": "1",
        "gate_activation": checkpoint.gate_activation,
        "layers": ",".join(map(str, checkpoint.layers)),
        "num_layers": str(checkpoint.num_layers),
        "num_heads": "" if checkpoint.num_heads is None else str(checkpoint.num_heads),
    }
    tensors = {"prompts": checkpoint.prompts, "gates": checkpoint.gates}
    content = to_safetensors(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata
    )
    # the library writes metadata in an order of chance: equal adapters shall be equal files
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


_V1_GATE = re.compile(r"layers\.(\d{1,4})\.attention\.gate")
_V1_BASE = re.compile(  # what a training file holds besides: the whole base
    r"(tok_embeddings|norm|output)\.weight|rope\.freqs|layers\.\d+\.("
    r"attention\.w[qkvo]|feed_forward\.w[123]|attention_norm|ffn_norm)\.weight"
)
_V1_PROMPT_LENGTH = 10  # of every published V1 adapter


def _is_official_v1(file: File) -> bool:
    return "adapter_query.weight" in file.tensors and any(map(_V1_GATE.fullmatch, file.tensors))


def _read_official_v1(
    file: File, prompt_length: int | None, gate_activation: str | None
) -> AdapterCheckpoint:
    by_layer = {
        int(match[1]): tensor for name, tensor in file.tensors.items() if (match := _V1_GATE.fullmatch(name))
    }
    num_layers = len(by_layer)
    gate_names = {f"layers.{layer}.attention.gate" for layer in range(num_layers)}
    base = {name for name in file.tensors if _V1_BASE.fullmatch(name)}
    _strict(file, expected={"adapter_query.weight"} | gate_names, ignored=base)

    query = file.tensors["adapter_query.weight"]
    length = prompt_length
    if length is None:
        length = file.arguments.get("adapter_len", _V1_PROMPT_LENGTH)
    if not isinstance(length, int) or length < 1:
        raise CheckpointError(
            f"{file.path}: the prompt length must be a positive whole number, got {length!r}"
        )
    if query.dim() != 2 or query.shape[0] % length or not 1 <= query.shape[0] // length <= num_layers:
        raise CheckpointError(
            f"{file.path}: adapter_query.weight {tuple(query.shape)} is not a whole number of at most "
            f"{num_layers} layers of {length} prompts; the format does not store P: pass prompt_length"
        )
    layers = tuple(range(num_layers - query.shape[0] // length, num_layers))
    trained = {layer for layer, gate in by_layer.items() if bool(gate.any())}
    if prompt_length is None and trained and trained != set(layers):
        raise CheckpointError(
            f"{file.path}: with {length} prompts a layer it would adapt {len(layers)} layers, but {len(trained)} "
            "have a gate that is not 0; the format does not store P: pass prompt_length"
        )
    adapted = [by_layer[layer] for layer in layers]  # [1, Hq, 1, 1]; before 2023-04-15 [1]
    if len({gate.shape for gate in adapted}) != 1:
        raise CheckpointError(f"{file.path}: the layers' gates differ in shape")
    if adapted[0].shape not in ((1,), (1, adapted[0].numel(), 1, 1)):
        shape = tuple(adapted[0].shape)
        raise CheckpointError(f"{file.path}: a gate must have shape (1, heads, 1, 1) or (1,), got {shape}")
    if not all(tensor.is_floating_point() for tensor in (query, *adapted)):
        raise CheckpointError(f"{file.path}: prompts and gates must be floating-point numbers")
    gates = [gate.flatten().float() for gate in adapted]
    heads = len(gates[0])
    stored = "tanh" if heads > 1 else "identity"  # the first release's one gate per layer was raw
    prompts = query.float().unflatten(0, (len(layers), length))
    num_heads = heads if heads > 1 else None
    return AdapterCheckpoint(
        prompts, torch.stack(gates), gate_activation or stored, layers, num_layers, num_heads
    )


def _write_official_v1(checkpoint: AdapterCheckpoint) -> bytes:
    layers, num_layers = checkpoint.layers, checkpoint.num_layers
    if layers != tuple(range(num_layers - len(layers), num_layers)):
        raise CheckpointError(
            f"official-v1 adapts the topmost layers, this adapter has layers {list(layers)}"
        )
    gates = checkpoint.gates.detach().cpu().float()
    heads = gates.shape[1]
    if heads == 1 and checkpoint.num_heads is not None:
        heads = checkpoint.num_heads
    if heads > 1:
        gates = _as_tanh(gates, checkpoint.gate_activation).expand(-1, heads)
    elif checkpoint.gate_activation == "tanh":
        gates = gates.tanh()  # one gate for all heads means a raw one
    rows = dict(zip(layers, gates, strict=True))
    state = {"adapter_query.weight": checkpoint.prompts.detach().cpu().float().flatten(0, 1)}
    for layer in range(num_layers):
        gate = rows.get(layer, torch.zeros(heads))
        state[f"layers.{layer}.attention.gate"] = gate.clone().reshape(
            (1, heads, 1, 1) if heads > 1 else (1,)
        )
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _as_tanh(gates: Tensor, activation: str) -> Tensor:
    """Raw gates whose tanh is what `activation` made of the given ones."""
    if activation == "tanh":
        return gates
    if bool((gates.abs() >= 1).any()):
        raise CheckpointError(
            "official-v1 applies tanh to its gates, and this adapter's identity gates reach "
            f"{float(gates.abs().max()):.3g}, which no tanh gives: keep it in the zinit format"
        )
    return gates.double().atanh().float()


def _strict(file: File, expected: set[str], ignored: Iterable[str] = ()) -> None:
    missing, unknown = expected - file.tensors.keys(), file.tensors.keys() - expected - set(ignored)
    if missing or unknown:
        words = [
            f"{what} {_some(names)}"
            for what, names in (("lacks", missing), ("holds unknown", unknown))
            if names
        ]
        raise CheckpointError(f"{file.path} {' and '.join(words)}")


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "") or "nothing"


FORMATS: Mapping[str, Format] = {
    "zinit": Format(_is_zinit, _read_zinit, _write_zinit),
    "official-v1": Format(_is_official_v1, _read_official_v1, _write_official_v1),
}
