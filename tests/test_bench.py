"""The benchmarks: no figure for a wrong kernel, a ledger that cannot be bent, pages that are what the ledgers say."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import chapters, compare, conditions, contenders, gpu_check, peers, report, runner
from bench.__main__ import main
from bench.cpu_goals import CPU_GOALS
from bench.goals import Goal, judged, ratio, rows_of
from bench.ledger import Ledger, LedgerError, Row, read
from bench.problem import make_problem
from bench.providers import TWICE, Provider, prefill_providers, twice
from bench.shapes import BARS_DECODE, BARS_PREFILL, Shape, prefill
from bench.suites import SUITES, attention, dropins, generate, train, verify
from bench.suites.attention import NO_PROMPTS
from bench.suites.decode import PROBE

CPU = torch.device("cpu")
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


@pytest.fixture
def ledger(tmp_path):
    """Two runs of two rows each."""
    path = tmp_path / "results" / "a-chip" / "attention.jsonl"
    for i in range(2):
        book = Ledger(path, {**FACTS, "time": f"2026-01-0{i + 1}T03:04:05Z"})
        book.add(row(p50=1.0 + i, ratios={"plain SDPA": 0.5 + i}))
        book.add(row("plain SDPA", p50=2.0, ratios={"zinit cpu": 2.0}))
    return path


def test_a_ledger_is_read_as_it_was_written(ledger):
    first, second = read(ledger)
    assert first.conditions["time"].startswith("2026-01-01") and len(first.rows) == 2
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
    measured = chapters.newest(read(ledger))
    assert [m.row.p50_ms for m in measured] == [2.0, 2.0] and measured[0].run.conditions[
        "time"
    ] == "2026-01-02T03:04:05Z"


def test_the_page_and_the_readme_are_what_the_ledger_says(ledger, tmp_path):
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    bars = Ledger(ledger.with_name("bars.jsonl"), FACTS)
    bars.add(row(suite="bars", ratios={"plain SDPA": 1.5}))
    report.write(ledger.parent.parent, tmp_path)
    page, readme = ((tmp_path / name).read_text() for name in ("docs/benchmarks.md", "README.md"))
    assert (
        "| LLaMA-7B, B 1, T 128 | 2 | 2 - 2 | 1 | 2.00x |" in page
        and "commit abc, torch 2, 2026-01-02, load" in page
    )
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "| forward, 128 to 512 tokens / plain SDPA, which has no prompts | 1.50 |" in readme
    assert "`bars.jsonl` in `bench/results/a-chip/`" in readme
    for picture in page.split("figures/")[1:]:
        assert (tmp_path / "docs" / "figures" / picture.partition(")")[0]).stat().st_size > 1000


def test_the_readme_names_the_fastest_other_and_the_worst_shape(tmp_path):
    """Over all shapes, not those of the goals alone; what has no prompts is no such other."""
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    folder = tmp_path / "results" / "a-chip"
    bars, book = (Ledger(folder / f"{name}.jsonl", FACTS) for name in ("bars", "attention"))
    bars.add(row(suite="bars", ratios={"plain SDPA": 0.5}))
    for shape, official, two in (("first", 1.25, 2.0), ("second", 4.0, 1.6)):
        book.add(row(shape=shape, ratios={"plain SDPA": 1 / official}))
        book.add(row("plain SDPA", shape=shape, ratios={"zinit cpu": 0.1}))
        book.add(row("official formula", shape=shape, ratios={"zinit cpu": official}))
        book.add(row(TWICE, shape=shape, ratios={"zinit cpu": two}))
    report.write(tmp_path / "results", tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert "| forward, every shape / the fastest other that has prompts | 0.62 to 0.80 |" in readme
    assert "- 0.80 / plain SDPA (first, forward, float32)" in readme
    assert "| forward, 128 to 512 tokens / plain SDPA, which has no prompts | 0.50 |" in readme


@pytest.mark.parametrize(
    "name, processor",
    [
        ("AMD EPYC", "AMD EPYC family 26 model 2"),
        ("AMD EPYC 7R13 Processor", "AMD EPYC 7R13 Processor"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "Intel(R) Xeon(R) CPU family 26 model 2"),  # a clock is no name
    ],
)
def test_chips_of_one_name_are_told_apart(tmp_path, name, processor):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(2 * f"cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: {name}\nstepping\t: 1\n\n")
    assert conditions.processor(cpuinfo) == processor


def test_the_readme_shows_the_newest_whole_chip_and_the_losses_of_the_others(tmp_path, capsys):
    """A few newer rows of a third chip hide neither. The runs of two chips are never one another's second."""
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    results = tmp_path / "results"

    def measured(chip, day, *suites, ratio):
        for suite in suites:
            facts = {**FACTS, "chip": chip, "time": f"2026-01-0{day}T03:04:05Z"}
            book = Ledger(results / conditions.folder_name(chip) / f"{suite}.jsonl", facts)
            book.add(row(suite=suite, ratios={"plain SDPA": ratio}))

    measured("Zen 4", 1, "attention", "bars", ratio=1.25)
    measured("Zen 5", 2, "attention", "bars", ratio=0.5)
    measured("Zen 6", 3, "bars", ratio=0.25)
    report.write(results, tmp_path)
    readme, page = ((tmp_path / name).read_text() for name in ("README.md", "docs/benchmarks.md"))
    assert "| Zen 5 | float32 |" in readme and "/ plain SDPA, which has no prompts | 0.50 |" in readme
    assert (
        "- Zen 4 (`bench/results/zen-4/`, 2026-01-01): 0 of 1 goals met; 0 of 1 figures; at worst 1.25 / plain SDPA."
        in readme
    )
    assert "- Zen 6 (`bench/results/zen-6/`, 2026-01-03): 1 of 1 goals met" in readme
    assert all(f"## {chip}\n" in page for chip in ("Zen 4", "Zen 5", "Zen 6"))
    assert main(["agree", "--results", str(results)]) == 2
    measured("Zen 4", 4, "bars", ratio=1.25)
    assert main(["agree", "--results", str(results)]) == 0
    assert "zen-4/bars.jsonl" in capsys.readouterr().out


