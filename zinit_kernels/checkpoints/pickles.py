"""What a file of torch.save asks for, read before torch loads it.

`torch.load(weights_only=True)` runs no code. But it rebuilds sparse, quantised and meta tensors, which nothing here can
use; it makes byte arrays of any size that the file names; and it hashes tuples of any depth, which crashes the process.
So the pickle's instructions are checked first, without executing one.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, NamedTuple

import torch

from .adapter import CheckpointError

DEEPEST = 100  # containers within containers; an optimizer's state in a training file has 6
SUMMED = (
    256 << 20
)  # bytes: of larger files, which hold base models, the checksums are not compared (1 s per GB)
LARGEST = 20_000_000  # objects; a training file of 10,000 tensors has some 200,000
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch.save's format before 1.6

# What dictionaries of tensors need, and the argparse.Namespace of a training file
_PLAIN = {
    "collections OrderedDict",
    "collections Counter",
    "argparse Namespace",
    "torch Size",
    "torch Tensor",
    "torch device",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
    "torch.nn.parameter Parameter",
    "torch.storage TypedStorage",
    "torch.storage UntypedStorage",
}
_UNUSUAL = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without values, on the meta device",
}


class Truncated(Exception):
    """The pickle is damaged, or the file is none of torch.save's."""


def check_zip(path: Path) -> None:
    """Raises CheckpointError for what would not load as plain tensors, Truncated for what is no whole file."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            names = [record.filename.partition("/")[2] for record in records]
            _check_ends(archive, path)
            if "constants.pkl" in names:
                raise CheckpointError(
                    f"{path} is a TorchScript archive, which holds a program: save the model's state_dict()"
                )
            if any(record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 for record in records):
                # mapped, compressed bytes would be taken for numbers
                raise CheckpointError(
                    f"{path} is a compressed archive, which torch.save never writes: store its records "
                    "uncompressed (unzip, then zip -0)"
                )
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise Truncated("its records are larger than the file")
            # torch finds a record whatever the case of its name, and takes either of two
            if len({record.filename.lower() for record in records}) < len(records):
                raise CheckpointError(
                    f"{path} holds two records of one name, and programs differ in which they read"
                )
            if "data.pkl" not in names:
                raise Truncated("it has no data.pkl")
            for record in records:
                if record.CRC == 0:  # torch.save can be told to compute no checksums
                    del record.CRC
            if path.stat().st_size <= SUMMED:
                _check_sums(archive, records)
            with archive.open(records[names.index("data.pkl")]) as pickle:
                _check_pickle(io.BytesIO(pickle.read()), path)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise Truncated(str(error)) from error


def _check_ends(archive: zipfile.ZipFile, path: Path) -> None:
    """CheckpointError for bytes around the archive. Readers of zip files look for its end, and pass over them."""
    end = struct.pack("<4s16xH", b"PK\5\6", len(archive.comment))
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - len(end) - len(archive.comment)))
        found = file.read(len(end))
    begins = min((record.header_offset for record in archive.infolist()), default=0)
    if begins or found[:4] != end[:4] or found[-2:] != end[-2:]:
        raise CheckpointError(
            f"{path} has more bytes {'before' if begins else 'behind'} what torch.save wrote: something was "
            "appended, or two files were joined; download or save it again"
        )


def _check_sums(archive: zipfile.ZipFile, records: list[zipfile.ZipInfo]) -> None:
    """Reads every record once, which compares its checksum: torch does not, and a damaged tensor would be taken."""
    for record in records:
        with archive.open(record) as file:
            while file.read(1 << 20):
                pass


def check_legacy(path: Path) -> None:
    """As `check_zip`, for the format before torch 1.6: the magic number, a version, the system, the content, ..."""
    with open(path, "rb") as file:
        beginning = io.BytesIO(file.read(64))  # another pickle may be one object of gigabytes
        magic = _instructions(beginning)
        file.seek(beginning.tell())
        if [argument for name, argument in magic if name.startswith("LONG")] != [_MAGIC]:
            raise Truncated("it does not begin as torch.save's files do")
        _check_protocol(magic, path)
        for _ in ("version", "system", "content", "storage keys"):
            if "torch.storage UntypedStorage" in _check_pickle(file, path):
                raise CheckpointError(
                    f"{path} holds newer dtypes in the format before torch 1.6, which torch itself cannot read"
                )


def _instructions(pickle: IO[bytes]) -> list[tuple[str, object]]:
    try:
        return [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(pickle)]
    except MemoryError:
        raise
    except Exception as error:  # in a damaged pickle whatever the reader stumbles over
        raise Truncated(str(error)) from error


def _check_pickle(pickle: IO[bytes], path: Path) -> set[str]:
    """The classes and functions that the pickle asks for."""
    extents, wanted = _Extents(), set()
    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            _check_protocol([(opcode.name, argument)], path)
            if opcode.name in ("GLOBAL", "INST"):
                _check_global(str(argument), path)
                wanted.add(str(argument))
            extent = extents.follow(opcode, argument)
            if extent.depth > DEEPEST or extent.size > LARGEST:
                raise CheckpointError(
                    f"{path} nests its content deeper or more often than any checkpoint does"
                )
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise Truncated(str(error)) from error
    return wanted


def _check_protocol(instructions: Iterable[tuple[str, object]], path: Path) -> None:
    for name, argument in instructions:
        if name == "PROTO" and argument != 2:
            raise CheckpointError(
                f"{path} was saved with pickle protocol {argument}, which torch reads only by running what the "
                "file says: save it again with torch.save's own protocol, 2"
            )


def _check_global(name: str, path: Path) -> None:
    module, _, attribute = name.partition(" ")
    if name in _PLAIN or (module == "torch" and ("Storage" in attribute or _is_dtype(attribute))):
        return
    if unusual := _UNUSUAL.get(attribute if module == "torch._utils" else ""):
        raise CheckpointError(f"{path} holds {unusual}; only dense tensors with values are read")
    if module.startswith("torch.distributed"):
        raise CheckpointError(
            f"{path} holds one process's share of a distributed tensor: save the full state dict, e.g. by "
            "accelerate's merge-weights"
        )
    if name in ("torch.serialization _get_layout", "torch._tensor _rebuild_from_type_v2"):
        return  # of a sparse tensor, which is named, and of a tensor with attributes, whose type is asked for later
    raise CheckpointError(
        f"{path} holds Python objects beside tensors, so it was not loaded: it asks for {module}.{attribute}"
    )


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


class _Extent(NamedTuple):
    """How far an object on the unpickler's stack reaches."""

    depth: int = 0  # containers within containers
    size: int = 1  # objects, where one that is held twice counts twice: so a hash or a copy would walk them


