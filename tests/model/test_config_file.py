"""Options from a YAML file, and those of a run written as one."""

from __future__ import annotations

import pytest
from tiny_runs import arguments, losses_of, run

from model.config_file import with_config
from model.errors import UserError
from model.train_options import read_options, training_parser

WORDS = ["--base", "base", "--out", "out"]


def written(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    return ["--config", str(tmp_path / "run.yaml")]


def test_every_field_is_an_option_and_the_command_line_wins(tmp_path):
    text = (
        "data: [a.json, 'b.json:2']\nepochs: 7\nbase_lr: 1e-3\nimage-layers: -1\npadded: true\nclip: null\n"
    )
    text += "encoder: e\n"
    options = read_options([*WORDS, *written(tmp_path, text), "--epochs", "2"])
    assert list(map(str, options.paths)) == ["a.json", "b.json"] and options.shares[1].weight == 2
    assert (options.epochs, options.base_lr, options.padded, options.clip) == (2, 1e-3, True, None)
    assert options.image_layers == "-1"
    options = read_options(
        [*WORDS, *written(tmp_path, "data: a.json\noverwrite: true"), "--data", "c.json", "--resume"]
    )
    assert list(map(str, options.paths)) == ["c.json"] and options.resume and not options.overwrite


BAD = {
    "epoch: 3": "'epoch' is not an option: is 'epochs' meant?",
    "config: a.yaml": "'config' is not an option",
    "- 3": "must hold one field a line",
    "epochs: [1, 2]": "run.yaml: epochs cannot be [1, 2].",
    "padded: 3": "run.yaml: padded must be true or false, got 3.",
    "data: [{a: 1}]": "run.yaml: data cannot be",
    "a: [": "is not YAML",
    "!!python/object/apply:os.system [true]": "is not YAML",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_bad_files_are_named(tmp_path, text):
    with pytest.raises(UserError) as error:
        with_config(training_parser(), [*WORDS, *written(tmp_path, text)])
    assert BAD[text] in str(error.value)


def test_a_value_that_the_option_does_not_take(tmp_path, capsys):
    assert run(*WORDS, *written(tmp_path, "data: a.json\nepochs: many")) == 2
    assert (
        capsys.readouterr().err
        == "error: argument --epochs: invalid int value: 'many'; --help lists the options.\n"
    )


def test_a_run_from_the_configuration_of_another_is_the_same_run(folder, whole_run, tmp_path):
    assert run("--config", str(whole_run / "config.yaml"), "--out", str(tmp_path / "out")) == 0
    assert losses_of(tmp_path / "out") == losses_of(whole_run)
    ours, theirs = ((path / "config.yaml").read_text().splitlines() for path in (tmp_path / "out", whole_run))
    assert [line for line in ours if line not in theirs] == [f'out: "{tmp_path}/out"']


def test_auto_resume_begins_and_goes_on(folder, whole_run, tmp_path):
    words = [*arguments(folder, tmp_path / "out"), "--auto-resume"]
    assert run(*words, "--dry-run") == 0 and not (tmp_path / "out").exists()
    assert run(*words) == run(*words) == 0
    assert losses_of(tmp_path / "out") == losses_of(whole_run)
