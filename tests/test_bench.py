"""The benchmarks: no figure for a wrong kernel, runs that stop and go on, goals judged by every row."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_rows import FACTS, row
from rich.console import Console

from bench import chapters, compare, contenders, peers, report, runner
from bench.__main__ import main
from bench.cpu_goals import CPU_GOALS
from bench.goals import Goal, judged, ratio, rows_of
from bench.ledger import read
from bench.problem import make_problem
from bench.providers import TWICE, Provider, prefill_providers, twice
from bench.shapes import BARS_DECODE, BARS_PREFILL, Shape, prefill
from bench.suites import SUITES, attention, dropins, generate, verify
from bench.suites.attention import NO_PROMPTS
from bench.suites.decode import PROBE

CPU = torch.device("cpu")


def wrong(problem):
    """A kernel with twice the gate."""
    return twice(problem.with_tensors(*problem.tensors[:5], 2 * problem.tensors[5]))


def test_a_wrong_kernel_gets_no_figure():
    providers = (Provider("honest", twice), Provider("zinit broken", wrong))
    notes = []
    options = runner.Options(CPU, (torch.float32,), seconds=0.0, compiled="none")
    rows = list(
        attention.rows(
            options,
            lambda: providers,
            prefill("CLIP-B/16 text", 1),
            torch.float32,
            "forward",
            False,
            torch.float32,
            notes.append,
        )  # fmt: skip
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


@pytest.mark.skipif(bool(contenders.why_missing("transformers", "peft")), reason="they are not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [peers.in_peft, partial(peers.in_lora, rank=2)])
def test_peers_train_in_the_dtype_they_are_measured_in(make, dtype):
    """Also half precision: two dtypes in one step would be another amount of work."""
    model = make(contenders.random_base(contenders.TINY, dtype, CPU))
    assert {p.dtype for p in contenders.trainable(model)} == {dtype}


@pytest.mark.skipif(bool(contenders.why_missing("transformers")), reason="it is not installed")
def test_transformers_rotates_by_the_base_of_the_model():
    base = contenders.random_base(replace(contenders.TINY, rope_theta=100.0), torch.float32, CPU)
    tokens = torch.arange(60)[None]
    torch.testing.assert_close(
        peers.in_transformers(base)(tokens).logits,
        base.logits(base.hidden_states(tokens)),
        atol=1e-4,
        rtol=1e-4,
    )


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
    rows, _ = runner.run({"attention": [runner.Job("", stopped)]}, options, tmp_path, Console(quiet=True))
    (path,) = tmp_path.glob("*/attention.jsonl")
    assert rows == [row()] and [r.rows for r in read(path)] == [(row(),)]


class NoRuntimeError(Exception):
    """As Triton's OutOfResources."""


def test_a_kernel_that_raises_leaves_the_others_their_figures():
    def too_large(problem):
        if problem.shape.name != "sibling":
            raise NoRuntimeError("out of resource: shared memory\nand more")
        return twice(problem)

    providers = (Provider("too large", too_large), Provider("honest", twice))
    notes = []
    options = runner.Options(CPU, (torch.float32,), seconds=0.0, compiled="none")
    shape = prefill("CLIP-B/16 text", 1)
    found = attention.rows(
        options, lambda: providers, shape, torch.float32, "forward", False, torch.float32, notes.append
    )
    assert {r.provider for r in found} == {"honest", attention.PRODUCT}
    assert notes == [
        f"too large, {shape.name}, forward: no figure, NoRuntimeError: out of resource: shared memory"
    ]


def test_a_job_that_raises_is_not_done_and_the_others_run(tmp_path):
    def killed(note):
        yield row()
        raise NoRuntimeError("a process was terminated abruptly")

    def fine(note):
        yield row(shape="another")

    jobs = [runner.Job("killed", killed), runner.Job("fine", fine)]
    options = runner.Options(CPU, (torch.float32,))
    rows, failed = runner.run({"attention": jobs}, options, tmp_path, Console(quiet=True))
    (path,) = tmp_path.glob("*/attention.jsonl")
    (run,) = read(path)
    assert len(rows) == len(run.rows) == 2 and run.jobs == ("fine",) and failed == ["killed"]


SLOW = """
import signal, sys, time
from bench import __main__ as program, runner
from bench.ledger import Row

def slow(note):
    print("begun", flush=True)
    time.sleep(60)

def quick(note):
    yield Row("attention", "a shape", {}, "forward", "float32", "zinit cpu")

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores it
program.SUITES["attention"] = lambda options: [runner.Job("quick", quick), runner.Job("slow", slow)]
sys.exit(program.main(["attention", "--results", sys.argv[1]]))
"""


