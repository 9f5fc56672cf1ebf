"""A ledger is read as it was written, or refused: cut, written by two at once, on a full disk, older than this code."""

import json
import resource
import signal
import subprocess
import sys

import pytest
from bench_rows import FACTS, committed_ledgers, row, two_runs

from bench.ledger import Ledger, LedgerError, chips, newest, read
from bench.machine import ROOT


@pytest.fixture
def ledger(tmp_path):
    return two_runs(tmp_path)


def test_a_ledger_is_read_as_it_was_written(ledger):
    first, second = read(ledger)
    assert first.conditions["time"].startswith("2026-01-01") and len(first.rows) == 2
    assert second.rows[0] == row(p50=2.0, ratios={"plain SDPA": 1.5})


def test_the_newest_run_counts(ledger):
    measured = newest(read(ledger))
    assert [m.row.p50_ms for m in measured] == [2.0, 2.0]
    assert measured[0].run.conditions["time"] == "2026-01-02T03:04:05Z"


def test_committed_ledgers_are_read_figure_by_figure():
    """Also those from before November 2026, whose lines hold digests and whose targets are called "bars"."""
    renamed = 0
    for path in committed_ledgers():
        written = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [entry for entry in written if entry["kind"] == "row"]
        found = [r for run in read(path) for r in run.rows]
        assert len(found) == len(rows) > 0, path
        for entry, read_as in zip(sorted(rows, key=lambda e: e["run"]), sorted_rows(path), strict=True):
            fields = {k: v for k, v in entry.items() if k not in ("kind", "run", "after", "digest", "suite")}
            assert fields == {name: getattr(read_as, name) for name in fields}
            assert read_as.suite == path.stem
            renamed += entry["suite"] != read_as.suite
        assert all(title.startswith(f"{path.stem}, ") for run in read(path) for title in run.jobs)
    assert renamed > 1000


def sorted_rows(path):
    return [r for run in sorted(read(path), key=lambda run: run.identity) for r in run.rows]


def test_two_names_of_one_suite_are_one(tmp_path):
    """A ledger that somebody has under the old name: its newer runs count, its older ones do not."""
    for name, day, p50 in (("targets", 1, 1.0), ("bars", 2, 2.0), ("targets", 3, 3.0), ("bars", 1, 4.0)):
        book = Ledger(tmp_path / "a-chip" / f"{name}.jsonl", {**FACTS, "time": f"2026-01-0{day}T03:04:05Z"})
        book.add(row(suite=name, p50=p50))
        book.finish(f"{name}, forward")
    (measured,) = chips(tmp_path)["a-chip"]
    assert measured.row.p50_ms == 3.0
    assert {title for run in read(tmp_path / "a-chip" / "bars.jsonl") for title in run.jobs} == {
        "targets, forward"
    }


AT_ONCE = """
import sys
sys.path.insert(0, "tests/support")
from pathlib import Path
from bench.ledger import Ledger
from bench_rows import FACTS, row
book = Ledger(Path(sys.argv[1]), FACTS)
for _ in range(100):
    book.add(row(p50=float(sys.argv[2])))
"""


def test_two_runs_at_once_write_in_turns(tmp_path):
    """In the same second, of the same commit."""
    path = tmp_path / "attention.jsonl"
    command = [sys.executable, "-c", AT_ONCE, str(path)]
    processes = [subprocess.Popen([*command, str(i)], cwd=ROOT) for i in range(2)]
    assert [process.wait(100) for process in processes] == [0, 0]
    found = {tuple(r.p50_ms for r in run.rows) for run in read(path)}
    assert found == {(0.0,) * 100, (1.0,) * 100}


def test_a_full_disk_leaves_no_half_line(tmp_path):
    """A limit on the file's size stands for it."""
    path = tmp_path / "attention.jsonl"
    book = Ledger(path, FACTS)
    book.add(row())
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limit[1]))
        with pytest.raises(LedgerError, match=r"attention.jsonl cannot be written.*No space left"):
            book.add(row())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    book.add(row())
    assert len(read(path)[0].rows) == 2


RUN = '{"kind":"run","run":"a"}\n'
ROW = {
    "kind": "row",
    "run": "a",
    "suite": "s",
    "shape": "s",
    "sizes": {},
    "mode": "m",
    "dtype": "d",
    "provider": "p",
}


def changed(**changes):
    return RUN + json.dumps({k: v for k, v in {**ROW, **changes}.items() if v is not None}) + "\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "ends in the middle of a line"),
        ("\xff", "ends in the middle of a line"),
        ("{\n", "line 1 is not JSON"),
        ("[1]\n", "line 1 is not a JSON object"),
        (changed(run="b"), "line 2 is neither a run, nor a row"),
        (changed(kind="figure"), "line 2 is neither a run, nor a row"),
        (changed(p99_ms=1.0), "line 2 is neither a run, nor a row"),
        (changed(provider=None), "line 2 is neither a run, nor a row"),
        (RUN + '{"kind":"job","run":"a"}\n', "line 2 is neither a run, nor a row or a job"),
    ],
)
def test_what_is_no_ledger_is_refused(tmp_path, text, message):
    path = tmp_path / "attention.jsonl"
    path.write_text(text)
    with pytest.raises(LedgerError, match=message):
        read(path)
    with pytest.raises(LedgerError, match=message):  # nor is anything appended to it
        Ledger(path, FACTS)
    assert path.read_text() == text
    path.write_text(changed())
    assert read(path)[0].rows[0].provider == "p"
