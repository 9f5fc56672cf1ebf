"""What the console programs share: foreign text on its way to a terminal, exit codes, readers that have gone."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from adapter_files import ours
from repository import ROOT, search_path

from zinit_kernels import check, convert, inspect
from zinit_kernels.checkpoints import CheckpointError, save_adapter
from zinit_kernels.console import InputError, Parser, printable, run, shown, warn

EVIL = "\x1b]0;owned\x07\x1b[2J\u202eevil\nerror: none"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain é 中 text", "plain é 中 text"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb\tc\0", "a\\nb\\tc\\x00"),
        ("\u202eevil\u200b", "\\u202eevil\\u200b"),
        ("\ud800", "\\ud800"),
        ("\x9b1m", "\\x9b1m"),  # the one-character form of ESC [
    ],
)
def test_printable(text, expected):
    assert printable(text) == expected


def test_a_foreign_value_is_shown_in_one_short_line():
    nested = []
    for _ in range(10_000):
        nested = [nested]
    for value in (nested, {"a": "x" * 10**6}, 10**1000, [1] * 10**6, EVIL, {EVIL: EVIL}, torch.zeros(99, 99)):
        assert shown(value).isprintable() and len(shown(value)) < 1000


def test_messages_and_complaints_are_printable(capsys):
    assert str(InputError(EVIL)).isprintable() and str(CheckpointError(EVIL)).isprintable()
    assert isinstance(CheckpointError(""), ValueError)
    warn(EVIL)
    with pytest.raises(SystemExit):
        Parser(prog="x").parse_args([EVIL])
    printed = capsys.readouterr()
    assert printed.out == "" and all(line.isprintable() for line in printed.err.split("\n"))
    assert printed.err.startswith("warning: \\x1b]0;owned")


def exit_status(main):
    with pytest.raises(SystemExit) as left:
        run(main)
    return left.value.code


def test_exit_statuses(capsys):
    def raising(error):
        def main():
            raise error

        return main

    assert exit_status(lambda: None) == 0
    assert exit_status(lambda: 1) == 1
    assert exit_status(raising(InputError("no such thing."))) == 2
    assert exit_status(raising(FileNotFoundError(2, "No such file", "a\x1bb"))) == 2
    assert exit_status(raising(KeyboardInterrupt())) == 130
    assert exit_status(raising(SystemExit(0))) == 0
    assert capsys.readouterr().err == "error: no such thing.\nerror: a\\x1bb: No such file.\n"
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()))


def test_an_output_that_has_no_such_character_is_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert exit_status(lambda: print("é")) == 2
    assert capsys.readouterr().err == (
        "error: the output's encoding, ascii, has no 'é': set PYTHONIOENCODING=utf-8.\n"
    )


PROGRAMS = """
import json, os, runpy, sys
statuses, programs, outputs = [], json.loads(sys.argv[1]), map(int, sys.argv[2:])
for output in outputs:
    for name, words in programs.items():
        os.dup2(output, 1)
        sys.argv = [name, *words]
        try:
            runpy.run_module(name, run_name="__main__")
        except SystemExit as left:
            statuses.append(left.code)
print(statuses, file=sys.stderr)
"""


def test_an_output_that_takes_nothing(tmp_path):
    """A reader that has gone (`| head`) is no fault of the user's, a full disk is one; neither is a traceback."""
    save_adapter(tmp_path / "adapter", ours())
    programs = {"zinit_kernels.inspect": ["adapter"], "zinit_kernels.convert": ["adapter", "out"]}
    programs |= {name: ["--help"] for name in ("zinit_kernels.check", "model.train", "model.generate")}
    reader, pipe = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAMS, json.dumps(programs), str(pipe), str(full)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": search_path(ROOT), "PYTHONUNBUFFERED": ""}, pass_fds=(pipe, full),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=120,
    )  # fmt: skip
    os.close(pipe)
    os.close(full)
    *told, statuses = done.stderr.splitlines()
    assert json.loads(statuses) == [141] * 5 + [2] * 5
    assert told == ["error: No space left on device."] * 5


def test_help_of_check_does_not_run_it(capsys, monkeypatch):
    monkeypatch.setattr(check, "devices", lambda: pytest.fail("the check ran"))
    with pytest.raises(SystemExit) as left:
        check.main(["--help"])
    assert left.value.code == 0 and "usage: python -m zinit_kernels.check" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        check.main(["--device", "cpu"])
    assert left.value.code == 2


def test_no_escape_sequence_of_a_file_reaches_the_terminal(tmp_path, capsys):
    """Metadata, tensor names and file names, through the tables and the errors of both programs."""
    folder = tmp_path / "\x1b[31m"
    folder.mkdir()
    save_adapter(folder / "adapter", ours())
    metadata = {EVIL: EVIL, "base_model_name_or_path": EVIL}
    save_adapter(folder / "evil", replace(ours(), metadata=metadata))
    torch.save({EVIL: torch.ones(1), "adapter_query.weight": torch.ones(1)}, folder / "unknown")
    torch.save({f"layers.{EVIL}": torch.ones(1), "adapter_query.weight": torch.ones(1)}, folder / "v1")
    for name in ("adapter", "evil", "unknown", "v1", "absent"):
        inspect.main([str(folder / name)])
        convert.main([str(folder / name), str(folder / f"{name}-out")])
        printed = capsys.readouterr()
        lines = (printed.out + printed.err).split("\n")
        assert len(lines) > 2 and all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("end", "status"), [("return", 0), ("return 3", 3), ("sys.exit(130)", 130), ("raise InputError('no')", 2)]
)
def test_a_process_with_threads_of_gloo_is_not_taken_apart(end, status):
    """What is registered runs, what was said arrives, the status is the program's; no object dies after that."""
    program = f"""
import atexit, os, sys
from zinit_kernels.console import InputError, end_at_once, run

class Last:
    def __del__(self, write=os.write):
        write(2, b"taken apart")

kept = Last()

def main():
    atexit.register(print, "registered")
    print("said")
    end_at_once()
    {end}

run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (status, "said\nregistered\n")
    assert "taken apart" not in done.stderr
