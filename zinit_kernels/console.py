"""What every console program shares: how it shows text from outside, refuses bad input, and exits.

Names of tensors, files and metadata come from files that anybody may have written. An escape sequence in one could move
the cursor or forge a line of output, so all text from outside passes `printable` or `shown`.
"""

from __future__ import annotations

import argparse
import atexit
import os
import re
import reprlib
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

LONGEST_NAME = 200  # characters of a foreign name that a message shows


def printable(text: str) -> str:
    """`text` with everything that is not a visible character or a space as an escape: \\x1b, \\u202e, \\ud800."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# Of what a terminal obeys: control characters but the tab and the line end, and those that turn the direction of text.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def for_output(text: str) -> str:
    """Text of several lines, such as a model's answer, as it is written to stdout.

    For a terminal, what it would obey stands there as an escape (\\x1b), so that an answer cannot move the cursor or
    change a title. A file or a pipe gets the text as it is.
    """
    if sys.stdout is None or not sys.stdout.isatty():
        return text
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shortened(text: str, length: int = LONGEST_NAME) -> str:
    """`printable`, cut at `length` characters."""
    return printable(text if len(text) <= length else f"{text[:length]}...")


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong, self.maxother = 3, 120, 60, 120


def shown(value: object) -> str:
    """The repr of a foreign value: one line, short whatever its size and depth."""
    return printable(_Shown().repr(value))


class InputError(Exception):
    """Something the user passed, or a file they named, is wrong. The message is one printable sentence."""

    def __init__(self, sentence: object = ""):
        super().__init__(printable(str(sentence)))


class Parser(argparse.ArgumentParser):
    """argparse's parser, with three differences.

    An option given twice is an error. argparse keeps the last value and drops the first without a word, so
    `--data a --data b` would read b alone. Options with action="append" may be repeated, as in argparse.

    An empty name of a file or folder (an option of type Path) is an error: Path("") is the working directory.

    An error is one printable sentence, without the usage before it. The exit status is argparse's, 2.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._given: set[str] = set()
        self.register("action", None, _StoreOnce)
        self.register("action", "store", _StoreOnce)
        self.register("action", "store_true", _StoreTrueOnce)

    @classmethod
    def of_module(cls, name: str, docstring: str | None) -> Parser:
        """The parser of `python -m NAME`, whose --help shows the module's docstring as it is written."""
        raw = argparse.RawDescriptionHelpFormatter
        return cls(prog=f"python -m {name}", description=docstring, formatter_class=raw)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's; what an earlier call was given does not count."""
        self._given.clear()
        return super().parse_known_args(args, namespace)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        # Path("") is the working directory: a variable of a shell that is not set would name it
        if not arg_string and action.type is Path:
            raise argparse.ArgumentError(action, "the name of a file or folder is empty")
        return super()._get_value(action, arg_string)

    def error(self, message: str) -> NoReturn:
        """Says the sentence on stderr and exits with status 2."""
        _tell(f"error: {printable(message)}; --help lists the options.")
        sys.exit(2)

    def note(self, action: argparse.Action, option: str | None) -> None:
        """Records that an option was given. Raises argparse.ArgumentError the second time."""
        if option is None:  # a positional argument, which argparse takes once
            return
        if action.dest in self._given:
            raise argparse.ArgumentError(action, "given twice, and only one can count")
        self._given.add(action.dest)


class _StoreOnce(argparse._StoreAction):
    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        parser.note(self, option_string)
        super().__call__(parser, namespace, values, option_string)


class _StoreTrueOnce(argparse._StoreTrueAction):
    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        parser.note(self, option_string)
        super().__call__(parser, namespace, values, option_string)


def note(sentence: str) -> None:
    """Says on stderr what is worth knowing, where nothing is wrong."""
    _tell(f"note: {printable(sentence)}")


def warn(sentence: str) -> None:
    """Says on stderr what may be wrong. The program goes on."""
    _tell(f"warning: {printable(sentence)}")


def refuse(error: Exception) -> int:
    """Says on stderr what is wrong, in one sentence. Returns the exit status for bad input."""
    sentence = str(error)
    if isinstance(error, OSError):
        sentence = error.strerror or sentence
        if error.filename is not None:
            sentence = f"{os.fsdecode(error.filename)}: {sentence}"
    _tell(f"error: {printable(sentence).rstrip('.')}.")
    return 2


_NO_MEMORY = re.compile(
    r"out of memory|(can't|cannot|could not|failed to) allocate|not enough memory|bad[_ ]alloc"
    r"|aoti_torch_empty_strided\(.*API call failed",  # all that torch says of its stable ABI's allocations
    re.IGNORECASE | re.DOTALL,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what Python or torch raises for want of memory: torch on a CPU has no class for it."""
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a program's `main` and exits: 0 or what it returns, 2 after a sentence for what the user can mend.

    A reader that has gone (`| head`) is no fault: the program stops with 128 + SIGPIPE, which is what a shell reports
    for a program that the signal ends. Ctrl-C: 128 + SIGINT.
    """
    try:
        status = _status(main)
        if sys.stdout is not None:  # None: the program was started with its output closed
            sys.stdout.flush()  # here, because a failure while Python shuts down can no longer be handled
    except BrokenPipeError:
        _discard_output()
        status = 128 + signal.SIGPIPE
    except (InputError, OSError) as error:  # of the latter: no space left, no permission, no such file
        status = refuse(error)
        _discard_output()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        status = refuse(InputError("there is not enough memory"))
        _discard_output()
    except UnicodeEncodeError as error:
        what = (
            f"the output's encoding, {error.encoding}, has no {shown(error.object[error.start : error.end])}"
        )
        status = refuse(InputError(f"{what}: set PYTHONIOENCODING=utf-8"))
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except SystemExit as error:
        code = error.code
        if not _ends_at_once or isinstance(code, str):
            raise
        status = code
    if _ends_at_once:
        _end(int(status or 0))
    sys.exit(0 if status is None else status)


_ends_at_once = False


def end_at_once() -> None:
    """From now on `run` ends the process without taking Python apart, for one that has threads of torch.distributed.

    Until 3.13 Python ends a thread that asks for the GIL meanwhile by pthread_exit, which within torch's noexcept code
    is std::terminate. gloo's thread asks for it to let go of the last tensor: of 31 runs of two processes that
    trained together, one aborted with its work done.
    """
    global _ends_at_once
    _ends_at_once = True


def _end(status: int) -> NoReturn:
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):  # its reader has gone, or it is closed
                stream.flush()
    os._exit(status)


_silent = False


def silence(silent: bool) -> None:
    """Whether notes, warnings and errors are said at all: of several processes with one work, only the first speaks."""
    global _silent
    _silent = silent


def _tell(line: str) -> None:
    if sys.stderr is not None and not _silent:
        with suppress(OSError):  # where nobody reads, nothing is to be said
            print(line, file=sys.stderr)


def _status(main: Callable[[], int | None]) -> int | str | None:
    try:
        return main()
    except SystemExit as left:  # argparse, after --help or a usage error
        return left.code


def _discard_output() -> None:
    """Sends what Python still holds back and cannot write to nowhere: at shutdown it would be one more error."""
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
