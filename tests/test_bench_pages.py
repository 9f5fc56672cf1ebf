"""The page, the README's table and the comparisons are what the ledgers say, chip by chip."""

import subprocess

import pytest
import torch
from bench_rows import FACTS, row, two_runs

from bench import chapters, conditions, page, report
from bench.__main__ import main
from bench.ledger import Ledger, read
from bench.providers import TWICE
from bench.suites import dropins

CPU = torch.device("cpu")


@pytest.fixture
def ledger(tmp_path):
    return two_runs(tmp_path)


def test_what_is_cut_off_the_end_changes_the_page(ledger):
    """A ledger cannot know it by itself: a run that was stopped ends anywhere."""
    before = page.page(ledger.parent.parent, {})
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    assert len(read(ledger)) == 2 and page.page(ledger.parent.parent, {}) != before


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


def test_a_copy_without_history_is_told_its_commit(monkeypatch):
    monkeypatch.setattr(conditions, "output", lambda command: "")
    assert conditions.commit() == "unknown"
    monkeypatch.setenv("ZINIT_COMMIT", "0123456789")
    monkeypatch.setenv("ZINIT_TRY_GPU", "1")
    facts = conditions.conditions(CPU)
    assert facts["commit"] == "0123456789" and facts["settings"] == {"ZINIT_TRY_GPU": "1"}


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
