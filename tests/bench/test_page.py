"""The page, the README's table and the pictures are what the ledgers say, chip by chip."""

import re
from dataclasses import replace

import matplotlib
import pytest
import torch
from bench_rows import FACTS, committed_ledgers, row, two_runs

from bench import machine
from bench.__main__ import RESULTS, main, write_report
from bench.ledger import BenchError, Ledger, Measured, Run, chips
from bench.machine import ROOT
from bench.providers import PLAIN, TWICE, decode_providers, prefill_providers
from bench.report import plots
from bench.report.page import BEGIN, END
from bench.report.tables import terminal_table
from bench.runner import comparisons_of, suites

CPU = torch.device("cpu")
MARKS = f"before\n{BEGIN}\nold\n{END}\nafter\n"


@pytest.fixture
def ledger(tmp_path):
    return two_runs(tmp_path)


def written(results, root):
    """The page and the README that are made of these ledgers."""
    (root / "README.md").write_text(MARKS)
    write_report(results, root)
    return [(root / name).read_text() for name in ("docs/benchmarks.md", "README.md")]


def test_a_broken_ledger_is_said_in_a_sentence(ledger, capsys):
    ledger.write_text(ledger.read_text()[:-5])
    assert main(["report", "--results", str(ledger.parent.parent), "--root", str(ledger.parent)]) == 2
    assert "ends in the middle of a line" in capsys.readouterr().err


@pytest.mark.parametrize(
    "readme, results", [("no marks", "results"), (MARKS, "no-results"), (f"{BEGIN}\n", "results")]
)
def test_a_report_that_cannot_be_made_changes_nothing(ledger, tmp_path, readme, results):
    (tmp_path / "docs").mkdir()
    for name, text in (("README.md", readme), ("docs/benchmarks.md", "a page")):
        (tmp_path / name).write_text(text)
    with pytest.raises(BenchError, match="has no place for the table|holds no ledger"):
        write_report(tmp_path / results, tmp_path)
    assert (tmp_path / "README.md").read_text() == readme
    assert (tmp_path / "docs" / "benchmarks.md").read_text() == "a page"
    assert not (tmp_path / "docs" / "figures").exists()


def test_the_page_and_the_readme_are_what_the_ledger_says(ledger, tmp_path):
    """Every speed-up is this package's over the other's: above 1 this package is faster."""
    Ledger(ledger.with_name("targets.jsonl"), FACTS).add(row(suite="targets", ratios={PLAIN: 0.8}))
    page, readme = written(ledger.parent.parent, tmp_path)
    assert "| shape | zinit cpu, ms | p20 - p80 | TFLOP/s | over plain SDPA |" in page
    assert "| LLaMA-7B, B 1, T 128 | 2 | 2 - 2 | 1 | 2.00x |" in page
    assert "commit abc, torch 2, 2026-01-02, load" in page
    assert "| forward | plain SDPA (no prompts) | 0.67x to 1.25x |" in readme and readme.count("\n| ") == 3
    assert "| forward | plain SDPA (no prompts) | 0.67x to 1.25x |" in page
    assert "times as fast as plain SDPA | at least 1.82 | 1.25 | **missed by 45 %** |" in page
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    for picture in page.split("figures/")[1:]:
        assert (tmp_path / "docs" / "figures" / picture.partition(")")[0]).stat().st_size > 1000


def test_a_table_by_provider_and_the_terminal_have_the_same_direction(tmp_path):
    ours, theirs = row("zinit adapter", suite="train", ratios={"PEFT adaption prompt": 0.5}), row(
        "PEFT adaption prompt", suite="train", ratios={"zinit adapter": 2.0}
    )  # fmt: skip
    book = Ledger(tmp_path / "results" / "a-chip" / "train.jsonl", FACTS)
    for measured in (ours, theirs):
        book.add(measured)
    page, _ = written(tmp_path / "results", tmp_path)
    assert "| shape | provider | ms | p20 - p80 | over PEFT adaption prompt | over zinit adapter |" in page
    assert "| zinit adapter | 1 | 1 - 1 | 2.00x |  |" in page
    assert "| PEFT adaption prompt | 1 | 1 - 1 |  | **0.50x** |" in page
    columns = {c.header: list(c.cells) for c in terminal_table("train", [ours, theirs]).columns}
    assert columns["over PEFT adaption prompt"] == ["", "2.00x", ""]
    assert columns["over zinit adapter"] == ["", "", "0.50x"]


