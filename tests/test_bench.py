"""The benchmarks: no figure for a wrong kernel, a ledger that cannot be bent, pages that are what the ledgers say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import contenders, report, runner
from bench.__main__ import main
from bench.goals import Goal, judged, ratio, rows_of
from bench.ledger import Ledger, LedgerError, Row, read
from bench.problem import make_problem
from bench.providers import Provider, prefill_providers, twice
from bench.shapes import Shape, prefill
from bench.suites import attention, generate

CPU = torch.device("cpu")
FACTS = {
    "chip": "a chip", "instructions": "some", "time": "2026-01-02T03:04:05Z", "commit": "abc",
    "versions": {"torch": "2"}, "load": 0.1, "malloc": "default",
}  # fmt: skip


def row(provider="zinit cpu", p50=1.0, **changes):
    sizes = prefill("LLaMA-7B", 1, 128).sizes
    fields = {
        "suite": "attention", "shape": "LLaMA-7B, B 1, T 128", "sizes": sizes, "mode": "forward", "dtype": "float32",
        "provider": provider, "rounds": 3, "p20_ms": p50, "p50_ms": p50, "p80_ms": p50, "tflops": 1.0,
    }  # fmt: skip
    return Row(**{**fields, **changes})


@pytest.fixture
def ledger(tmp_path):
    """Two runs of two rows each."""
    path = tmp_path / "results" / "a-chip" / "attention.jsonl"
    for i in range(2):
        book = Ledger(path, {**FACTS, "time": f"2026-01-0{i + 1}"})
        book.add(row(p50=1.0 + i, ratios={"plain SDPA": 0.5 + i}))
        book.add(row("plain SDPA", p50=2.0, ratios={"zinit cpu": 2.0}))
    return path


def test_a_ledger_is_read_as_it_was_written(ledger):
    first, second = read(ledger)
    assert first.conditions["time"] == "2026-01-01" and len(first.rows) == 2
    assert second.rows[0] == row(p50=2.0, ratios={"plain SDPA": 1.5})


@pytest.mark.parametrize("line", range(5))
@pytest.mark.parametrize("damage", ["delete", "change", "swap"])
def test_a_damaged_ledger_is_refused(ledger, line, damage):
    lines = ledger.read_text().splitlines(keepends=True)
    if damage == "delete":
        del lines[line]
    elif damage == "change":
        lines[line] = lines[line].replace('"run":"', '"run":"x')
    else:
        lines[line], lines[line + 1] = lines[line + 1], lines[line]
    ledger.write_text("".join(lines))
    with pytest.raises(LedgerError, match=r"attention.jsonl.*line \d.*(changed, deleted or moved|not JSON)"):
        read(ledger)
    with pytest.raises(LedgerError):  # nor is anything appended to it
        Ledger(ledger, FACTS)


@pytest.mark.parametrize(
    "text, message", [("{", "middle of a line"), ("{\n", "line 1 is not JSON"), ("\xff", "middle")]
)
def test_what_is_no_ledger_is_refused(tmp_path, text, message):
    path = tmp_path / "attention.jsonl"
    path.write_text(text)
    with pytest.raises(LedgerError, match=message):
        read(path)


def test_the_program_says_so_in_a_sentence(ledger, capsys):
    ledger.write_text(ledger.read_text()[:-5])
    assert main(["report", "--results", str(ledger.parent.parent), "--root", str(ledger.parent)]) == 2
    assert "ends in the middle of a line" in capsys.readouterr().out


def test_the_newest_run_counts(ledger):
    measured = report.newest(read(ledger))
    assert [m.row.p50_ms for m in measured] == [2.0, 2.0] and measured[0].run.conditions[
        "time"
    ] == "2026-01-02"


def test_the_page_and_the_readme_are_what_the_ledger_says(ledger, tmp_path):
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(ledger.parent.parent, tmp_path)
    page, readme = ((tmp_path / name).read_text() for name in ("docs/benchmarks.md", "README.md"))
    assert (
        "| LLaMA-7B, B 1, T 128 | **2** | **2 (2.00x)** |" in page and "commit abc, torch 2, load 0.1" in page
    )
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "| forward, T = 128: time / plain SDPA | 1.50 - 1.50 |" in readme
    for picture in page.split("figures/")[1:]:
        assert (tmp_path / "docs" / "figures" / picture.partition(")")[0]).stat().st_size > 1000


def wrong(problem):
    """A kernel with twice the gate."""
    return twice(problem.with_tensors(*problem.tensors[:5], 2 * problem.tensors[5]))


def test_a_wrong_kernel_gets_no_figure(monkeypatch, tmp_path):
    providers = (Provider("honest", twice), Provider("zinit broken", wrong))
    monkeypatch.setattr(attention, "prefill_providers", lambda: providers)
    notes = []
    options = runner.Options(CPU, (torch.float32,), seconds=0.0, compiled=False)
    rows = list(
        attention.rows(options, prefill("CLIP-B/16 text", 1), torch.float32, "forward", False, notes.append)
    )
    assert {r.provider for r in rows} == {"honest", attention.PRODUCT}
    assert (
        len(notes) == 1 and "zinit broken" in notes[0] and "no figure, wrong result: out: error" in notes[0]
    )


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "provider", [p for p in prefill_providers() if p.name in ("zinit cpu", "official formula")]
)
def test_a_wrong_gradient_gets_no_figure(provider, backward):
    def half(problem):
        call = provider.prepare(problem)
        return lambda: call().detach() / 2 + call() / 2  # the value is right, its gradients are half

    problem = make_problem(prefill("CLIP-B/16 text", 1), torch.float32, CPU)
    reason = attention.why_wrong(Provider("half", half), problem, backward)
    assert ("dquery" in reason) == backward


def test_a_wrong_way_to_fine_tune_gets_no_figure():
    ours = contenders.CONTENDERS[0]

    def biased(base):
        parameters, loss = ours.build(base)
        return parameters, lambda tokens: 1.01 * loss(tokens)

    def detached(base):
        parameters, loss = ours.build(base)
        return parameters, lambda tokens: loss(tokens) + 0 * parameters[0].sum() - loss(tokens).detach()

    for build, reason in ((ours.build, ""), (biased, "wrong result: loss"), (detached, "wrong result: loss")):
        found = contenders.why_wrong(replace(ours, build=build), torch.float32, CPU)
        assert found.startswith(reason) and bool(found) == bool(reason)


def test_a_wrong_way_to_generate_gets_no_figure():
    ours = generate.GENERATORS[0]

    def stuck(base):
        run, scores = ours.build(base)
        return lambda prompts, new: run(prompts, 1).repeat(1, new), scores

    assert generate.why_wrong(ours, torch.float32, CPU) == ""
    assert generate.why_wrong(ours._replace(build=stuck), torch.float32, CPU).startswith(
        "wrong result: a token"
    )


def test_stopping_keeps_what_is_done(tmp_path):
    def stopped(note):
        yield row()
        raise KeyboardInterrupt

    options = runner.Options(CPU, (torch.float32,))
    rows = runner.run({"attention": [runner.Job("", stopped)]}, options, tmp_path, Console(quiet=True))
    (path,) = tmp_path.glob("*/attention.jsonl")
    assert rows == [row()] and [r.rows for r in read(path)] == [(row(),)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(7, 7), (3, 9), (1, 5)])
def test_pairs_are_counted_as_the_mask_leaves_them(causal, seqlen_q, seqlen_k):
    shape = Shape("", 1, 1, 1, 8, seqlen_q, seqlen_k, 10, causal)
    seen = torch.ones(seqlen_q, seqlen_k)
    seen = seen.tril(seqlen_k - seqlen_q) if causal else seen
    assert shape.pairs == seen.sum() + seqlen_q * 10
    assert shape.flops("forward") == 4 * 8 * shape.pairs


def test_every_suite_runs(capsys):
    """All of them on tiny shapes; nothing is kept."""
    before = sorted(Path(report.ROOT / "bench" / "results").rglob("*"))
    assert main(["all", "--smoke", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    for word in (
        "zinit cpu",
        "SDPA twice + add",
        "official formula",
        "peak MB",
        "zinit adapter",
        "first token ms",
    ):
        assert word in out, word
    assert sorted(Path(report.ROOT / "bench" / "results").rglob("*")) == before


def test_nothing_to_measure_is_said(capsys):
    assert main(["attention", "--smoke", "--shape", "no such model"]) == 1
    assert "nothing was measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    "what, operator", [("train", "zinit::backward_cpu"), ("generate", "zinit::decode_cpu")]
)
def test_the_profile_shows_our_operators(tmp_path, capsys, what, operator):
    assert main(["profile", what, "--smoke", "--device", "cpu", "--out", str(tmp_path)]) == 0
    names = {
        event.get("name") for event in json.loads((tmp_path / f"{what}.json").read_text())["traceEvents"]
    }
    out = capsys.readouterr().out
    assert operator in names and "aten::mm" in out and "GB/s at least" in out


def test_a_base_that_is_no_commit_is_said_in_a_sentence(capsys):
    assert main(["attention", "--base", "no-such-revision"]) == 2
    assert "could not check out no-such-revision" in capsys.readouterr().out


def test_a_goal_is_judged_by_the_worst_row():
    select = rows_of("zinit cpu", "attention", "forward", "T 128")
    rows = [row(dtype="bfloat16", ratios={"plain SDPA": r}) for r in (0.9, 1.2)]
    goal = Goal("", select, ratio("plain SDPA"), 1.0)
    assert judged(goal, rows) == (1.2, "missed by 20 %")
    assert judged(goal, rows[:1]) == (0.9, "met")
    assert judged(goal._replace(at_least=True), rows)[1] == "missed by 11 %"
    assert judged(goal, [row()]) == (None, "not measured")  # float32 is another goal's
