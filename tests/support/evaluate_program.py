"""`python -m evaluate` in this process."""

from evaluate.__main__ import main
from model.errors import run_program


def run(*words):
    """The exit code of `python -m evaluate WORDS`."""
    try:
        run_program(lambda: main([str(word) for word in words]))
    except SystemExit as end:
        return end.code
    return 0
