"""The benchmarks measure: no figure for a wrong kernel, runs that stop and go on, targets judged by every row."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from bench_rows import FACTS, row
from rich.console import Console

from bench import ledger, machine, methods, runner
from bench.__main__ import main
from bench.correctness import why_wrong
from bench.ledger import read
from bench.machine import ROOT
from bench.problem import PREFILL, Provider, make_problem, prefill
from bench.providers import PLAIN, TWICE, prefill_providers, twice
from bench.runner import Target, judged, rows_of, speed_over
from bench.suites import attention, compare, generate, serve, targets, train, vision
from zinit_kernels.console import InputError

CPU = torch.device("cpu")
QUICK = runner.Options(CPU, (torch.float32,), seconds=0.0, compiled="none")


def forward_rows(providers, notes):
    shape = prefill("CLIP-B/16 text", 1)
    arguments = (QUICK, lambda: providers, shape, torch.float32, "forward", False, torch.float32)
    return list(attention.prefill_rows(*arguments, notes.append))


def wrong(problem):
    """A kernel with twice the gate."""
    return twice(problem.with_tensors(*problem.tensors[:5], 2 * problem.tensors[5]))


def test_a_wrong_kernel_gets_no_figure():
    notes = []
    rows = forward_rows((Provider("honest", twice), Provider("zinit broken", wrong)), notes)
    assert {r.provider for r in rows} == {"honest", attention.PRODUCT, attention.PEAK}
    assert len(notes) == 1
    assert "zinit broken" in notes[0] and "no figure, wrong result: out: error" in notes[0]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "provider", [p for p in prefill_providers() if p.name in ("zinit cpu", "official formula")]
)
def test_a_wrong_gradient_gets_no_figure(provider, backward):
    def half(problem):
        call = provider.prepare(problem)
        return lambda: call().detach() / 2 + call() / 2  # the value is right, its gradients are half

    problem = make_problem(prefill("CLIP-B/16 text", 1), torch.float32, CPU)
    assert ("dquery" in why_wrong(Provider("half", half), problem, backward)) == backward


def test_a_wrong_way_to_fine_tune_gets_no_figure():
    ours = methods.METHODS[0]

    def biased(base):
        parameters, loss = ours.build(base)
        return parameters, lambda tokens: 1.01 * loss(tokens)

    def detached(base):
        parameters, loss = ours.build(base)
        return parameters, lambda tokens: loss(tokens) + 0 * parameters[0].sum() - loss(tokens).detach()

    for build, reason in ((ours.build, ""), (biased, "wrong result: loss"), (detached, "wrong result: loss")):
        found = methods.why_wrong(replace(ours, build=build), torch.float32, CPU)
        assert found.startswith(reason) and bool(found) == bool(reason)


@pytest.mark.skipif(bool(machine.why_missing("transformers", "peft")), reason="they are not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [methods.in_peft, partial(methods.in_lora, rank=2)])
def test_methods_train_in_the_dtype_they_are_measured_in(make, dtype):
    """Also half precision: two dtypes in one step would be another amount of work."""
    model = make(methods.random_base(methods.TINY, dtype, CPU))
    assert {p.dtype for p in methods.trainable(model)} == {dtype}


@pytest.mark.skipif(bool(machine.why_missing("transformers")), reason="it is not installed")
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_has_the_weights_and_rotates_by_the_base_of_the_model(tied):
    config = replace(methods.TINY, rope_theta=100.0, tie_embeddings=tied)
    base = methods.random_base(config, torch.float32, CPU)
    tokens = torch.arange(60)[None]
    theirs, ours = methods.in_transformers(base)(tokens).logits, base.logits(base.hidden_states(tokens))
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_a_wrong_way_to_generate_gets_no_figure():
    ours = generate.GENERATORS[0]

    def stuck(base):
        run, scores = ours.build(base)
        return lambda prompts, new: run(prompts, 1).repeat(1, new), scores

    assert generate.why_wrong(ours, torch.float32, CPU) == ""
    found = generate.why_wrong(ours._replace(build=stuck), torch.float32, CPU)
    assert found.startswith("wrong result: a token")


def test_stopping_keeps_what_is_done(tmp_path):
    def stopped(note):
        yield row()
        raise KeyboardInterrupt

    rows, _ = runner.run({"attention": [runner.Job("", stopped)]}, QUICK, tmp_path, Console(quiet=True))
    (path,) = tmp_path.glob("*/attention.jsonl")
    assert rows == [row()] and [r.rows for r in read(path)] == [(row(),)]


class NoRuntimeError(Exception):
    """As Triton's OutOfResources."""


