"""The one door for tensors that come from outside: safetensors files and files of torch.save.

What passes is dense, on the CPU, and no larger than the file it came from. No code of the file is run.
"""

from __future__ import annotations

import argparse
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..console import is_out_of_memory, shortened, shown
from . import pickles
from .adapter import CheckpointError
from .json_files import parse_object

_HEADER = 1 << 20  # bytes: larger ones are of base models with 10,000 tensors, and are left to the library
_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"  # of torch.save before 1.6, as of any other pickle

# What a file often is instead: its first bytes, and what to do
_STRANGERS = {
    b"version https://git-lfs": "a Git LFS pointer in place of the file: run git lfs pull",
    b"<!DOCTYPE html": "a web page in place of the file: download it again",
    b"<html": "a web page in place of the file: download it again",
    b"GGUF": "a GGUF file, which is not read here: convert it to a folder of safetensors",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"\x93NUMPY": "a NumPy array: save the tensors with safetensors",
    b"\x89HDF": "an HDF5 file: save the tensors with safetensors",
}


class Tensors(Mapping[str, Tensor]):
    """The tensors of one file by name. Each is read when it is asked for, and is dense and on the CPU."""

    def __init__(self, path: Path, names: Iterable[str], read: Callable[[str], Any]):
        self.path = path
        self._names = dict.fromkeys(names)
        self._read = read
        for name in self._names:
            if not isinstance(name, str) or not _is_unicode(name):
                raise CheckpointError(f"{path} names a tensor {shown(name)}, which is no text")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return plain(self._read(name), f"{self.path}: {shortened(name)}")

    def __contains__(self, name: object) -> bool:  # Mapping's would read the tensor
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def regular_file(path: str | os.PathLike[str]) -> Path:
    """The path, if it can be read like a file. CheckpointError for a pipe, which would be waited for, or a device."""
    path = Path(path)
    if not _is_unicode(str(path)) or "\0" in str(path):
        raise CheckpointError(f"{path} has a name that is not UTF-8: rename it")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is neither a file nor a folder")
    return path


def is_safetensors(path: Path) -> bool:
    """Whether the file begins like a safetensors file. CheckpointError if it is something else that is often met."""
    with open(path, "rb") as file:
        head = file.read(64)
    for beginning, what in _STRANGERS.items():
        if head.lower().startswith(beginning.lower()):
            raise CheckpointError(f"{path} is {what}")
    return head[8:9] == b"{" and not head.startswith(_ZIP)  # the length of the header, then the header


def open_tensors(path: str | os.PathLike[str]) -> Tensors:
    """The tensors of a safetensors file, or of a dictionary that torch.save wrote.

    Raises:
        CheckpointError: damaged, something else, or tensors that are not plain. OSError if the file cannot be read.
    """
    path = regular_file(path)
    return read_safetensors(path)[0] if is_safetensors(path) else tensors_of(read_torch(path), path)


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """(tensors, metadata). The tensors are mapped from the file."""
    _check_header(path)
    damaged = f"{path} is truncated or damaged: it is no whole safetensors file"
    with _damage_is(damaged):
        file = safe_open(path, framework="pt")
        names, metadata = file.keys(), file.metadata() or {}
    if not all(_is_unicode(text) for item in metadata.items() for text in item):
        raise CheckpointError(f"{path} has metadata that are no text")

    def read(name: str) -> Tensor:
        with _damage_is(damaged):
            tensor: Tensor = file.get_tensor(name)
            return tensor

    return Tensors(path, names, read), metadata


def _check_header(path: Path) -> None:
    """CheckpointError for a header that says something twice; the library silently takes the last."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if size <= _HEADER else b""
    if len(header) == size:  # else the library says that it is truncated
        parse_object(header, f"{path} is truncated or damaged: its header")


def read_torch(path: Path) -> Any:
    """What torch.save wrote, of this or the format before torch 1.6, with tensors not yet looked at."""
    with _damage_is(f"{path} is truncated, or neither safetensors nor a file of torch.save"):
        with open(path, "rb") as file:
            head = file.read(len(_ZIP))
        mapped = head.startswith(_ZIP)
        if mapped:
            pickles.check_zip(path)
        elif head.startswith(_PICKLE):
            pickles.check_legacy(path)
        else:
            raise pickles.Truncated("another beginning")
        # a training file keeps its arguments in a Namespace, which is no more than a dictionary
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own deprecated storages
            if mapped:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            with open(path, "rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
                if file.read(1):
                    raise CheckpointError(
                        f"{path} has more bytes behind what torch.save wrote: something was appended, or two files "
                        "were joined; download or save it again"
                    )
                return content


def tensors_of(content: object, path: Path) -> Tensors:
    """The tensors of a dictionary that torch.save wrote."""
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise CheckpointError(f"{path} does not hold a dictionary of tensors")
    tensors = Tensors(path, content, content.__getitem__)
    size = path.stat().st_size
    # a weight may be saved under two names, but not one under hundreds
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > 2 * size:
        raise CheckpointError(f"{path} has {size} bytes, and its tensors would take more than twice as many")
    return tensors


def plain(tensor: Tensor, where: str) -> Tensor:
    """The tensor, if it is dense and on the CPU, with memory of its own. Raises CheckpointError."""
    if what := _unusual(tensor):
        raise CheckpointError(f"{where} is {what}; only dense tensors with values are read")
    return tensor.detach().resolve_conj().resolve_neg()


def _unusual(tensor: Tensor) -> str:
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return "a sparse tensor"
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.device.type != "cpu":
        return f"a tensor on {tensor.device.type}"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "a tensor whose shape repeats fewer numbers"
    return ""


def _is_unicode(text: str) -> bool:
    """Whether it can be written: a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _damage_is(sentence: str) -> Iterator[None]:
    """Turns whatever a reader stumbles over in a damaged file into one CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (RuntimeError, MemoryError, SafetensorError) as error:
        if is_out_of_memory(error):  # the file may be whole, and there is no room to read or map it
            raise MemoryError(str(error)) from error
        reason = f" ({shortened(str(error))})" if isinstance(error, SafetensorError) else ""
        raise CheckpointError(sentence + reason) from error
    except OSError as error:
        if error.filename is not None:  # the file cannot be opened; a seek to nowhere names none
            raise
        raise CheckpointError(sentence) from error
    except pickle.UnpicklingError as error:  # of torch: an instruction or a type that it does not take
        raise CheckpointError(f"{sentence}: {' '.join(str(error).split())[:200]}") from error
    except Exception as error:
        raise CheckpointError(sentence) from error
