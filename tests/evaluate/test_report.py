"""docs/results.md from ledgers."""

import json

import pytest
from evaluate_program import run
from repository import ROOT

from evaluate import report
from model.errors import UserError

RUN = {"command": "ner", "base": "b1", "data": "d1", "steps": 9, "batch_size": 4}


def entry(method, seed, figure, kind="test", rate=0.1):
    figures = {"test F1": figure} if kind == "test" else {"F1": figure}
    return {
        "task": "", "kind": kind, "method": method, "learning_rate": rate, "seed": seed, "figures": figures,
        "numbers": 1000, "seconds": 2.0, "commit": "abc",
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "about.md").write_text("# Named entities\n\nOf a toy.\n")
    entries = [
        entry("head", 0, 10.0, "validation"), entry("head", 0, 12.0, "validation", 0.2),
        entry("head", 0, 10.0, rate=0.2), entry("head", 1, 14.0, rate=0.2), entry("zero-init", 0, 20.0, "validation"),
        entry("zero-init", 0, 16.0), entry("zero-init", 1, 18.0), entry("lora", 0, 1.0, "validation"),
        entry("lora", 0, 15.0), entry("lora", 1, 20.0), entry("late", 0, 1.0, "validation"),
        entry("late", 0, 9.0),
    ]  # fmt: skip
    lines = [{"run": RUN}, *entries]
    (tmp_path / "a" / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "about.md").write_text("# Answers\n\nOf a model.\n")
    table = {
        "title": "MME",
        "columns": ["", "total"],
        "rows": [["measured", 1.5], ["x | y (quoted)", None]],
        "notes": ["n"],
    }
    (tmp_path / "b" / "result.json").write_text(json.dumps({"run": {}, "tables": [table]}))
    return tmp_path


def test_a_page_says_what_the_ledgers_hold(results):
    text = report.page(results)
    assert "## Named entities\n\nOf a toy.\n" in text
    assert "| head | 1,000 | 2.00 | 0.2 | 12.00 | 12.00 | 10.00 | 14.00 |" in text
    assert "- `zero-init` against `head`, test F1: +5.00; the ranges of the seeds are apart." in text
    assert "- `zero-init` against `lora`, test F1: -0.50; the ranges of the seeds overlap." in text
    assert "late" not in text, "a method that was not tested with every seed has no row"
    assert "Commit abc, data d1, base b1 (fingerprints)." in text
    assert "**MME**\n\n|  | total |\n| --- | ---: |\n| measured | 1.50 |\n| x / y (quoted) |  |\n\nn" in text


def test_the_command_writes_it_and_says_what_is_missing(results, tmp_path, capsys):
    assert run("report", "--results", results, "--page", tmp_path / "page.md") == 0
    assert (tmp_path / "page.md").read_text() == report.page(results)
    (results / "b" / "result.json").unlink()
    assert run("report", "--results", results, "--page", tmp_path / "page.md") == 2
    assert "holds neither ledger.jsonl nor result.json" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no runs"):
        report.page(tmp_path / "none")


def test_the_page_of_this_checkout_is_that_of_its_ledgers():
    assert (ROOT / "docs" / "results.md").read_text() == report.page(ROOT / "evaluate" / "results")
