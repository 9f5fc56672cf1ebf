"""From a path to an adapter's tensors: which file of a folder holds them, and what lies beside."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from torch import Tensor

from ..console import shown
from .adapter import CheckpointError, some
from .json_files import read_json
from .tensor_files import (
    Tensors,
    is_safetensors,
    read_safetensors,
    read_torch,
    regular_file,
    tensors_of,
)

PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_CONFIG = "adapter_config.json"

# Files that hold an adapter and nothing else, by the folders of: PEFT; `python -m model.train` and `save_adapter` of
# integrations.transformers; litgpt
_ADAPTERS = (
    *PEFT_WEIGHTS,
    "adapter.safetensors",
    "adapter.pth",
    "lit_model.pth.adapter",
    "lit_model.pth.adapter_v2",
)
# Files that hold the model an adapter was trained in, base included: of save_pretrained and transformers' Trainer, of
# accelerate's save_state, of FSDP with a full state dict. The first that is there counts.
_MODELS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "pytorch_model_fsdp.bin",
)  # fmt: skip


class File(NamedTuple):
    """The content of a file before its format is known."""

    path: Path
    tensors: Tensors
    metadata: dict[str, str]  # safetensors'
    arguments: Mapping[str, Any]  # a training file's command line, or the configuration beside the weights


def read_file(path: Path) -> File:
    """An adapter's file, or the one in a folder.

    Raises:
        CheckpointError: no adapter can be there, or more than one. OSError where a file cannot be read.
    """
    path = _file_in(path) if path.is_dir() else regular_file(path)
    if path.name.endswith(".index.json"):
        return File(path, _joined(path, [_read_one(shard) for shard in read_index(path)]), {}, {})
    return _read_one(path)


def _read_one(path: Path) -> File:
    if is_safetensors(path):
        tensors, metadata = read_safetensors(path)
        return File(path, tensors, metadata, _config_beside(path))
    content = read_torch(path)
    arguments: Mapping[str, Any] = _config_beside(path)
    if isinstance(content, dict) and {"step", "adapter", "optimizer"} <= content.keys():
        raise CheckpointError(f"{path} is the state of a training run: the adapter is the file beside it")
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        told = content.get("args", content.get("config"))
        told = vars(told) if isinstance(told, argparse.Namespace) else told
        arguments = told if isinstance(told, dict) else {}
        content = content["model"]
    return File(path, tensors_of(content, path), {}, arguments)


def read_index(path: Path) -> dict[Path, set[str]]:
    """The files that an index (model.safetensors.index.json) names, each with the names of its tensors.

    Raises:
        CheckpointError: no index, a file outside its folder, or one that is not there.
    """
    places = read_json(path).get("weight_map")
    if not places or not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise CheckpointError(f"{path} must name the file of each tensor in an object weight_map")
    shards: dict[Path, set[str]] = {}
    for name, file in places.items():
        shards.setdefault(inside(path.parent, file, path), set()).add(name)
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(
            f"{path.parent} lacks {some(missing)} of the {len(shards)} shards its index names"
        )
    return shards


def inside(folder: Path, name: str, where: object) -> Path:
    """The file of this name in the folder. CheckpointError, which begins with `where`, for a path that leaves it.

    Links are followed: the Hugging Face cache consists of links.
    """
    parts = PurePosixPath(name), PureWindowsPath(name)
    if (
        not name
        or "\0" in name
        or any(part.is_absolute() or part.drive or ".." in part.parts for part in parts)
    ):
        raise CheckpointError(f"{where} names the file {shown(name)}, which is not inside its folder")
    return folder / name


def _file_in(folder: Path) -> Path:
    found = [folder / name for name in _ADAPTERS if (folder / name).is_file()]
    if found[:2] == [folder / name for name in PEFT_WEIGHTS]:
        del found[1]  # the same adapter twice; PEFT reads the first, too
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} holds several adapters, {some(file.name for file in found)}: name the file"
        )
    found += [folder / name for name in _MODELS if (folder / name).is_file()]
    if found:
        return found[0]
    raise CheckpointError(f"{folder} is a folder without {_ADAPTERS[0]}, {_ADAPTERS[2]} {_advice(folder)}")


def _advice(folder: Path) -> str:
    """What a folder without an adapter seems to be, and what to do."""
    names = sorted(os.listdir(folder))
    runs = [name for name in names if re.fullmatch(r"(checkpoint|epoch|step)[-_]\d+|final", name)]
    if runs:
        return f"or a model: name one of the checkpoints in it, {some(runs)}"
    inner = [name for name in names if any((folder / name / file).is_file() for file in _ADAPTERS)]
    if inner:
        return f"or another adapter: name one of the folders in it, {some(inner)}"
    stacks = [name for name in names if name.startswith("adapter.") and name.endswith(".safetensors")]
    if stacks:
        return f"for all layers: name one of its stacks of layers, {some(stacks)}"
    if any(name.endswith(".distcp") for name in names) or any("_fsdp_" in name for name in names):
        return (
            "or a model: its shards are read by their own process group alone, so join them first (accelerate "
            "merge-weights)"
        )
    if any(name.startswith("global_step") for name in names):
        return "or a model: join DeepSpeed's shards first (its zero_to_fp32.py)"
    if "checkpoint.pt" in names:
        return "or another adapter: its run has not finished an epoch (checkpoint.pt is what --resume needs)"
    files = [name for name in names if name.endswith((".safetensors", ".pth", ".pt", ".bin", ".ckpt"))]
    if files:
        return f"or another adapter by its usual name: name the file, {some(files)}"
    return "or another adapter"


def _joined(path: Path, files: list[File]) -> Tensors:
    owners: dict[str, Tensors] = {}
    for file in files:
        for name in file.tensors:
            if name in owners:
                raise CheckpointError(f"{path}: {some([name])} is in two shards")
            owners[name] = file.tensors

    def read(name: str) -> Tensor:
        return owners[name][name]

    return Tensors(path, owners, read)


def _config_beside(path: Path) -> dict[str, Any]:
    config = path.with_name(PEFT_CONFIG)
    if path.name not in PEFT_WEIGHTS or not config.is_file():
        return {}
    return read_json(config)
