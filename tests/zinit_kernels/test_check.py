"""python -m zinit_kernels.check, on a machine with nothing but the CPU."""

import subprocess
import sys

import pytest

from zinit_kernels import check
from zinit_kernels.backends import composed, reference


def test_says_what_there_is_and_that_it_is_right():
    ran = subprocess.run([sys.executable, "-m", "zinit_kernels.check"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "zinit_kernels" in ran.stdout and "cpu" in ran.stdout
    assert ran.stdout.rstrip().endswith("all that could run was right")
    for backend in ("composed", "reference"):
        lines = [line for line in ran.stdout.splitlines() if line.split()[:1] == [backend]]
        assert len(lines) == 4 and all(line.endswith("right") for line in lines)
    assert "cuda       decode                                 not usable: " in ran.stdout


def test_a_wrong_backend_is_named_and_fails(monkeypatch, capsys):
    right = reference.attention_with_cache
    monkeypatch.setattr(composed, "attention_with_cache", lambda call: (right(call)[0] * 1.5, None))
    monkeypatch.setattr(check, "devices", lambda: ["cpu"])
    assert check.main() == 1
    out = capsys.readouterr().out
    assert "composed   decode, torch.float32                  WRONG: AssertionError: out: error" in out
    assert "2 wrong" in out


@pytest.mark.parametrize("error", [RuntimeError("no kernel image"), ValueError("refused")])
def test_an_exception_is_a_wrong_answer(monkeypatch, capsys, error):
    def fail(call):
        raise error

    monkeypatch.setattr(composed, "attention", fail)
    assert check.main() == 1
    assert f"WRONG: {type(error).__name__}: {error}" in capsys.readouterr().out
