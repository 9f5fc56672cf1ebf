"""The `zinit` command: every program under one name, and a sentence where something is missing."""

import importlib
import subprocess
import sys

import pytest
from repository import ROOT

import model.errors
from zinit_kernels import __version__, cli


def zinit(*arguments: str) -> int:
    """The exit status."""
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    return exit.value.code


def test_help_names_every_program(capsys):
    assert zinit("--help") == 0
    shown = capsys.readouterr().out
    assert all(
        f"zinit {name} " in shown or f"zinit {name}\n" in shown for name in cli.OWN + cli.MODEL + cli.EVALUATE
    )


def test_version(capsys):
    assert zinit("--version") == 0
    assert capsys.readouterr().out == f"zinit_kernels {__version__}\n"


@pytest.mark.parametrize(
    "arguments, said", [([], "zinit train"), (["tarin"], "zinit has no program 'tarin'; it has check, ")]
)
def test_a_wrong_call_is_a_sentence_and_exit_code_2(arguments, said, capsys):
    assert zinit(*arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err and not captured.out


def test_programs_get_their_arguments_and_keep_their_exit_codes(capsys):
    assert zinit("inspect", "/nowhere") == 2
    assert "/nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.MODEL)
def test_the_models_programs_are_found_and_name_themselves(name, capsys):
    assert zinit(name, "--help") == 0
    prog = f"zinit {name}" if cli._package("model") == "zinit_kernels.model" else f"python -m model.{name}"
    assert capsys.readouterr().out.startswith(f"usage: {prog} ")
    assert model.errors.program_name(name) == f"python -m model.{name}"


def test_bad_input_to_the_models_programs_is_a_sentence(tmp_path, capsys):
    assert zinit("generate", "--base", str(tmp_path / "none"), "--prompt", "x") == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("missing", cli.NEEDS)
def test_a_missing_extra_is_named_with_the_command_that_brings_it(missing, monkeypatch, capsys):
    def import_module(name):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert zinit("train") == 2
    assert capsys.readouterr().err == (
        f"error: zinit train needs {missing}: {sys.executable} -m pip install 'zinit-kernels[{cli.NEEDS[missing]}]'.\n"
    )


@pytest.mark.parametrize("name", ["model", "vision", "serve"])
def test_an_extra_brings_what_its_programs_need(name):
    """All that model/ imports beside torch, the standard library and what the package itself depends on."""
    rules = (ROOT / "tests" / "import_rules.toml").read_text().split('["model"]')[1].split('["bench"]')[0]
    extras = (ROOT / "pyproject.toml").read_text().splitlines()
    extra = next(line for line in extras if line.startswith(f"{name} = "))
    for package in (package for package, brings in cli.NEEDS.items() if brings == name):
        assert f'"{"pillow" if package == "PIL" else package}>=' in extra and f'"{package}"' in rules
    everything = next(line for line in extras if line.startswith("evaluate = "))
    assert "zinit-kernels[model]" in everything and all(
        f'"{"pillow" if package == "PIL" else package}>=' in everything
        for package, brings in cli.NEEDS.items()
        if brings not in ("model", "serve")
    )


def test_runs_as_a_module_without_the_script():
    result = subprocess.run(
        [sys.executable, "-m", "zinit_kernels", "nothing"], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert "no program 'nothing'" in result.stderr
