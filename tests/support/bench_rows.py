"""What the benchmarks' own tests are made of: a row, a run's conditions, a ledger, the committed ledgers."""

import subprocess

import pytest

from bench.ledger import Ledger, Row
from bench.machine import ROOT
from bench.problem import prefill

FACTS = {
    "chip": "a chip", "device": "cpu", "instructions": "some", "time": "2026-01-02T03:04:05Z", "commit": "abc",
    "versions": {"torch": "2"}, "load": 0.1, "malloc": "default",
}  # fmt: skip


def row(provider="zinit cpu", p50=1.0, **changes):
    sizes = prefill("LLaMA-7B", 1, 128).sizes
    fields = {
        "suite": "attention", "shape": "LLaMA-7B, B 1, T 128", "sizes": sizes, "mode": "forward", "dtype": "float32",
        "provider": provider, "rounds": 3, "p20_ms": p50, "p50_ms": p50, "p80_ms": p50, "tflops": 1.0,
    }  # fmt: skip
    return Row(**{**fields, **changes})


def two_runs(folder):
    """A ledger of two runs of two rows each."""
    path = folder / "results" / "a-chip" / "attention.jsonl"
    for i in range(2):
        book = Ledger(path, {**FACTS, "time": f"2026-01-0{i + 1}T03:04:05Z"})
        book.add(row(p50=1.0 + i, ratios={"plain SDPA": 0.5 + i}))
        book.add(row("plain SDPA", p50=2.0, ratios={"zinit cpu": 2.0}))
    return path


def committed_ledgers():
    """The ledgers in git's index: not what this machine has measured since."""
    listed = subprocess.run(
        ["git", "ls-files", "bench/results"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in listed.stdout.split() if name.endswith(".jsonl")]