def test_a_kernel_that_raises_leaves_the_others_their_figures():
    def too_large(problem):
        if problem.shape.name != "sibling":
            raise NoRuntimeError("out of resource: shared memory\nand more")
        return twice(problem)

    notes = []
    rows = forward_rows((Provider("too large", too_large), Provider("honest", twice)), notes)
    assert {r.provider for r in rows} == {"honest", attention.PRODUCT, attention.PEAK}
    message = "forward: no figure, NoRuntimeError: out of resource: shared memory"
    assert notes == [f"too large, CLIP-B/16 text, B 1, T 77, {message}"]


@pytest.mark.parametrize(
    "error, said",
    [
        (NoRuntimeError, "stopped, NoRuntimeError: a process ended"),
        (ledger.BenchError, "left out, a process ended"),
    ],
)
def test_a_job_that_raises_is_not_done_and_the_others_run(tmp_path, error, said, capsys):
    def killed(note):
        yield row()
        raise error("a process ended")

    def fine(note):
        yield row(shape="another")

    jobs = [runner.Job("killed", killed), runner.Job("fine", fine)]
    rows, failed = runner.run({"attention": jobs}, QUICK, tmp_path, Console())
    assert f"killed: {said}\n" in capsys.readouterr().out
    (path,) = tmp_path.glob("*/attention.jsonl")
    (run,) = read(path)
    assert len(rows) == len(run.rows) == 2 and run.jobs == ("fine",) and failed == ["killed"]


SLOW = """
import signal, sys, time
from bench import __main__ as program
from bench.ledger import Row
from bench.runner import Job, Suite

def slow(note):
    print("begun", flush=True)
    time.sleep(60)

def quick(note):
    yield Row("attention", "a shape", {}, "forward", "float32", "zinit cpu")

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background may run with it ignored
suite = Suite("attention", "", lambda options: [Job("quick", quick), Job("slow", slow)])
program.suites = lambda: {"attention": suite}
sys.exit(program.main(["attention", "--results", sys.argv[1]]))
"""


