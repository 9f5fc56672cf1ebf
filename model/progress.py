"""How far a program is: a bar on a terminal, and a line now and then where stderr goes into a file or a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Protocol, TextIO, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 10.0  # seconds between two lines
_ITEMS = 64  # between two looks at the clock, where an item takes less than a millisecond
_Item = TypeVar("_Item")


class Show(Protocol):
    """Says how far it is."""

    def __call__(self, done: int, title: str = "", detail: str = "", always: bool = False) -> None:
        """`done` of the total; a title before it and a detail behind it. always: also if the last line is new."""


class _Heedless:
    """A file that cannot be written to is no reason to end hours of training: a full disk, a reader that has gone."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, text: str) -> int:
        with suppress(OSError):
            return self.file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def messages() -> Console:
    """The console for what is said on stderr, as it is: paths may hold rich's markup, and long lines stay whole."""
    file = None if sys.stderr is None else cast(TextIO, _Heedless(sys.stderr))
    return Console(file=file, stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def counted(console: Console, items: Iterable[_Item], title: str) -> Iterator[_Item]:
    """The items, while the progress through them is shown."""
    total = len(items) if isinstance(items, Sized) else None
    with progress(console, total, transient=True) as show:
        for done, item in enumerate(items):
            if done % _ITEMS == 0:
                show(done, title)
            yield item


@contextmanager
def progress(console: Console, total: int | None, done: int = 0, transient: bool = False) -> Iterator[Show]:
    """Yields what shows the progress; `done` is where it begins. total: None = not known. transient: the bar goes away
    at the end.
    """
    if not console.is_interactive:
        yield _Lines(console, total, done)
        return
    columns = ("{task.description}", "{task.fields[detail]}")
    title, detail = (TextColumn(text, markup=False) for text in columns)
    with Progress(
        title, BarColumn(), MofNCompleteColumn(), detail, TimeRemainingColumn(), TextColumn("left"),
        console=console, transient=transient,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=total, completed=done, detail="")

        def show(done: int, title: str = "", detail: str = "", always: bool = False) -> None:
            bar.update(task, completed=done, description=title, detail=detail)

        yield show


@contextmanager
def stage(console: Console, title: str, steps: int) -> Iterator[Callable[..., None]]:
    """Shows the progress of a part of a demo. Yields a function of the steps done and, if there is one, the loss."""
    with progress(console, steps) as bar:

        def show(done: int, loss: float | None = None) -> None:
            bar(done, title, "" if loss is None else f"loss {loss:.2f}")

        bar(0, title, always=True)
        yield show
        bar(steps, title, always=True)


class _Lines:
    def __init__(self, console: Console, total: int | None, done: int):
        self.console, self.total, self.first = console, total, done
        self.began = self.said = time.monotonic()

    def __call__(self, done: int, title: str = "", detail: str = "", always: bool = False) -> None:
        now = time.monotonic()
        if not always and now - self.said < EVERY:
            return
        self.said = now
        of = "" if self.total is None else f"/{self.total}"
        parts = [f"{title} {done}{of}".lstrip(), detail]
        if self.total is not None and self.first < done < self.total:
            left = (now - self.began) / (done - self.first) * (self.total - done)
            parts.append(f"{timedelta(seconds=round(left))} left")
        self.console.print(", ".join(part for part in parts if part))