@pytest.fixture
def committed(tmp_path):
    """The ledgers of the index, not what this machine has measured since."""
    listed = subprocess.run(
        ["git", "ls-files", "bench/results"], cwd=report.ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    for name in filter(lambda name: name.endswith(".jsonl"), listed.stdout.split()):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            subprocess.run(["git", "show", f":{name}"], cwd=report.ROOT, capture_output=True).stdout
        )
    return tmp_path


def test_readme_and_page_are_what_the_committed_ledgers_say(committed):
    """Written anew: what differs was typed in, or the report was not run after the ledgers."""
    readme = (report.ROOT / "README.md").read_text()
    (committed / "README.md").write_text(readme)
    written = report.write(committed / "bench" / "results", committed)
    assert len(written) > 3, "no ledger is committed"
    assert (committed / "README.md").read_text() == readme, "python -m bench report"
    page = (report.ROOT / "docs" / "benchmarks.md").read_text()
    assert (committed / "docs" / "benchmarks.md").read_text() == page, "python -m bench report"
    for path in written[2:]:
        assert (report.ROOT / path.relative_to(committed)).exists(), path.name


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


def test_gpu_check_trains_first_what_its_goals_are_stated_for():
    """Its part may be stopped before the bases after that."""
    job = train.jobs(runner.Options(torch.device("cuda"), (torch.bfloat16,)))[0]
    assert "Llama-3.2-3B" in job.title


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


def test_two_runs_are_compared(ledger, capsys):
    results = str(ledger.parent.parent)
    assert main(["agree", "--results", results]) == 1  # 0.5 and 1.5 times plain SDPA's
    assert "200.0 %" in capsys.readouterr().out
    assert main(["agree", "--results", results, "--within", "2"]) == 0
    assert main(["agree", "decode", "--results", results]) == 2
    assert "was measured twice" in capsys.readouterr().out


