"""The one exception the programs show as a sentence instead of a traceback, and how they do it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user passed, or a file they named, is wrong. One sentence: what, and what to do."""


def run_program(main: Callable[[], None]) -> None:
    """Runs a program's main; what the user can mend is one sentence on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        sys.exit(_tell(str(error)))
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):  # what Python still holds back goes there, instead of into another error
            os.dup2(nowhere, descriptor)
        sys.exit(128 + signal.SIGPIPE)  # as a shell tells of those that the signal ends
    except OSError as error:  # no space left, no permission, no such file
        file = "" if error.filename is None else f"{error.filename}: "
        sys.exit(_tell(f"{file}{error.strerror or error}."))
    except KeyboardInterrupt:
        sys.exit(130)


def warn(sentence: str) -> None:
    """Shows what may be wrong, and goes on."""
    print(f"warning: {sentence}", file=sys.stderr)


def _tell(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2
