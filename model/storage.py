"""What a run writes: whole files or none, in a folder of its own."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from zinit_kernels.checkpoints import write_atomically

from .errors import UserError


def write_file(path: str | Path, content: bytes) -> None:
    """Replaces the file in one step. Raises UserError if it cannot be written; then the old one is unchanged."""
    with writing(path):
        write_atomically(path, content)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns what the operating system refuses while `path` is written atomically into a UserError."""
    try:
        yield
    except OSError as error:
        kept = "the file that was there is unchanged" if Path(path).exists() else "nothing was left there"
        raise UserError(f"cannot write {path}: {error.strerror or error}; {kept}.") from error


def remove_leftovers(directory: Path, names: Sequence[str]) -> None:
    """Removes what writes of these files left in the directory when they were killed."""
    for name in names:
        for leftover in directory.glob(f".{name}.*.part"):
            leftover.unlink(missing_ok=True)


def refuse_occupied(directory: str | Path, advice: str) -> None:
    """Raises UserError if the directory holds files, or is one; advice says what to do then."""
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"the output folder {directory} is a file.")
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"the output folder {directory} is not empty: {advice}.")


@contextmanager
def held(directory: str | Path) -> Iterator[None]:
    """Keeps the directory to itself: another process that asks for it meanwhile gets a UserError.

    The system lets go of it when this process ends, however it ends, and no file is left for it.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another run is writing into {directory}: wait for it, or name another folder."
        ) from None
    except OSError:
        pass  # a file system, some of the networked, without locks on folders
    try:
        yield
    finally:
        os.close(descriptor)


def make_directory(directory: str | Path) -> Path:
    """The directory, made with its parents if it was not there."""
    directory = Path(directory)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    return directory