def test_the_summary_names_the_fastest_other_over_all_shapes(tmp_path):
    """A provider without prompts is not such another."""
    book = Ledger(tmp_path / "results" / "a-chip" / "attention.jsonl", FACTS)
    for shape, official, two in (("first", 1.25, 2.0), ("second", 4.0, 1.6)):
        book.add(row(shape=shape, ratios={PLAIN: 1 / official, TWICE: 1 / two}))
        book.add(row(PLAIN, shape=shape, ratios={"zinit cpu": 0.1}))
        book.add(row("official formula", shape=shape, ratios={"zinit cpu": official}))
        book.add(row(TWICE, shape=shape, ratios={"zinit cpu": two}))
    page, readme = written(tmp_path / "results", tmp_path)
    assert "| forward | the fastest other that has prompts | 1.25x to 1.60x |" in page
    assert "the fastest other" not in readme


@pytest.mark.parametrize("device, rows", [("cpu", 7), ("cuda", 6)])
def test_the_readme_has_few_rows(device, rows):
    found = comparisons_of(device, in_readme=True)
    assert [c.readme_row for c in found] == list(range(1, rows + 1))


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
    assert machine.processor(cpuinfo) == processor


def test_a_copy_without_history_is_told_its_commit(monkeypatch):
    monkeypatch.setattr(machine, "output", lambda command: "")
    monkeypatch.delenv("ZINIT_COMMIT", raising=False)
    assert machine.commit() == "unknown"
    monkeypatch.setenv("ZINIT_COMMIT", "0123456789")
    monkeypatch.setenv("ZINIT_PROOF", "0")
    facts = machine.conditions(CPU)
    assert facts["commit"] == "0123456789" and facts["settings"]["ZINIT_PROOF"] == "0"


def test_the_readme_shows_the_newest_complete_chip_and_the_losses_of_the_others(tmp_path, capsys):
    """A few newer rows of a third chip hide neither. The runs of two chips are never one another's second."""
    results = tmp_path / "results"

    def measured(chip, day, *names, ratio):
        for suite in names:
            facts = {**FACTS, "chip": chip, "time": f"2026-01-0{day}T03:04:05Z"}
            book = Ledger(results / machine.folder_name(chip) / f"{suite}.jsonl", facts)
            book.add(row(suite=suite, ratios={PLAIN: ratio}))

    measured("Zen 4", 1, "attention", "targets", ratio=1.25)
    measured("Zen 5", 2, "attention", "targets", ratio=0.5)
    measured("Zen 6", 3, "targets", ratio=0.25)
    measured("Zen 7", 4, "serve", ratio=0.125)  # none of the README's rows
    page, readme = written(results, tmp_path)
    assert "| Zen 5 | compared with | float32 |" in readme
    assert "| forward | plain SDPA (no prompts) | 2.00x |" in readme
    assert (
        "On Zen 4, 2026-01-01: 0 of 1 targets met (0 of 1 figures); at the lowest 0.80x (forward, compared with "
        "plain SDPA (no prompts))." in readme
    )
    assert "On Zen 6, 2026-01-03: 1 of 1 targets met" in readme
    assert "Zen 7" not in readme
    assert all(f"## {chip}\n" in page for chip in ("Zen 4", "Zen 5", "Zen 6", "Zen 7"))
    assert "not measured on this chip" in page and "| not measured |" not in page
    assert main(["agree", "--results", str(results)]) == 2
    measured("Zen 4", 4, "targets", ratio=1.25)
    assert main(["agree", "--results", str(results)]) == 0
    assert "zen-4/targets.jsonl" in capsys.readouterr().out


def test_readme_and_page_are_what_the_committed_ledgers_say(tmp_path, monkeypatch):
    """Written anew: what differs was typed in, or the report was not run after the ledgers."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: path.touch())
    for path in committed_ledgers():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    readme = (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme)
    files = write_report(tmp_path / "bench" / "results", tmp_path)
    assert (tmp_path / "README.md").read_text() == readme, "python -m bench report"
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert (tmp_path / "docs" / "benchmarks.md").read_text() == page, "python -m bench report"
    pictures = {path.name for path in files[2:]}
    committed = {path.name for path in (ROOT / "docs" / "figures").glob("*.png")}
    folders = {path.parent.name for path in committed_ledgers()}
    assert pictures == {name for name in committed if name.startswith(tuple(folders))}, (
        "python -m bench report"
    )


def test_pictures_that_are_not_made_any_more_are_deleted_and_those_of_others_stay(ledger, tmp_path):
    figures = tmp_path / "docs" / "figures"
    figures.mkdir(parents=True)
    others = {"another-time.png", "a-chip-2-time.png"}  # of chips whose ledgers are not here
    for name in ("a-chip-time.png", *others):
        (figures / name).write_text("")
    written(ledger.parent.parent, tmp_path)
    names = {path.name for path in figures.iterdir()}
    assert {"a-chip-speed.png", "a-chip-attention.png", "a-chip-roofline.png", *others} == names


def drawn(rows):
    """Each picture's figure, with the text that it shows."""
    matplotlib.use("Agg")
    plain, found = [m for m in rows if m.row.is_plain], {}
    makers = [plots.attention, plots.decode, plots.roofline]
    made = [(maker.__name__, maker(plain)) for maker in makers]
    made.append(("speed", plots.speed(plain, comparisons_of("cpu", in_readme=True))))
    made += [(name, plots.charts(plain, suite)) for name, suite in suites().items() if suite.charts]
    for name, picture in made:
        if picture is not None:
            figure, title = picture
            labels = [
                text
                for a in figure.axes
                for text in (a.get_xlabel(), a.get_ylabel(), a.get_title(loc="left"))
            ]
            found[name] = figure, title, " ".join([*(t.get_text() for t in figure.texts), *labels])
    return found


