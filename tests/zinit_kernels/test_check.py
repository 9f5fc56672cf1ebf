"""python -m zinit_kernels.check, on a machine with nothing but the CPU."""

import re
import subprocess
import sys

import pytest
import torch
from fake_gpu import gpu  # noqa: F401 (fixture)

from zinit_kernels import check, console, proof
from zinit_kernels.backends import composed, reference
from zinit_kernels.console import InputError


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


def test_no_memory_is_no_wrong_answer(monkeypatch, capsys):
    """Ten backends were called wrong where an allocation had failed."""

    def fail(call):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 133120 bytes.")

    monkeypatch.setattr(composed, "attention", fail)
    with pytest.raises(SystemExit) as end:
        console.run(lambda: check.main([]))
    said = capsys.readouterr()
    assert (
        end.value.code == 2 and said.err == "error: there is not enough memory.\n" and "WRONG" not in said.out
    )


GPU = ["--gpu", "--dtype", "float32", "--head-dim", "16"]


@pytest.fixture
def imagined(gpu, monkeypatch):  # noqa: F811
    """One imagined GPU, on which the trials of `zinit check --gpu` run."""
    monkeypatch.setattr(check, "gpus", lambda: [torch.device("cpu")])
    return gpu


def test_the_trials_of_a_gpu_are_run_and_kept(imagined, capsys):
    assert check.main(GPU) == 0
    out = capsys.readouterr().out
    families = [family for of in proof.FAMILIES.values() for family in of]
    for family in families:
        head_dim = "" if family == proof.FEW_ROWS else ", head_dim 16"
        assert re.search(rf"{family} \(float32{head_dim}\) +right, ", out), out
    assert "Imagined H200" in out and f"kept in {proof.folder()}" in out
    assert len(proof.store_of(torch.device("cpu")).verdicts) == len(families)
    imagined.triton.error = 0.5
    assert check.main(GPU) == 1, "the verdicts of before were believed"
    assert "WRONG: AssertionError: call 0, seed 0: out: error" in capsys.readouterr().out
    imagined.triton.refused = "not on this chip"
    imagined.triton.error = 0.0
    assert check.main(GPU) == 0
    assert "not usable: not on this chip" in capsys.readouterr().out


def test_verdicts_are_forgotten(imagined, capsys):
    check.main(GPU)
    assert check.main(["--forget"]) == 0
    assert "removed 1 files" in capsys.readouterr().out and not list(proof.folder().rglob("*.json"))
    assert check.main(["--forget"]) == 0


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--head-dim", "64"], "add --gpu"),
        (["--gpu", "--forget"], "one after the other"),
        (["--gpu", "--head-dim", "300"], "must be 1 to 256, got 300"),
        pytest.param(
            ["--gpu"],
            "finds none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_the_trials_cannot_do_is_said(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        check.main(arguments)
