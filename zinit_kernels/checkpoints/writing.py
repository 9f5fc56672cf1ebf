"""Tensors to bytes, and bytes to disk: a file is there whole, or as it was before."""

from __future__ import annotations

import errno
import io
import json
import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from .adapter import CheckpointError


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file; equal content gives equal bytes. CheckpointError for a dtype that the format lacks."""
    # copies, because the library refuses tensors that share memory, which two names for one weight do
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        content = to_safetensors(copies, metadata)
    except KeyError as error:
        raise CheckpointError(f"safetensors has no room for tensors of {error}") from error
    # the library writes metadata in a random order; sorted, equal adapters are equal files
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def torch_bytes(content: object) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a new file beside `path`, flushes it to disk and renames it to `path`.

    An OSError names `path` and leaves what was there. A symbolic link stays one: the file it points to is replaced. A
    folder, a pipe or a device is never replaced. The new file has the permissions of the one that it replaces. Until
    then it is .NAME.xxxxxxxx.part; only a process that is killed in between leaves it there.
    """
    write_together({path: content})


def write_together(files: Mapping[str | os.PathLike[str], bytes]) -> None:
    """`write_atomically` for files that belong together: none is replaced before all of them are on the disk."""
    made: list[tuple[str | os.PathLike[str], Path, Path]] = []
    try:
        for path, content in files.items():
            real = _replaceable(path)
            # a random name, so that threads and machines do not share one
            temporary = real.with_name(f".{real.name}.{secrets.token_hex(4)}.part")
            made.append((path, temporary, real))
            with open(temporary, "xb") as file:
                if real.exists():  # a file that only its owner may read stays one
                    os.fchmod(file.fileno(), stat.S_IMODE(real.stat().st_mode))
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary, real in made:  # noqa: B007 an error names the path
            os.replace(temporary, real)
    except OSError as error:
        # the user's file, not the temporary one; a full disk names no file at all
        error.filename, error.filename2 = os.fspath(path), None
        raise
    finally:
        for _, temporary, _ in made:
            with suppress(OSError):  # a read-only file system would say it again, of the temporary file
                temporary.unlink()


def _replaceable(path: str | os.PathLike[str]) -> Path:
    """The file itself, where `path` is a link to it. Raises OSError for what is no file."""
    real = Path(os.path.realpath(path))
    if real.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if real.exists() and not real.is_file():
        raise FileExistsError(errno.EEXIST, "File exists and is no regular one", os.fspath(path))
    return real
