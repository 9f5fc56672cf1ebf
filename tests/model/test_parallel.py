"""Training by several processes: the steps of one, exact resumption, and processes that die."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from parallel_steps import steps
from repository import ROOT, run_python, search_path
from tiny_runs import CONFIG, arguments, losses_of, run

from model import program
from model.adapter_files import load_adapter
from model.errors import UserError, warn
from model.parallel.divide import check_division
from model.parallel.world import World, open_world


def torchrun(number, *words, **options):
    """Starts so many processes with one thread each."""
    paths = search_path(ROOT, ROOT / "tests" / "support")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(number)]
    return subprocess.Popen(
        [*launcher, *map(str, words)], env=environment, cwd=ROOT, text=True, stderr=subprocess.PIPE, **options
    )


def finished(process):
    """What it said, once it has ended well."""
    _, error = process.communicate(timeout=400)
    assert process.returncode == 0, error
    return error


@pytest.mark.parametrize(
    ("number", "modes"),
    [(2, ["plain", "shard", "tensor", "padded", "lora"]), (4, ["plain", "shard", "both"])],
)
def test_many_processes_take_the_steps_of_one(tmp_path, number, modes):
    """Losses, the gradients of each layer and the adapter, with gates away from 0, on every process."""
    finished(torchrun(number, ROOT / "tests/support/parallel_steps.py", tmp_path, *modes))
    for mode in modes:
        alone = steps(World(), mode)
        for rank in range(number):
            found = torch.load(tmp_path / f"{mode}.{rank}")
            assert len(found["reports"]) == 6
            for ours, theirs in zip(found["reports"], alone["reports"], strict=True):
                assert ours[:3] == pytest.approx(theirs[:3], rel=1e-4)
                assert ours[3] == pytest.approx(theirs[3], rel=1e-4)
            assert found["loss"] == pytest.approx(alone["loss"], rel=1e-4)
            first = torch.load(tmp_path / f"{mode}.0")["trained"]
            assert found["trained"].keys() == alone["trained"].keys()
            for name, parameter in found["trained"].items():
                torch.testing.assert_close(parameter, alone["trained"][name], rtol=1e-3, atol=1e-3)
                assert torch.equal(parameter, first[name])


def test_a_killed_process_ends_the_others_and_torchrun_resumes(folder, whole_run, tmp_path, capsys):
    """kill -9 of one of two; the restart goes on, and every loss is that of the run without a break."""
    whole, output = tmp_path / "whole", tmp_path / "out"
    more = ["--save-every", "1", "--auto-resume"]
    finished(torchrun(2, "-m", "model.train", *arguments(folder, whole), *more))
    killed = ROOT / "tests/support/killed_training.py"
    said = finished(torchrun(2, "--max-restarts", "1", killed, *arguments(folder, output), *more))
    assert re.search(r"; from step [1-5]\n", said), said  # the second start
    assert losses_of(output) == losses_of(whole)
    ours, theirs = (load_adapter(path / "adapter.safetensors", CONFIG) for path in (output, whole))
    assert torch.equal(ours.prompts, theirs.prompts) and torch.equal(ours.gates, theirs.gates)
    # one process takes the same steps, to rounding
    for two, one in zip(losses_of(whole), losses_of(whole_run), strict=True):
        assert [value or 0.0 for value in two] == pytest.approx([value or 0.0 for value in one], rel=1e-4)
    # and goes on with them, and says what changes
    capsys.readouterr()
    assert run(*arguments(folder, output, "--resume")) == 0
    assert re.search(r"was written with .*processes 2.*, this run has .*processes 1", capsys.readouterr().err)


def test_shares_are_balanced_by_tokens():
    world = World(size=3)
    shares = world.shares([100, 10, 10, 10, 90, 95, 1])
    assert sorted(index for share in shares for index in share) == list(range(7))
    assert sorted(map(len, shares)) == [2, 2, 3] and shares == world.shares([100, 10, 10, 10, 90, 95, 1])
    assert World(size=4, tensor_parallel=4).shares([5, 6]) == [[0, 1]]


DIVISIONS = {
    (World(size=3, tensor_parallel=3), 8): "--tensor-parallel 3 does not divide the model's 4 query heads",
    (World(size=4, tensor_parallel=4), 8): "--tensor-parallel 4 does not divide the model's 2 key heads",
    (World(size=4), 3): "--batch-size 3 leaves some of the 4 data-parallel processes without a sample",
}


@pytest.mark.parametrize(("world", "batch_size"), DIVISIONS)
def test_worlds_that_divide_nothing_are_refused(world, batch_size):
    with pytest.raises(UserError) as error:
        check_division(CONFIG, world, batch_size, 100)
    assert DIVISIONS[world, batch_size] in str(error.value)
    check_division(CONFIG, World(size=4, tensor_parallel=2), 2, 2)


def test_the_number_of_processes_is_checked_before_they_meet(folder, tmp_path, monkeypatch, capsys):
    assert run(*arguments(folder, tmp_path / "out"), "--shard") == 2
    assert "--shard divides the base among processes, and there is one" in capsys.readouterr().err
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--tensor-parallel 2 does not divide the 3 processes"):
        open_world("cpu", 2)
    assert run(*arguments(folder, tmp_path / "out"), "--tensor-parallel", "2") == 2
    assert not (tmp_path / "out").exists()


def test_the_first_process_speaks(monkeypatch, capsys):
    """Another one says its fault only if the first, which would have ended it, has none."""
    monkeypatch.setattr(program, "_WAIT", 0.01)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)

    @program.program("advice", several=True)
    def main(arguments=None):
        warn("nothing.")
        raise UserError("no disk")

    previous = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(UserError, match="process 1: no disk"):
            main()
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert capsys.readouterr().err == ""


def test_a_process_that_finds_no_other_ends(tmp_path):
    """In a process of its own: the second one never comes."""
    code = "import model.parallel.world as world; world._JOIN = 0.5; world.open_world('cpu')"
    place = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = run_python("-c", code, timeout=300, **place)
    assert done.returncode == 1
    assert done.stderr.endswith("error: the processes of this run did not find each other within 0.5 s.\n")
