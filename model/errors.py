"""The one exception that the programs show as a sentence instead of a traceback."""

from __future__ import annotations

from zinit_kernels.console import InputError, run, warn

__all__ = ["UserError", "run_program", "warn"]


class UserError(InputError):
    """Something the user passed, or a file they named, is wrong. One sentence: what, and what to do."""


run_program = run
