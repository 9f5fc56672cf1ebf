"""The examples for other people's models run, and assert what they show themselves."""

import re

import pytest
from repository import ROOT, run_python

pytest.importorskip("peft")


def test_peft_trainer():
    quick = {"OMP_NUM_THREADS": "1", "ZINIT_POISON_OUTPUTS": "0"}
    done = run_python(ROOT / "examples" / "peft_trainer.py", "--fast", timeout=600, **quick)
    assert done.returncode == 0, done.stderr
    base, adapted = (
        int(re.search(rf"{name} +[\d,]+ +(\d+)%", done.stdout)[1]) for name in ("base", "adapted")
    )
    assert adapted >= base + 20