def test_ctrl_c_keeps_what_is_done(tmp_path):
    """The real signal, sent to a process in the middle of its second job."""
    command = [sys.executable, "-c", SLOW, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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

    jobs = {"attention": [job("first"), job("second"), job("third")]}
    options, console = replace(QUICK, resume=True), Console(quiet=True)
    for _ in range(2):
        runner.run(jobs, options, tmp_path, console)
    assert ran == ["first", "second", "second", "third"]
    monkeypatch.setattr("bench.machine.commit", lambda: "another")
    runner.run(jobs, options, tmp_path, console)
    assert ran[4:] == ["first", "second", "third"]


def test_a_run_of_some_providers_is_not_complete(tmp_path, monkeypatch):
    """It leaves the job to --resume, and the page to a run of all providers."""
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
        return [m.row.p50_ms for m in ledger.newest(read(path))]

    assert measured("some", only_providers=("zinit",)) == [1.0]  # better than none
    assert measured("others", only_providers=("SDPA",), resume=True) == [2.0]
    assert measured("few", resume=True) == [3.0]
    assert measured("some", only_providers=("zinit",)) == [3.0]
    assert measured("all compiled", compiled="all", resume=True) == [5.0]
    assert measured("done", only_providers=("zinit",), resume=True) == [5.0]
    assert measured("done", compiled="none", resume=True) == [5.0]
    assert ran == ["some", "others", "few", "some", "all compiled"]


@pytest.mark.parametrize(
    "what, operator, in_table",
    [
        ("train", "zinit::backward_cpu", "aten::mm"),
        ("generate", "zinit::decode_kept_cpu", "zinit::decode_kept"),
    ],
)
def test_the_profile_shows_our_operators(tmp_path, capsys, what, operator, in_table):
    assert main(["profile", what, "--smoke", "--device", "cpu", "--out", str(tmp_path)]) == 0
    trace = json.loads((tmp_path / f"{what}.json").read_text())["traceEvents"]
    out = capsys.readouterr().out
    assert operator in {event.get("name") for event in trace}
    assert in_table in out and "GB/s at least" in out


def test_the_profiling_page_names_what_the_code_names():
    page = (ROOT / "docs" / "profiling.md").read_text()
    code = "\n".join(path.read_text() for path in (ROOT / "zinit_kernels").rglob("*.py"))
    assert (
        set(re.findall(r"`zinit\.([\w.]+)`", page)) == set(re.findall(r'named\("([\w.]+)"\)', code)) != set()
    )
    assert all(hasattr(torch.ops.zinit, name) for name in re.findall(r"`zinit::(\w+)`", page))
    (kernels,) = re.findall(r'--kernel-name regex:"([\w|]+)"', page)
    assert all(f"def {name}(" in code for name in kernels.split("|"))
    (shape,) = re.findall(r'--shape "(.+?)"', page)
    assert shape in [s.name for s in PREFILL["cuda"]]


@pytest.mark.parametrize(
    "command, message",
    [
        (["attention", "--device", "tpu"], "tpu is not a device: use cpu or cuda"),
        (["attention", "--device", "meta"], "meta is not supported: use cpu or cuda"),
        (["attention", "--device", "cuda:99"], "finds no GPU cuda:99"),
        (["attention", "--seconds", "0"], "0 is not above 0"),
        (["attention", "--threads", "-1"], "-1 is not above 0"),
        (["attention", "--threads", "two"], "invalid int value: 'two'"),
        (["no_such_suite"], "there is no suite no_such_suite: use attention, "),
        (["agree", "no_such_suite"], "there is no suite no_such_suite: use attention, "),
        (["attention", "--smoke", "--shape", "no such model"], "nothing was measured"),
        (["attention", "--smoke", "--base", "HEAD"], "--smoke keeps none"),
        (["attention", "--base", "HEAD", "--results", "out"], "no use for --results or --resume"),
        (["attention", "--base", "HEAD", "--resume"], "no use for --results or --resume"),
        (["seven_billion", "--scratch", "no/such/folder"], "no/such/folder is not a folder"),
        (["report", "--results", "no/such/folder"], "no/such/folder holds no ledger"),
        (["verdicts", "--results", "no/such/folder"], "no/such/folder holds no ledger"),
        (["profile", "memory"], "invalid choice: 'memory'"),
    ],
)
def test_a_fault_of_the_user_is_one_sentence(command, message, capsys):
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2 and message in captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize("command", [["attention", "--smoke"], ["profile", "train", "--smoke"]], ids="-".join)
def test_processes_that_would_slow_each_other_down_are_refused(monkeypatch, command):
    """torchrun started two, whose figures were both taken."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="was started as 2 processes .* and runs in one"):
        main(command)


def test_a_cpu_without_a_compiler_has_no_limit_and_the_rest_is_measured(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    machine.roofs.cache_clear()
    notes = []
    try:
        rows = forward_rows((Provider("honest", twice),), notes)
    finally:
        machine.roofs.cache_clear()
    assert {r.provider for r in rows} == {"honest", attention.PRODUCT}
    assert notes == ["the peak arithmetic is not measured: there is no C++ compiler (g++, or CXX)"]


def test_a_target_is_judged_by_every_row():
    select = rows_of("zinit cpu", "attention", "forward", "T 128")
    rows = [row(dtype="bfloat16", ratios={PLAIN: ratio}) for ratio in (0.5, 1.25)]
    target = Target("", select, speed_over(PLAIN), 1.0)
    assert str(judged(target, rows)) == "missed by 25 % at worst (LLaMA-7B, B 1, T 128); 1 of 2 met"
    assert str(judged(target, rows[1:])) == "missed by 25 %"
    assert str(judged(target, rows[:1])) == "met"
    assert str(judged(target._replace(at_most=True), rows[:1])) == "missed by 100 %"
    assert str(judged(target, [row()])) == "not measured"  # float32 has another target


def test_a_speed_up_is_above_1_where_the_row_is_faster():
    ours = row(ratios={PLAIN: 0.5, TWICE: 0.25})
    assert ours.speed_over(PLAIN) == 2 and ours.speed_over("not measured") is None
    assert speed_over(PLAIN, TWICE)(ours, [ours]) == 2  # over the faster of the two
    assert runner.speed_of("zinit cpu")(row(PLAIN, ratios={"zinit cpu": 2.0}), []) == 2


def test_every_target_of_a_cpu_has_its_rows():
    """The suites' settings, filled with figures, leave no target unmeasured."""
    options = runner.Options(CPU, (torch.float32, torch.bfloat16))
    whole, one = targets.STATED_PREFILL, targets.STATED_DECODE
    dtypes = ("float32", "bfloat16")
    titles = [job.title for job in runner.suites()["targets"].jobs(options)]
    for mode, shapes in (("forward", whole), ("forward+backward", whole), ("decode", one)):
        for shape in shapes:
            for dtype in dtypes:
                assert any(title.startswith(f"targets, {mode}, {dtype}, {shape.name}") for title in titles)
    others = (PLAIN, TWICE, attention.ITSELF, attention.READ)
    rows = [
        row(suite="targets", shape=shape.name, dtype=dtype, mode=mode, figures={attention.PRODUCT_SHARE: 1.0},
            ratios=dict.fromkeys(others, 1.0))
        for dtype in dtypes
        for shapes, modes in ((whole, ("forward", "forward+backward")), (one, ("decode",)))
        for shape in shapes
        for mode in modes
    ]  # fmt: skip
    rows += [
        row(methods.ACCELERATED, suite="dropins", mode=mode, shape="4 layers of 512, 8/8 heads",
            ratios={methods.PEFT: 1.0, train.FROZEN: 1.0})
        for mode in train.WIDTH
    ]  # fmt: skip
    rows += [
        row(method, suite="train", mode=train.STEP, shape="3 layers of Llama-3.2-1B", dtype=dtype,
            ratios={train.PRODUCTS: 1.0}, figures={train.SPEED: 1.0, train.PEAK_GB: 1.0})
        for method in (methods.ADAPTER, methods.LITGPT, methods.PEFT, train.LORA_8)
        for dtype in dtypes
    ]  # fmt: skip
    rows.append(row(PLAIN, suite="verify", ratios={compare.THEIRS: 1.0}))
    rows += [
        row(ours, suite="vision", mode=mode, shape="LLaMA", ratios={vision.TEXT: 1.0, vision.ONE: 1.0},
            figures={vision.PEAK_MB: 1.0, vision.PROMPTS_MB: 1.0})
        for ours in (vision.TEXT, vision.SEEING, vision.EACH)
        for mode in (vision.STEP, vision.PREFILL, vision.DECODE)
    ]  # fmt: skip
    rows += [
        row(ours, suite="serve", mode=mode, shape="SmolLM2-135M", dtype="float32", ratios={theirs: 1.0},
            figures={"equal answers": 1.0})
        for ours, mode, theirs in (
            (serve.ENGINE, serve.BATCH, serve.LOOP), (serve.ENGINE, serve.ALONE, serve.LOOP),
            (serve.MANY, serve.STEP, serve.ONE), (serve.ENGINE, serve.CLIENTS, serve.LOOP),
        )
    ]  # fmt: skip
    rows += [
        row(generator.name, suite="generate", shape=base.name, mode=mode, dtype=dtype, sizes={"batch": batch},
            figures={generate.SPEED: 1.0, generate.OF_BEST: 1.0} if batch else {generate.FIRST: 1.0})
        for base in generate.BASES["cpu"]
        for batch, mode in (*((b, f"B {b}") for b in base.batches), (0, generate.mode_of_prompt(base)))
        for dtype in dtypes
        for generator in generate.GENERATORS
    ]  # fmt: skip
    found = [len(judged(target, rows).figures) for target in targets.TARGETS]
    assert found == [6, 6, 3, 3] + 6 * [3] + 2 * [6] + 4 * [3] + 4 * [1] + [3, 3, 6, 6, 4, 4]
    assert all(judged(target, rows).figures for target in runner.targets_of("cpu"))


def test_every_training_step_of_the_dropins_goes_down_to_the_embeddings():
    """One that stops above the lowest layer's attention has less to do."""
    pytest.importorskip("peft")
    for name, model in train.dropin_models(64, heads_kv=2).items():
        inputs = []
        model.register_forward_pre_hook(
            lambda _, args, known, inputs=inputs: inputs.append(known["inputs_embeds"]), with_kwargs=True
        )
        train.dropin_step(model, 16)()
        assert inputs[0].grad is not None and inputs[0].grad.any(), name
