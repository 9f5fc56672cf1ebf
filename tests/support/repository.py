"""Where the checkout is, for tests that read its files or start its programs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def search_path(*folders):
    """PYTHONPATH for a program that a test starts: the folders before what is there already.

    `make test-oldest` and `make test-transformers` put other versions there, and the programs must take them too.
    """
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*map(str, folders), *([given] if given else [])])


def run_python(*command, timeout=240, **environment):
    """A Python of its own with this checkout on its path: `*command` are its arguments. What it said, as text."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True, text=True, timeout=timeout,
        env=os.environ | {"PYTHONPATH": search_path(ROOT)} | environment,
    )  # fmt: skip
