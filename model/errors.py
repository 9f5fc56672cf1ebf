"""The one exception that the programs show as a sentence instead of a traceback, and the programs' names."""

from __future__ import annotations

from zinit_kernels.console import InputError, is_out_of_memory, note, run, warn

__all__ = ["UserError", "is_out_of_memory", "note", "program_name", "run_program", "warn"]


class UserError(InputError):
    """Something the user passed, or a file they named, is wrong. One sentence: what, and what to do."""


run_program = run


def program_name(name: str) -> str:
    """How the user calls one of these programs: `zinit train` where it is installed, else python -m model.train."""
    return f"python -m model.{name}" if __package__ == "model" else f"zinit {name}"
