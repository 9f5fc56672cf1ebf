"""The suites: every one runs, and what each of them measures."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import ledger, methods, runner
from bench.__main__ import RESULTS, main
from bench.machine import ROOT
from bench.products import products_of
from bench.providers import TWICE
from bench.suites import serve, seven_billion, train

CPU = torch.device("cpu")
QUICK = runner.Options(CPU, (torch.float32,), seconds=0.0, compiled="none")


def test_every_suite_runs(capsys):
    """All of them on tiny shapes; nothing is kept."""
    before = sorted(RESULTS.rglob("*"))
    assert main(["all", "--smoke", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    for word in ("zinit cpu", TWICE, "official formula", "peak MB", "zinit adapter", "first token ms"):
        assert word in out, word
    for name, suite in runner.suites().items():
        assert (f": {name}, " in out) == suite.in_all, name
    assert sorted(RESULTS.rglob("*")) == before


def test_the_products_of_a_training_step_are_those_it_cannot_do_without():
    """Every weight once forward; backward those above the lowest adapted layer's attention; the loss twice."""
    config, tokens = methods.TINY, 2 * 32
    base = methods.random_base(config, torch.float32, CPU)
    _, step = train.training_step(methods.METHODS[0], base, train.SMOKE)
    run = products_of(step, base)
    with FlopCounterMode(display=False) as counter:
        run()
    heads = config.num_heads_q * config.head_dim
    attention = config.hidden_size * (heads + 2 * config.num_heads_kv * config.head_dim)
    others = config.hidden_size * (heads + 3 * config.intermediate_size)
    adapted = config.num_layers - methods.unadapted_layers(config)
    weights = config.num_layers * (attention + others) + (adapted - 1) * (attention + others) + others
    loss = 2 * (tokens - 2) * config.vocab_size * config.hidden_size
    assert counter.get_total_flops() == 2 * (tokens * weights + loss)


def test_a_training_step_stands_beside_its_products_alone():
    (job,) = train.train_jobs(replace(QUICK, smoke=True, only_providers=(methods.ADAPTER,)))
    products, ours = job.run(print)
    assert (products.provider, ours.provider) == (train.PRODUCTS, methods.ADAPTER)
    assert ours.ratios[train.PRODUCTS] > 1 > products.ratios[methods.ADAPTER]
    assert {target.bound for target in train.CPU_TARGETS if "products" in target.what} == {1.05, 1.08}


def test_every_file_of_the_folder_is_a_suite_and_two_must_be_named():
    files = {path.stem for path in (ROOT / "bench" / "suites").glob("*.py")}
    found = runner.suites()
    assert files <= {suite.jobs.__module__.rpartition(".")[2] for suite in found.values()}
    assert [name for name, suite in found.items() if not suite.in_all] == ["serve", "seven_billion"]
    for suite in found.values():
        assert all(job.title.startswith(f"{suite.name}, ") for job in suite.jobs(replace(QUICK, smoke=True)))


def test_serving_gives_ratios_latencies_and_the_share_of_equal_answers():
    rows = [row for job in serve.jobs(replace(QUICK, smoke=True)) for row in job.run(print)]
    assert [row.mode for row in rows] == [serve.ALONE] * 2 + [serve.BATCH] * 2 + [serve.STEP] * 2 + [
        serve.CLIENTS
    ]
    assert all(row.ratios for row in rows[:-1])
    figures = rows[-1].figures
    assert figures["equal answers"] == 1 and figures["answers"] >= serve.NUM_CLIENTS
    assert 0 < figures["first token p50 ms"] <= figures["first token p99 ms"]


def test_seven_billion_gives_seconds_and_memory_of_each_phase_and_leaves_no_file(tmp_path):
    options = replace(QUICK, smoke=True, scratch=tmp_path)
    whole, packed = seven_billion.jobs(options)
    rows = [*whole.run(print), *packed.run(print)]
    assert [r.mode.partition(",")[0] for r in rows] == ["load", "training step", "generate"] * 2
    assert all(0.05 < r.figures["peak resident GB"] < 4 and r.figures["seconds"] > 0 for r in rows)
    assert not list(tmp_path.iterdir())


def test_seven_billion_asks_for_space_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 10**9}))
    job, *_ = seven_billion.jobs(replace(QUICK, scratch=tmp_path))
    with pytest.raises(
        ledger.BenchError, match=r"takes 13.5 GB and .* has 1.0 GB free: name another .*--scratch"
    ):
        list(job.run(print))
    assert not list(tmp_path.iterdir())
