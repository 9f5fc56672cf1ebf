"""gpu-check without a GPU: its order and its minutes, what it keeps, and what it says."""

import sys
import zipfile
from pathlib import Path

import pytest
import torch
from bench_rows import FACTS, row
from rich.console import Console

from bench import gpu_check, runner
from bench.ledger import Ledger
from bench.suites import train


def step(part, seconds, code):
    return gpu_check.Step(part, seconds, [sys.executable, "-c", code])


def test_gpu_check_goes_on_and_keeps_what_is_done(tmp_path):
    """Steps that fail, are missing or take too long; the targets come whatever happened."""
    built = step("build", 20, "print('built')")
    steps = [
        built,
        step("test", 20, "raise SystemExit(3)"),
        step("test", 20, "print('second')"),
        gpu_check.Step("sanitize", 1, ["/no/such/tool"]),
        step("train", -58, "import time; print('begun', flush=True); time.sleep(60)"),
    ]
    assert gpu_check.check(tmp_path, steps, Console(width=140)) == 1
    (log,) = tmp_path.glob("*/gpu-check.log")
    text = log.read_text()
    assert "test: failed with exit code 3" in text
    assert "sanitize: /no/such/tool cannot be run: No such file or directory" in text
    assert "train: stopped after its" in text and "what it had is kept" in text
    assert "Triton forward, T = 512: TFLOP/s" in text and "not measured" in text
    assert "build: done, " in text and "built" in text and "second" in text
    assert gpu_check.check(tmp_path, [built], Console(quiet=True)) == 0


def test_gpu_check_stops_tests_so_that_they_say_what_failed(tmp_path):
    """Their report comes last, and pytest-xdist waits for its processes before it."""
    (tmp_path / "test_it.py").write_text(
        "import time\n"
        "def test_wrong(): assert 1 == 2, 'the reason'\n"
        "def test_slow(): time.sleep(600)\n"
        "def test_slower(): time.sleep(600)\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "2",
        "-p",
        "no:cacheprovider",
        str(tmp_path / "test_it.py"),
    ]
    for seconds in (15, 60, 240):  # on a busy machine pytest's processes alone take longer to start
        out = tmp_path / str(seconds)
        assert gpu_check.check(out, [gpu_check.Step("test", seconds, command)], Console(quiet=True)) == 1
        (log,) = out.glob("*/gpu-check.log")
        assert "test: stopped after its" in log.read_text()
        if "AssertionError: the reason" in log.read_text():
            return
    raise AssertionError(log.read_text())


def test_gpu_check_goes_on_where_it_ended(tmp_path, monkeypatch):
    """A second call takes what never ran, then what was stopped or killed the machine, then what failed."""
    ran = []
    ends = {"a": "done", "b": "failed", "c": "stopped", "d": "done", "e": "done"}
    benchmark = [sys.executable, "-m", "bench", "decode", "--results", str(tmp_path)]
    steps = [step(part, 100, part) for part in "abcd"] + [gpu_check.Step("e", 100, benchmark)]

    def run_step(step, limit, log, console):
        ran.append((step.part, round(step.seconds), step.command[-1] == "--resume"))
        if step.part == "d" and len(ran) < 6:
            raise KeyboardInterrupt
        return ends[step.part]

    monkeypatch.setattr(gpu_check, "run_step", run_step)
    monkeypatch.setattr(gpu_check, "commit", lambda: "one")

    def call():
        ran.clear()
        gpu_check.check(tmp_path, steps, Console(quiet=True), goes_on=True)
        return [part for part, _, _ in ran]

    assert call() == ["a", "b", "c", "d"]
    monkeypatch.setitem(ends, "b", "done")
    assert call() == ["e", "c", "d"]  # and d interrupts again
    assert ran[0] == ("e", 125, True)  # four steps share the time of five, and a benchmark goes on
    monkeypatch.setitem(ends, "c", "done")
    monkeypatch.setattr(
        gpu_check, "run_step", lambda step, *_: ran.append((step.part, 0, 0)) or ends[step.part]
    )
    assert call() == ["c", "d", "b"]
    assert call() == []
    monkeypatch.setattr(gpu_check, "commit", lambda: "two")
    assert call() == list("abcde")
    (tmp_path / "no-chip" / "gpu-check.json").write_text("{half")
    assert call() == list("abcde")


def test_gpu_check_gives_back_few_files(tmp_path):
    """The ledgers, its log, and the page with the pictures in one: some machines give back eight."""
    for suite in ("attention", "decode", "memory", "train", "generate"):
        book = Ledger(tmp_path / "a-gpu" / f"{suite}.jsonl", {**FACTS, "device": "cuda"})
        memory = {"peak MB beyond inputs": 1.0, "outputs and gradients MB": 1.0}
        book.add(row("zinit triton", suite=suite, figures=memory if suite == "memory" else {"tokens/s": 1.0}))
    gpu_check.check(tmp_path, [step("attention", 20, "")], Console(quiet=True))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) <= 8 and max(len(path.relative_to(tmp_path).parts) for path in files) <= 3
    with zipfile.ZipFile(tmp_path / "docs.zip") as archive:
        assert {"docs/benchmarks.md", "docs/figures/a-gpu-attention.png"} <= set(archive.namelist())


def test_gpu_check_trains_first_what_its_targets_are_stated_for():
    """Its part may be stopped before the bases after that."""
    job = train.train_jobs(runner.Options(torch.device("cuda"), (torch.bfloat16,)))[0]
    assert "Llama-3.2-3B" in job.title


def test_gpu_check_takes_less_than_nine_minutes():
    steps = gpu_check.steps(Path("results"))
    assert sum(step.seconds for step in steps) + gpu_check.GRACE <= 525  # the page takes a while too
    parts = {*(step.part for step in steps), "tune"}
    assert parts == {
        "build",
        "proof",
        "test",
        "sanitize",
        "attention",
        "decode",
        "memory",
        "train",
        "generate",
        "tune",
    }
    for part in parts:
        alone = gpu_check.chosen(part, Path("results"))
        assert {step.part for step in alone} == {part}
        assert sum(step.seconds for step in alone) == pytest.approx(gpu_check.SECONDS_OF_ONE_PART)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("part", [None, "build", "sanitize", "attention", "tune"])
def test_gpu_check_says_what_it_needs(part, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", *(["--part", part] if part else [])])
    assert gpu_check.main() == 2
    assert "needs an NVIDIA GPU that torch can use" in capsys.readouterr().out
