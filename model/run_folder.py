"""The folder of a run: it belongs to one process at a time, its files are whole or not there, and its metrics are a
line of JSON per step.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from zinit_kernels.checkpoints import write_together

from .errors import UserError, warn

Entry = dict[str, Any]  # numbers, and lists of one number for each adapted layer


def write_file(path: str | Path, content: bytes) -> None:
    """Replaces the file in one step. Raises UserError if it cannot be written; the old file is then unchanged."""
    write_files({path: content})


def write_files(files: Mapping[str | Path, bytes]) -> None:
    """`write_file` for files that belong together: none is replaced before all of them are on the disk."""
    try:
        write_together(files)
    except OSError as error:
        raise _not_written(error.filename, error) from error


def append(file: FileIO, content: bytes) -> None:
    """Appends to a file that was opened without a buffer. An OSError leaves what was there, and no half of `content`.

    A buffer would keep what a full disk refused, and fail again when the file is closed.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        while content:
            content = content[file.write(content) :]
    except OSError:
        file.truncate(end)
        raise


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns an OSError while `path` is written atomically into a UserError."""
    try:
        yield
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: str | Path, error: OSError) -> UserError:
    kept = "the file that was there is unchanged" if Path(path).exists() else "nothing was left there"
    return UserError(f"cannot write {path}: {error.strerror or error}; {kept}.")


def remove_leftovers(directory: Path, names: Sequence[str]) -> None:
    """Removes the temporary files of writes that were killed."""
    for name in names:
        for leftover in directory.glob(f".{name}.*.part"):
            leftover.unlink(missing_ok=True)


def refuse_occupied(directory: str | Path, advice: str) -> None:
    """Raises UserError if the directory holds files, or is a file. advice: what to do then."""
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"the output folder {directory} is a file.")
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"the output folder {directory} is not empty: {advice}.")


def refuse_unwritable(directory: str | Path) -> None:
    """Raises UserError if files cannot be written into the directory, or if it cannot be made where it is named."""
    directory = Path(directory)
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"the output folder {directory} cannot be: {place} is a file.")
    if not os.access(place, os.W_OK | os.X_OK):
        read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        reason = f"the file system of {place} is read-only" if read_only else f"no permission for {place}"
        raise UserError(f"the output folder {directory} cannot be written: {reason}.")


@contextmanager
def held(directory: str | Path, wait: bool = False) -> Iterator[Callable[[], None]]:
    """Locks the directory for this process. If another process has locked it, waits, or raises UserError.

    The operating system unlocks it when this process ends, however it ends. No lock file is left.

    Gives a function that raises UserError if another directory has this name by now. Whoever deletes the directory of
    a run that still writes, and starts another run there, would get files of both.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another run is writing into {directory}: wait for it, or name another folder."
        ) from None
    except OSError:
        pass  # a file system, some of the networked, without locks on folders

    def refuse_another() -> None:
        path = Path(directory)
        if path.exists() and not os.path.samestat(path.stat(), os.fstat(descriptor)):
            raise UserError(
                f"{directory} was moved away or deleted while this run wrote into it, and another folder has its name "
                "now: this run leaves that one alone and ends."
            )

    try:
        yield refuse_another
    finally:
        os.close(descriptor)


def make_directory(directory: str | Path) -> Path:
    """Makes the directory and its parents, if they are not there, and returns it."""
    directory = Path(directory)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    return directory


class MetricsLog:
    """metrics.jsonl: one object per line, each with its "step". A line is in the file as soon as it is written.

    Training lines have the step, from 0; validation lines have the number of steps done. A run that resumes after
    `steps_done` steps drops the lines of later steps and writes them again, and warns of steps before that have no
    line. A new run, with 0, starts an empty file.
    writes: False for a process that only keeps the entries, because another one writes them.
    """

    def __init__(
        self,
        path: str | Path,
        steps_done: int = 0,
        also: Sequence[Callable[[Entry], None]] = (),
        writes: bool = True,
    ):
        self.path, self.also = Path(path), also
        before = read_metrics(self.path) if steps_done else []
        self.entries = [entry for entry in before if entry["step"] + ("loss" in entry) <= steps_done]
        known = {entry["step"] for entry in self.entries if "loss" in entry}
        if missing := steps_done - len(known):
            warn(
                f"{self.path} lacks the lines of {missing} of the {steps_done} steps that are done: the pictures will "
                "not show them, and a validation among them no longer counts as the best."
            )
        self._file = None
        if writes:
            write_file(self.path, "".join(map(_line, self.entries)).encode())
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 closed by close()

    def write(self, **entry: Any) -> None:
        """Appends one line, and tells it to whoever else wants it."""
        self.entries.append(entry)
        for tell in self.also:
            tell(entry)
        if self._file is not None:
            with writing(self.path):
                append(self._file, _line(entry).encode())

    def close(self) -> None:
        """Closes the file; `entries` stays."""
        if self._file is not None:
            with writing(self.path):
                self._file.close()


def read_metrics(path: str | Path) -> list[Entry]:
    """The entries of a metrics file, [] if there is none.

    A line that cannot be read is left out, with a warning that names it; without one if it is the last, which a crash
    may have cut short. Raises UserError for a file that is something else.
    """
    path, entries, broken = Path(path), [], []
    if path.exists() and not path.is_file():  # reading a pipe would wait for whoever writes it
        raise UserError(f"{path} is no metrics file, it is not a file at all. Move it away to go on.")
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            broken.append(number)
            continue
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            raise UserError(f"{path} is no metrics file: {line[:40]!r} holds no step. Move it away to go on.")
        if all(map(_is_number_or_list, entry.values())):
            entries.append(entry)
        else:
            broken.append(number)
    if not entries and len(broken) > 1:
        raise UserError(f"{path} is no metrics file: none of its lines can be read. Move it away to go on.")
    if broken and broken != [len(lines)]:
        warn(f"{path}: what is in line {', '.join(map(str, broken))} cannot be read and is left out.")
    return entries


def _is_number_or_list(value: object) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return all(type(number) in (int, float) for number in numbers)


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry) + "\n"
