"""A ledger is whole or refused: damaged, cut, written by two at once, or on a full disk."""

import json
import resource
import signal
import subprocess
import sys

import pytest
from bench_rows import FACTS, row, two_runs

from bench import report
from bench.ledger import Ledger, LedgerError, digest, read


@pytest.fixture
def ledger(tmp_path):
    return two_runs(tmp_path)


def test_a_ledger_is_read_as_it_was_written(ledger):
    first, second = read(ledger)
    assert first.conditions["time"].startswith("2026-01-01") and len(first.rows) == 2
    assert second.rows[0] == row(p50=2.0, ratios={"plain SDPA": 1.5})


@pytest.mark.parametrize(
    "damage, line",
    [("change", 5), *((damage, i) for damage in ("delete", "change", "swap") for i in range(5))],
)
def test_a_damaged_ledger_is_refused(ledger, damage, line):
    lines = ledger.read_text().splitlines(keepends=True)
    if damage == "delete":
        del lines[line]
    elif damage == "change":
        lines[line] = lines[line].replace('"run":"', '"run":"x')
    else:
        lines[line], lines[line + 1] = lines[line + 1], lines[line]
    ledger.write_text("".join(lines))
    with pytest.raises(LedgerError, match=r"attention.jsonl.*line \d.*(was changed|not JSON)"):
        read(ledger)
    with pytest.raises(LedgerError):  # nor is anything appended to it
        Ledger(ledger, FACTS)


def test_ledgers_of_before_lines_had_digests_of_their_own_are_read(ledger):
    lines, after = [], ""
    for line in ledger.read_text().splitlines():
        entry = {**json.loads(line), "after": after}
        del entry["digest"]
        lines.append(json.dumps(entry, separators=(",", ":")))
        after = digest(lines[-1])
    before = read(ledger)
    ledger.write_text("".join(f"{line}\n" for line in lines))
    assert read(ledger) == before
    Ledger(ledger, FACTS).add(row())
    assert [len(run.rows) for run in read(ledger)] == [2, 2, 1]


AT_ONCE = """
import sys
sys.path.insert(0, "tests")
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
    processes = [subprocess.Popen([*command, str(i)], cwd=report.ROOT) for i in range(2)]
    assert [process.wait(100) for process in processes] == [0, 0]
    found = {tuple(r.p50_ms for r in run.rows) for run in read(path)}
    assert found == {(0.0,) * 100, (1.0,) * 100}


def test_a_full_disk_leaves_no_half_line(tmp_path):
    """The limit on a file's size stands for it."""
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


@pytest.mark.parametrize(
    "text, message", [("{", "middle of a line"), ("{\n", "line 1 is not JSON"), ("\xff", "middle")]
)
def test_what_is_no_ledger_is_refused(tmp_path, text, message):
    path = tmp_path / "attention.jsonl"
    path.write_text(text)
    with pytest.raises(LedgerError, match=message):
        read(path)