def test_ctrl_c_keeps_what_is_done(tmp_path):
    """The real signal, sent to a process in the middle of its second job."""
    command = [sys.executable, "-c", SLOW, str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=report.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        if "begun" in line:
            process.send_signal(signal.SIGINT)
            break
    said = process.communicate(timeout=60)[0]
    (path,) = tmp_path.glob("*/attention.jsonl")
    (run,) = read(path)
    assert "stopped: the 1 rows measured so far are kept" in said and "Traceback" not in said
    assert len(run.rows) == 1 and run.jobs == ("quick",)


def test_a_stopped_run_is_resumed_where_it_was(tmp_path, monkeypatch):
    ran = []

    def job(title):
        def rows(note):
            ran.append(title)
            yield row(shape=title)
            if title == "second" and ran.count("second") == 1:
                raise KeyboardInterrupt

        return runner.Job(title, rows)

    suites = {"attention": [job("first"), job("second"), job("third")]}
    options = runner.Options(CPU, (torch.float32,), resume=True)
    console = Console(quiet=True)
    for _ in range(2):
        runner.run(suites, options, tmp_path, console)
    assert ran == ["first", "second", "second", "third"]
    monkeypatch.setattr("bench.conditions.commit", lambda: "another")
    runner.run(suites, options, tmp_path, console)
    assert ran[4:] == ["first", "second", "third"]


def test_some_providers_are_no_whole_run(tmp_path, monkeypatch):
    """They leave the job to --resume, and the page to the run with the others."""
    ran, times = [], iter("abcdefg")
    monkeypatch.setattr(runner, "conditions", lambda device: {**FACTS, "time": next(times)})

    def jobs(name):
        def rows(note):
            ran.append(name)
            yield row(p50=float(len(ran)))

        return {"attention": [runner.Job("a job", rows)]}

    def measured(name, **changes):
        options = runner.Options(CPU, (torch.float32,), **changes)
        runner.run(jobs(name), options, tmp_path, Console(quiet=True))
        (path,) = tmp_path.glob("*/attention.jsonl")
        return [m.row.p50_ms for m in chapters.newest(read(path))]

    assert measured("some", only_providers=("zinit",)) == [1.0]  # better than none
    assert measured("others", only_providers=("SDPA",), resume=True) == [2.0]
    assert measured("few", resume=True) == [3.0]
    assert measured("some", only_providers=("zinit",)) == [3.0]
    assert measured("all compiled", compiled="all", resume=True) == [5.0]
    assert measured("done", only_providers=("zinit",), resume=True) == [5.0]
    assert measured("done", compiled="none", resume=True) == [5.0]
    assert ran == ["some", "others", "few", "some", "all compiled"]


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


def test_commits_are_compared_setting_by_setting(monkeypatch):
    """A replay of a CUDA graph is no eager call, and a cold cache is no warm one."""
    settings = [row(), row(launch="graph"), row(cache="cold"), row(suite="bars")]

    def measured(tree, arguments, results):
        factor = 2.0 if tree == report.ROOT else 1.0
        return [replace(r, p50_ms=factor * (i + 1)) for i, r in enumerate(settings)]

    monkeypatch.setattr(compare, "checkout", lambda revision, folder: None)
    monkeypatch.setattr(compare, "measured", measured)
    table = compare.compare("old", [], Console(quiet=True))
    where, _, base, here, share = (list(column.cells) for column in table.columns)
    assert base == ["1", "2", "3", "4"] and here == ["2", "4", "6", "8"] and set(share) == {"2.00x"}
    assert "graph" in where[1] and where[2].endswith("cold") and where[3].startswith("bars, ")
    assert len(set(where)) == 4


def test_a_goal_is_judged_by_every_row():
    select = rows_of("zinit cpu", "attention", "forward", "T 128")
    rows = [row(dtype="bfloat16", ratios={"plain SDPA": r}) for r in (0.9, 1.2)]
    goal = Goal("", select, ratio("plain SDPA"), 1.0)
    assert str(judged(goal, rows)) == "missed by 20 % at worst (LLaMA-7B, B 1, T 128); 1 of 2 met"
    assert str(judged(goal, rows[1:])) == "missed by 20 %"
    assert str(judged(goal, rows[:1])) == "met"
    assert str(judged(goal._replace(at_least=True), rows[:1])) == "missed by 11 %"
    assert str(judged(goal, [row()])) == "not measured"  # float32 is another goal's


def test_every_goal_of_a_cpu_has_its_rows():
    """The suites' settings, filled with figures, leave no goal unmeasured."""
    options = runner.Options(CPU, (torch.float32, torch.bfloat16))
    titles = [job.title for suite in ("bars", "dropins", "verify") for job in SUITES[suite](options)]
    for mode, shapes in (
        ("forward", BARS_PREFILL),
        ("forward+backward", BARS_PREFILL),
        ("decode", BARS_DECODE),
    ):
        for dtype in ("float32", "bfloat16"):
            assert {s.name for s in shapes} == {s.name for s in shapes if f"bars, {mode}, {dtype}, {s.name}" in
                                                "\n".join(titles)}  # fmt: skip
    rows = [
        row(suite="bars", shape=shape.name, dtype=dtype, mode=mode, figures={attention.PRODUCT_SHARE: 1.0},
            ratios=dict.fromkeys(("plain SDPA", TWICE, NO_PROMPTS, PROBE["cpu"]), 1.0))
        for dtype in ("float32", "bfloat16")
        for shapes, modes in ((BARS_PREFILL, ("forward", "forward+backward")), (BARS_DECODE, ("decode",)))
        for shape in shapes
        for mode in modes
    ]  # fmt: skip
    rows += [
        row(dropins.ACCELERATED, suite="dropins", mode=mode, ratios={dropins.PEFT: 1.0, dropins.BASE: 1.0})
        for mode in dropins.WIDTH
    ]
    rows.append(row("plain SDPA", suite="verify", ratios={verify.THEIRS: 1.0}))
    verdicts = [judged(goal, rows) for goal in CPU_GOALS]
    assert [len(verdict.figures) for verdict in verdicts] == [6, 6, 3, 3] + 6 * [3] + 2 * [6] + 4 * [3] + 4 * [1] + [
        3, 3, 6, 6, 4, 4, 1, 1, 1, 1, 1]  # fmt: skip


def test_every_training_step_of_the_dropins_goes_down_to_the_embeddings():
    """One that stops above the lowest layer's attention has less to do."""
    pytest.importorskip("peft")
    for name, model in dropins.models(64, heads_kv=2).items():
        inputs = []
        model.register_forward_pre_hook(
            lambda _, args, known, inputs=inputs: inputs.append(known["inputs_embeds"]), with_kwargs=True
        )
        dropins.training_step(model, 16)()
        assert inputs[0].grad is not None and inputs[0].grad.any(), name
