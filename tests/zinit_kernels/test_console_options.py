"""The command line of every program: an option that is given twice is an error, not the last one's value."""

from __future__ import annotations

import argparse

import pytest

from evaluate.__main__ import commands
from model import demo, generate, train
from zinit_kernels import convert, inspect
from zinit_kernels.console import Parser


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every program, caught where it parses."""
    found = {}
    for name, main in {
        "train": train.main, "generate": generate.main, "demo": demo.main,
        "convert": convert.main, "inspect": inspect.main,
        **{f"evaluate {name}": command for name, (_, command) in commands().items()},
    }.items():  # fmt: skip
        with pytest.MonkeyPatch.context() as patched, pytest.raises(InterruptedError):

            def catch(parser, *_, name=name):
                found[name] = parser
                raise InterruptedError

            patched.setattr(argparse.ArgumentParser, "parse_known_args", catch)
            main([])
    return found


OPTIONS = [
    pytest.param(parser, action, id=f"{name} {action.option_strings[-1]}")
    for name, parser in parsers().items()
    for action in parser._actions
    if action.option_strings and not isinstance(action, argparse._HelpAction | argparse._AppendAction)
]


@pytest.mark.parametrize(("parser", "action"), OPTIONS)
def test_an_option_given_twice_is_refused(capsys, parser, action):
    value = [str(next(iter(action.choices or ["1"])))] if action.nargs != 0 else []
    with pytest.raises(SystemExit) as end:
        parser.parse_args([action.option_strings[0], *value] * 2)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: argument ") and error.count("\n") == 1
    assert "given twice, and only one can count; --help lists the options." in error


def test_a_parser_may_be_used_again():
    parser = Parser()
    parser.add_argument("--seed", type=int)
    group = parser.add_argument_group("more")
    group.add_argument("--stop", action="append")
    group.add_argument("--flag", action="store_true")
    for seed in (1, 2):
        told = parser.parse_args(["--seed", str(seed), "--stop", "a", "--stop", "b", "--flag"])
        assert (told.seed, told.stop, told.flag) == (seed, ["a", "b"], True)


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (train.main, ["--base", "", "--data", "a", "--out", "b"]),
        (train.main, ["--base", "a", "--data", "a", "--out", ""]),
        (generate.main, ["--base", "a", "--prompt", "x", "--adapter", ""]),
        (convert.main, ["", "a"]),
        (convert.main, ["a", ""]),
        (inspect.main, [""]),
    ],
)
def test_an_empty_name_is_not_the_working_directory(main, words, capsys):
    """Path("") is ".": `--out "$OUT"` with OUT not set would write where the shell happens to be."""
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "the name of a file or folder is empty" in capsys.readouterr().err