_LEAF = _Extent()
# The container that these change, their lowest operand, stays on the stack
_MUTATORS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")


class _Extents:
    """Follows a pickle's instructions on a stack of extents, without making the objects."""

    def __init__(self) -> None:
        self.stack: list[_Extent | None] = []  # None: a mark
        self.memo: dict[object, _Extent] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument: object) -> _Extent:
        """The extent of what the instruction leaves on top of the stack."""
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1] or _LEAF
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif opcode.name == "MARK":
            self.stack.append(None)
        else:
            self._apply(opcode)
        return (self.stack[-1] or _LEAF) if self.stack else _LEAF

    def _apply(self, opcode: pickletools.OpcodeInfo) -> None:
        taken: list[_Extent] = []
        operands = list(opcode.stack_before)
        if pickletools.stackslice in operands:
            while (extent := self.stack.pop()) is not None:
                taken.append(extent)
            operands = operands[: operands.index(pickletools.markobject)]
        taken += [self.stack.pop() or _LEAF for _ in operands]
        if not opcode.stack_after:
            return
        if opcode.name in _MUTATORS:
            container, *inner = reversed(taken)
        else:
            container, inner = _LEAF, taken
        depth = max((extent.depth + 1 for extent in inner), default=0)
        size = container.size + sum(extent.size for extent in inner)
        self.stack += [_Extent(max(container.depth, depth), size)] * len(opcode.stack_after)