@pytest.fixture(scope="module")
def newest_chip():
    return chips(RESULTS)["amd-epyc-family-26-model-2-2-threads"]


def test_every_picture_says_what_it_shows(newest_chip):
    pictures = drawn(newest_chip)
    assert set(pictures) == {"attention", "decode", "roofline", "speed", "memory", "generate", "train"}
    for name, (_, title, text) in pictures.items():
        text = " ".join(text.split())
        assert "AMD EPYC family 26 model 2, 2 threads" in text and "measured 2026-11-2" in text, name
        assert re.search(r"\bB \d", text) and re.search(r"\d prompts", text), name
        assert re.search(r"(higher|lower) is better|right of 1: this package is faster", text), name
        assert re.search(r"\d", title), f"{name}: its title states no finding"


@pytest.mark.parametrize("peaks", [False, True])
def test_no_point_lies_above_the_roof(newest_chip, peaks):
    """torch.mm is no roof: in float32 this package is faster. Without a measured limit, none is drawn."""
    rows = list(newest_chip)
    if peaks:  # as a ledger has them that was measured since
        for m in newest_chip:
            if m.row.provider == "torch.mm, square" and m.row.suite == "attention":
                rows.append(Measured(replace(m.row, provider="peak arithmetic", tflops=1.0), m.run))
            if m.row.provider == "plain read of the cache" and m.row.suite == "decode":
                rows.append(Measured(replace(m.row, provider="peak read", gbps=1.1 * m.row.gbps), m.run))
    figure, _, _ = drawn(rows)["roofline"]
    above_the_product = 0
    for axis in figure.axes:
        lines = {line.get_label(): line.get_xydata() for line in axis.lines}
        points = [point for collection in axis.collections for point in collection.get_offsets()]
        assert len(points) > 20 and ("the chip's limit" in lines) == peaks
        product = lines["torch.mm, square (no limit)"][0][1]
        above_the_product += sum(y > product for _, y in points)
        if peaks:
            (x0, y0), _, (_, top) = lines["the chip's limit"]
            assert all(y <= min(top, y0 / x0 * x) for x, y in points)
    assert above_the_product > 10


def test_providers_are_told_apart_by_colour_and_by_marker():
    """A compiled one too: it was drawn in the other's colour."""
    assert plots.STYLES[TWICE]["color"] != plots.STYLES[f"{TWICE}, compiled"]["color"]
    for providers in (prefill_providers(), decode_providers()):
        looks = {p.name: plots.style(p.name) for p in providers if plots.style(p.name)}
        assert {TWICE, f"{TWICE}, compiled", PLAIN, "zinit cpu"} <= set(looks)
        on_one_machine = [look for name, look in looks.items() if name not in ("zinit triton", "zinit cuda")]
        for key in (lambda look: look["marker"], lambda look: (look["color"], look.get("linestyle"))):
            kinds = [key(look) for look in on_one_machine]
            assert len(set(kinds)) >= len(kinds) - 1  # "o" is plain SDPA's too, dashed and black


def test_a_run_of_a_gpu_is_drawn():
    """The two GPU backends, a chart of a new suite, and no CPU limits."""
    run = Run("", {**FACTS, "chip": "NVIDIA H200", "device": "cuda"}, ())
    shapes = [
        ("zinit triton", "forward"),
        ("zinit cuda", "decode"),
        (PLAIN, "forward"),
        ("copy of as many bytes", "decode"),
    ]
    rows = [
        Measured(
            row(provider, suite="decode" if mode == "decode" else "attention", mode=mode, dtype="bfloat16", gbps=1000.0,
                layout="token-major", tflops=300.0, ratios={PLAIN: 0.5}), run)
        for provider, mode in shapes
    ]  # fmt: skip
    rows.append(Measured(row("torch.mm, square", dtype="bfloat16", tflops=600.0), run))
    pictures = drawn(rows)
    assert {"attention", "decode", "roofline"} <= set(pictures)
    (axis,) = pictures["roofline"][0].axes
    assert "the chip's limit" in axis.get_legend_handles_labels()[1]
