"""The examples for other people's models run, and assert what they show themselves."""

import os
import re
import subprocess
import sys

import pytest
from repository import ROOT, search_path

pytest.importorskip("peft")


def test_peft_trainer():
    environment = os.environ | {
        "PYTHONPATH": search_path(ROOT),
        "OMP_NUM_THREADS": "1",
        "ZINIT_POISON_OUTPUTS": "0",
    }
    command = [sys.executable, ROOT / "examples" / "peft_trainer.py", "--fast"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    base, adapted = (
        int(re.search(rf"{name} +[\d,]+ +(\d+)%", done.stdout)[1]) for name in ("base", "adapted")
    )
    assert adapted >= base + 20
