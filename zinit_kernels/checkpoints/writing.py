"""Bytes between disk and tensors: nothing is executed, nothing is half written."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import pickle
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from .adapter import CheckpointError

PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_CONFIG = "adapter_config.json"


class File(NamedTuple):
    """The content of a file before anybody knows its format."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]  # safetensors'
    arguments: Mapping[str, Any]  # a training file's command line, or the configuration beside the weights


def read_file(path: Path) -> File:
    """A safetensors file, a file of torch.save, or PEFT's folder. CheckpointError, or OSError if it cannot be read."""
    if path.is_dir():
        inside = [path / name for name in PEFT_WEIGHTS if (path / name).is_file()]
        if not inside:
            raise CheckpointError(f"{path} is a folder without {' or '.join(PEFT_WEIGHTS)}")
        path = inside[0]
    if path.exists() and not path.is_file():  # reading a pipe would wait for whoever writes it
        raise CheckpointError(f"{path} is neither a file nor a folder")
    with open(path, "rb") as opened:  # a missing file is an OSError that names it
        head = opened.read(9)
    if head[8:9] == b"{":  # the length of the header, then the header
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
                return File(path, tensors, file.metadata() or {}, _config_beside(path))
        except SafetensorError as error:
            raise CheckpointError(f"{path} is a truncated or damaged safetensors file: {error}") from error
    try:
        # a training file keeps its arguments in a Namespace, which is no more than a dictionary
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds Python objects beside tensors, so it was not loaded") from error
    except Exception as error:  # in a damaged pickle whatever the next instruction stumbles over
        raise CheckpointError(
            f"{path} is truncated, or neither safetensors nor a file of torch.save"
        ) from error
    arguments: Mapping[str, Any] = _config_beside(path)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        told = content.get("args", content.get("config"))
        arguments = (
            vars(told) if isinstance(told, argparse.Namespace) else told if isinstance(told, dict) else {}
        )
        content = content["model"]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise CheckpointError(f"{path} does not hold a dictionary of tensors")
    return File(path, content, {}, arguments)


def _config_beside(path: Path) -> dict[str, Any]:
    config = path.with_name(PEFT_CONFIG)
    if path.name not in PEFT_WEIGHTS or not config.is_file():
        return {}
    try:
        content = json.loads(config.read_text())
    except ValueError as error:
        raise CheckpointError(f"{config} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{config} does not hold a JSON object")
    return content


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    content = to_safetensors(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata
    )
    # the library writes metadata in an order of chance: equal adapters shall be equal files
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def torch_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """A new file beside `path`, flushed to disk, renamed over it. An OSError names `path` and leaves what was there.

    A symbolic link stays one: the file it points to is replaced. What is no file (a folder, a device) never is.
    The new file is .NAME.xxxxxxxx.part, and only a process that is killed meanwhile leaves it there.
    """
    real = Path(os.path.realpath(path))
    if real.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if real.exists() and not real.is_file():
        raise FileExistsError(errno.EEXIST, "File exists and is no regular one", os.fspath(path))
    temporary = real.with_name(
        f".{real.name}.{secrets.token_hex(4)}.part"
    )  # not another thread's, or machine's
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, real)
    except OSError as error:
        # never the temporary one's name; a full disk names no file at all
        error.filename, error.filename2 = os.fspath(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)
