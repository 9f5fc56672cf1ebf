"""Two runs of one commit, and two commits, are compared setting by setting."""

import subprocess
from dataclasses import replace

import pytest
from bench_rows import FACTS, row, two_runs
from rich.console import Console

from bench.__main__ import main, measure_parser
from bench.ledger import BenchError, Ledger
from bench.machine import ROOT
from bench.methods import ACCELERATED, PEFT
from bench.suites import compare


@pytest.fixture
def ledger(tmp_path):
    return two_runs(tmp_path)


def test_two_runs_are_compared(ledger, capsys):
    results = str(ledger.parent.parent)
    assert main(["agree", "--results", results]) == 1  # 2 times and 0.67 times as fast as plain SDPA
    out = capsys.readouterr().out
    assert "200.0 %" in out and "zinit cpu over plain SDPA, 2x and 0.667x" in " ".join(out.split())
    assert main(["agree", "--results", results, "--within", "2"]) == 0
    assert main(["agree", "decode", "--results", results]) == 2
    assert "was measured twice" in capsys.readouterr().err


def test_only_runs_of_one_commit_and_machine_are_compared(tmp_path, capsys):
    """Another commit may be faster. What is compared need not have this package's name in front."""
    path = tmp_path / "a-chip" / "dropins.jsonl"

    def measured(day, ratio, **facts):
        book = Ledger(path, {**FACTS, "time": f"2026-01-0{day}T03:04:05Z", **facts})
        book.add(row(ACCELERATED, suite="dropins", ratios={PEFT: ratio}))

    measured(1, 0.5)
    measured(2, 0.9, commit="another")
    measured(3, 0.3, versions={"torch": "3"})
    assert main(["agree", "--results", str(tmp_path)]) == 2
    measured(4, 0.6)
    assert main(["agree", "--results", str(tmp_path), "--within", "0.21"]) == 0
    assert "20.0 %" in capsys.readouterr().out
    measured(5, 0.1, commit="a third")
    assert main(["agree", "--results", str(tmp_path), "--within", "0.21"]) == 0


def test_a_base_that_is_no_commit_is_said_in_a_sentence(capsys):
    def worktrees():
        return subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True).stdout

    before = worktrees()
    assert main(["attention", "--base=no-such-revision"]) == 2
    assert "error: could not check out no-such-revision" in capsys.readouterr().err
    assert worktrees().count("\n") == before.count("\n")


def compared(monkeypatch, base, here, turns=3):
    """What is found where `base` and `here` give the ms of each row in a turn."""
    taken = {"base": [], "here": []}

    def measured(tree, command, results):
        label = "here" if tree == ROOT else "base"
        taken[label].append(command)
        return (here if label == "here" else base)(len(taken[label]) - 1)

    monkeypatch.setattr(compare, "check_out", lambda revision, folder: None)
    monkeypatch.setattr(compare, "measured", measured)
    table, slower = compare.compare_commits("old", ["bars"], turns, Console(quiet=True))
    assert len(taken["base"]) == len(taken["here"]) == turns
    return [list(column.cells) for column in table.columns], slower


def test_commits_are_compared_setting_by_setting(monkeypatch):
    """A replay of a CUDA graph is not an eager call, a cold cache not a warm one. Above 1 this tree is faster."""
    settings = [
        row(),
        row(launch="graph"),
        row(cache="cold"),
        row(suite="targets"),
        row(ACCELERATED, suite="dropins"),
    ]

    def rows(factor):
        return lambda turn: [replace(r, p50_ms=factor * (i + 1)) for i, r in enumerate(settings)]

    (where, _, base, here, speed, turns), slower = compared(monkeypatch, rows(2.0), rows(1.0))
    assert base == ["2", "4", "6", "8", "10"] and here == ["1", "2", "3", "4", "5"]
    assert set(speed) == {"2.00x"} and set(turns) == {"2.00 to 2.00"} and not slower
    assert "graph" in where[1] and where[2].endswith("cold") and where[3].startswith("targets, ")
    assert len(set(where)) == 5


def test_only_what_is_slower_in_every_turn_is_slower(monkeypatch):
    def base(turn):
        return [row(p50=1.0), row(shape="noisy", p50=1.0), row(shape="gone", p50=1.0)]

    def here(turn):
        return [row(p50=1.1), row(shape="noisy", p50=(1.5, 1.4, 1.0)[turn]), row(shape="new", p50=9.0)]

    (where, *_), slower = compared(monkeypatch, base, here)
    setting = "attention, LLaMA-7B, B 1, T 128, forward, float32, eager, warm, zinit cpu"
    assert len(where) == 2 and slower == [f"{setting}: 0.91x"]


def test_the_command_reaches_both_trees_without_what_is_for_the_comparison(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        "bench.__main__.compare_commits",
        lambda base, command, turns, console: (
            seen.append((base, command, turns)) or compare.speed_table({}, base, 1)
        ),
    )
    assert main(["bars", "--turns", "5", "--base=HEAD~3", "--seconds", "0.1", "--only", "bars, decode"]) == 2
    assert seen == [("HEAD~3", ["bars", "--seconds", "0.1", "--only", "bars, decode"], 5)]
    assert "nothing was measured" in capsys.readouterr().err


def test_a_tree_gets_the_names_it_knows(tmp_path):
    """The suite "targets" was called "bars"; this tree takes both."""
    command = ["targets", "verify", "--only", "targets, decode", "--shape", "targets of mine"]
    assert compare.spelled_for(ROOT, command) == command
    assert compare.spelled_for(tmp_path, command) == [
        "bars",
        "verify",
        "--only",
        "bars, decode",
        *command[4:],
    ]


def test_the_old_names_of_commands_are_taken(tmp_path, capsys):
    path = tmp_path / "a-chip" / "bars.jsonl"
    Ledger(path, FACTS).add(row(suite="bars", ratios={"plain SDPA": 0.5}))
    assert main(["goals", "--results", str(tmp_path)]) == 0
    assert "1 of 1 targets met (1 of 1 figures)" in capsys.readouterr().out
    arguments = measure_parser().parse_args(["bars", "dropins", "--only", "bars, forward"])
    assert arguments.suites == ["targets", "dropins"] and arguments.only == ["targets, forward"]


@pytest.mark.parametrize(
    "said, sentence",
    [
        (
            "zinit cpu left out: _C_cpu.so was built from\nolder sources",
            "left out: _C_cpu.so was built from older",
        ),
        ("0 of 0", "no shape, provider or job fits"),
    ],
)
def test_a_tree_that_measures_nothing_says_why(tmp_path, monkeypatch, said, sentence):
    """Kernels of older sources left this package out, and the comparison said that no shape had such a name."""
    monkeypatch.setattr(compare, "run", lambda *arguments: said)
    with pytest.raises(BenchError, match=f"measured nothing of this package: .*{sentence}"):
        compare.measured(ROOT, ["targets"], tmp_path)
