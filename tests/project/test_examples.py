"""The example scripts run as a user runs them."""

import json
import subprocess
import sys

from repository import ROOT

from model.data import Record, read_records

SCRIPT = ROOT / "examples" / "seed_tasks.py"


def run(*words) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, timeout=60
    )


def test_seed_tasks_become_alpaca_records(tmp_path):
    tasks = [
        {
            "id": "a",
            "instruction": "Add.",
            "instances": [{"input": "1 2", "output": "3\n"}, {"input": "", "output": "é"}],
        },
        {
            "id": "b",
            "instruction": "Say.",
            "instances": [{"input": "", "output": ""}, {"input": " x", "output": "y"}],
        },
    ]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)) + "\n")
    done = run(tmp_path / "tasks.jsonl", tmp_path / "records.jsonl")
    assert (
        (done.returncode, done.stderr) == (0, "")
        and "3 records" in done.stdout
        and "1 without" in done.stdout
    )
    expected = [Record("Add.", "3", "1 2"), Record("Add.", "é"), Record("Say.", "y", "x")]
    assert read_records(tmp_path / "records.jsonl") == expected


def test_bad_seed_tasks_are_named(tmp_path):
    (tmp_path / "tasks.jsonl").write_text('{"instruction": "a", "instances": []}\n{"instruction": "a"}\n')
    done = run(tmp_path / "tasks.jsonl", tmp_path / "records.jsonl")
    assert done.returncode == 2 and "line 2: the field 'instances' is missing" in done.stderr
    assert not (tmp_path / "records.jsonl").exists()
    done = run(tmp_path / "gone.jsonl", tmp_path / "records.jsonl")
    assert done.stderr == f"error: {tmp_path / 'gone.jsonl'}: No such file or directory\n"
    (tmp_path / "tasks.jsonl").write_text('{"instruction": "a", "instances": []}\n')
    before = (tmp_path / "tasks.jsonl").read_text()
    done = run(tmp_path / "tasks.jsonl", tmp_path / "tasks.jsonl")
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path / 'tasks.jsonl'}: File exists\n")
    assert (tmp_path / "tasks.jsonl").read_text() == before
    done = run(tmp_path / "tasks.jsonl", tmp_path / "nowhere" / "records.jsonl")
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'nowhere' / 'records.jsonl'}: No such file or directory\n"


def test_the_tables_of_the_scaling_page_are_those_of_the_script():
    """Word for word: a rate or a count that is changed in one place shows in the other."""
    script = ROOT / "examples" / "scaling_model.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() in (ROOT / "docs" / "scaling.md").read_text()


def test_launch_files_name_options_that_there_are():
    """They have not run on a cluster; their syntax and the options are checked."""
    import re

    import yaml

    from model.train_options import training_parser

    known = {option for action in training_parser()._actions for option in action.option_strings}
    slurm, sky = (ROOT / "examples" / "launch" / name for name in ("train.sbatch", "sky.yaml"))
    subprocess.run(["bash", "-n", slurm], check=True)
    job = yaml.safe_load(sky.read_text())
    subprocess.run(["bash", "-n"], input=job["run"], text=True, check=True)
    for text in (slurm.read_text(), job["run"]):
        words = re.findall(r"--[a-z-]+", text[text.rindex("-m model.train") :])
        assert words and set(words) <= known