def test_only_runs_of_one_commit_and_machine_are_compared(tmp_path, capsys):
    """Another commit may be faster. What is compared need not have this package's name in front."""
    path = tmp_path / "a-chip" / "dropins.jsonl"

    def measured(day, ratio, **facts):
        book = Ledger(path, {**FACTS, "time": f"2026-01-0{day}T03:04:05Z", **facts})
        book.add(row(dropins.ACCELERATED, suite="dropins", ratios={dropins.PEFT: ratio}))

    measured(1, 0.5)
    measured(2, 0.9, commit="another")
    measured(3, 0.3, versions={"torch": "3"})
    assert main(["agree", "--results", str(tmp_path)]) == 2
    measured(4, 0.6)
    assert main(["agree", "--results", str(tmp_path), "--within", "0.21"]) == 0
    assert "20.0 %" in capsys.readouterr().out
    measured(5, 0.1, commit="a third")
    assert main(["agree", "--results", str(tmp_path), "--within", "0.21"]) == 0


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


def step(part, seconds, code):
    return gpu_check.Step(part, seconds, [sys.executable, "-c", code])


def test_gpu_check_goes_on_and_keeps_what_is_done(tmp_path):
    """Steps that fail, are missing or take too long; the goals come whatever happened."""
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
        "def test_slow(): time.sleep(60)\n"
        "def test_slower(): time.sleep(60)\n"
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
    assert gpu_check.check(tmp_path, [gpu_check.Step("test", 8, command)], Console(quiet=True)) == 1
    (log,) = tmp_path.glob("*/gpu-check.log")
    assert "AssertionError: the reason" in log.read_text() and "test: stopped after its" in log.read_text()


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
        assert {"docs/benchmarks.md", "docs/figures/a-gpu-time.png"} <= set(archive.namelist())


def test_gpu_check_runs_whole_models_on_the_kernels():
    """They call backend="auto", which leaves the GPU's kernels alone unless it is told to try them."""
    for step in gpu_check.steps(Path("results")):
        assert (step.part in ("train", "generate")) == (step.environment.get("ZINIT_TRY_GPU") == "1")
    code = "from zinit_kernels import dispatch; print(dispatch.ORDER.get('cuda', dispatch.ORDER_ELSEWHERE))"
    for told, order in (("0", ("composed", "reference")), ("1", ("cuda", "triton", "composed", "reference"))):
        environment = {**os.environ, "ZINIT_TRY_GPU": told}
        said = subprocess.run(
            [sys.executable, "-c", code], cwd=report.ROOT, env=environment, capture_output=True
        )
        assert said.stdout.decode().strip() == str(order)


def test_a_copy_without_history_is_told_its_commit(monkeypatch):
    monkeypatch.setattr(conditions, "output", lambda command: "")
    assert conditions.commit() == "unknown"
    monkeypatch.setenv("ZINIT_COMMIT", "0123456789")
    monkeypatch.setenv("ZINIT_TRY_GPU", "1")
    facts = conditions.conditions(CPU)
    assert facts["commit"] == "0123456789" and facts["settings"] == {"ZINIT_TRY_GPU": "1"}


def test_gpu_check_takes_less_than_nine_minutes():
    steps = gpu_check.steps(Path("results"))
    assert sum(step.seconds for step in steps) + gpu_check.GRACE <= 525  # the page takes a while too
    parts = {*(step.part for step in steps), "tune"}
    assert parts == {
        "build",
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
        assert sum(step.seconds for step in alone) == pytest.approx(gpu_check.ALONE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("part", [None, "build", "sanitize", "attention", "tune"])
def test_gpu_check_says_what_it_needs(part, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", *(["--part", part] if part else [])])
    assert gpu_check.main() == 2
    assert "needs an NVIDIA GPU that torch can use" in capsys.readouterr().out
