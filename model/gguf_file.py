"""GGUF files, which llama.cpp and its relatives read: the header, and where each tensor's bytes are.

The header is read here and not by the gguf package, which believes its counts: an array that says it has 10**12 numbers
keeps that package busy until memory ends. Here nothing is read, and no memory is taken, beyond the end of the file.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from zinit_kernels.checkpoints.tensor_files import regular_file
from zinit_kernels.console import shortened, shown

from .errors import UserError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST = 100_000  # fields, tensors: the largest models have some thousands
_LONGEST_KEY = 1 << 16
# Type number -> numpy's dtype. 7 is a truth value, 8 a string, 9 an array
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


class TensorInfo(NamedTuple):
    """A tensor as the header describes it."""

    shape: tuple[int, ...]  # as torch has it: the last dimension lies together
    type: Any  # a gguf.GGMLQuantizationType
    start: int  # byte in the file
    size: int  # bytes


@dataclass(frozen=True)
class GGUF:
    """The header of a GGUF file, and the file, mapped."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: np.ndarray  # uint8, all of the file; written pages are private copies

    def bytes_of(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8, without a copy."""
        info = self.tensors[name]
        return self.data[info.start : info.start + info.size]


def gguf_package() -> ModuleType:
    """The gguf package. Raises UserError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            "to read a GGUF file the package gguf is needed, and it is not installed: pip install gguf, or "
            "pip install 'zinit-kernels[gguf]'."
        ) from None
    return gguf


def find_gguf(path: Path) -> Path | None:
    """The GGUF file of this name, or the one in a folder. None if there is none; UserError if there are several."""
    if not path.is_dir():
        return regular_file(path) if path.is_file() else None
    found = sorted(file for file in path.glob("*.gguf") if not file.name.lower().startswith("mmproj"))
    if len(found) > 1:
        if all(_PART.search(file.name) for file in found):
            return found[0]  # whose header says what to do
        raise UserError(f"{path} holds {len(found)} GGUF files: name one of them, such as {found[0]}.")
    return found[0] if found else None


def read_gguf(path: Path) -> GGUF:
    """The header of a GGUF file. Raises UserError for a damaged file, and OSError for one that cannot be read."""
    if path.stat().st_size < 24:
        raise UserError(f"{path} is no GGUF file: it has only {path.stat().st_size} bytes.")
    data = np.memmap(path, dtype=np.uint8, mode="c")
    cursor = _Cursor(data, path)
    if bytes(cursor.take(4)) != _MAGIC:
        raise UserError(f"{path} is no GGUF file: it does not begin with GGUF.")
    version = cursor.number("<I")
    if version not in _VERSIONS:
        raise UserError(
            f"{path} is a GGUF file of version {version}, supported are 2 and 3 with the lowest byte first: convert "
            "the model again with today's llama.cpp."
        )
    num_tensors, num_fields = cursor.number("<Q"), cursor.number("<Q")
    for count, what in ((num_tensors, "tensors"), (num_fields, "fields")):
        if count > _MOST:
            raise UserError(f"{path} is damaged: its header says that it has {count} {what}.")
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        name = cursor.text(_LONGEST_KEY)
        if name in fields:
            raise UserError(f"{path} says {shortened(name)} twice.")
        fields[name] = cursor.value(cursor.number("<I"), name)
    return GGUF(path, fields, _tensors(cursor, num_tensors, fields), data)


def _tensors(cursor: _Cursor, count: int, fields: dict[str, Any]) -> dict[str, TensorInfo]:
    gguf, path = gguf_package(), cursor.path
    found = []
    for _ in range(count):
        name, num_dims = cursor.text(_LONGEST_KEY), cursor.number("<I")
        if not 1 <= num_dims <= 4:
            raise UserError(f"{path} is damaged: {shortened(name)} has {num_dims} dimensions.")
        shape = tuple(cursor.number("<Q") for _ in range(num_dims))[::-1]
        found.append((name, shape, cursor.number("<I"), cursor.number("<Q")))
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise UserError(f"{path} is damaged: general.alignment is {shown(alignment)}.")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, type_number, offset in found:
        if name in tensors:
            raise UserError(f"{path} holds {shortened(name)} twice.")
        try:
            type = gguf.GGMLQuantizationType(type_number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[type]
        except (ValueError, KeyError):
            raise UserError(
                f"{path}: {shortened(name)} has the type {type_number}, which the installed gguf package does not "
                "know: pip install --upgrade gguf."
            ) from None
        if 0 in shape or shape[-1] % block:
            raise UserError(
                f"{path} is damaged: {shortened(name)} of type {type.name} has the shape {shape}."
            )
        size = math.prod(shape) // block * block_bytes
        if start + offset + size > len(cursor.data):
            raise UserError(
                f"{path} is truncated: {shortened(name)} ends at byte {start + offset + size}, and the file at "
                f"{len(cursor.data)}."
            )
        if offset % 8:
            raise UserError(f"{path} is damaged: {shortened(name)} begins at the odd byte {offset}.")
        tensors[name] = TensorInfo(shape, type, start + offset, size)
    if sum(tensor.size for tensor in tensors.values()) > len(cursor.data):
        raise UserError(f"{path} is damaged: its tensors together are larger than the file.")
    return tensors


class _Cursor:
    """Reads a file from its beginning, never beyond its end."""

    def __init__(self, data: np.ndarray, path: Path):
        self.data, self.path, self.at = memoryview(data), path, 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise UserError(f"{self.path} is truncated: its header is not whole.")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, format: str) -> Any:
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def text(self, longest: int | None = None) -> str:
        size = self.number("<Q")
        if longest is not None and size > longest:
            raise UserError(f"{self.path} is damaged: a name in its header has {size} bytes.")
        return bytes(self.take(size)).decode(errors="replace")

    def value(self, type: int, name: str) -> Any:
        if type == _STRING:
            return self.text()
        if type == _BOOL:
            return self.number("<B") != 0
        if type in _SCALARS:
            return self._numbers(_SCALARS[type], 1)[0]
        if type != _ARRAY:
            raise UserError(
                f"{self.path} is damaged: {shortened(name)} has a value of the unknown type {type}."
            )
        items, count = self.number("<I"), self.number("<Q")
        if items == _STRING:
            if 8 * count > len(self.data) - self.at:
                self.take(8 * count)  # which says that the file is truncated
            return [self.text() for _ in range(count)]
        if items != _BOOL and items not in _SCALARS:
            raise UserError(
                f"{self.path}: {shortened(name)} is a list of the type {items}, which is not read."
            )
        return self._numbers(_SCALARS.get(items, "<u1"), count)

    def _numbers(self, dtype: str, count: int) -> list[Any]:
        numbers: list[Any] = np.frombuffer(self.take(np.dtype(dtype).itemsize * count), dtype).tolist()
        return numbers
