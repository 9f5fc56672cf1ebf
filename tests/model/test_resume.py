"""Checkpoints of training: a damaged one is known by its digest, and a run goes on with its own base alone."""

from __future__ import annotations

import json
import os
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import arguments, contents, losses_of, make_base, run, write_tokenizer

from model import resume, run_output
from model import train as program
from model.adapter_files import load_adapter, save_adapter
from model.config import AdapterConfig
from model.data.samples import split_indices
from model.errors import UserError
from model.fingerprint import adapter_metadata, base_fingerprint, first_fingerprint
from model.llama import Llama
from model.loading import load_base, save_base
from model.recipe import Recipe
from model.resume import Checkpoint, load_checkpoint, restore, save_checkpoint
from model.run_folder import read_metrics
from model.train_loop import make_optimizer


@pytest.fixture
def state(whole_run):
    """The last checkpoint of a run, as plain values."""
    return torch.load(whole_run / "checkpoint.pt", weights_only=True)


def fresh(state):
    """An adapter and an optimizer as the run began with."""
    from model.adapter import LlamaAdapter

    base = make_base()
    adapter = LlamaAdapter(base.config, AdapterConfig(3))
    told = state["run"]
    recipe = Recipe(3, told["warmup_epochs"], told["base_lr"], batch_size=told["batch_size"])
    return adapter, make_optimizer(adapter, recipe)


def load(path, state):
    """What --resume does."""
    checkpoint = load_checkpoint(path, state["run"], num_steps=6)
    adapter, optimizer = fresh(state)
    restore(path, checkpoint, adapter, optimizer)
    return adapter.state_dict(), optimizer.state_dict(), checkpoint.step


def equal(ours, theirs) -> bool:
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[name], theirs[name]) for name in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_a_flipped_bit_is_known_or_changes_nothing(whole_run, tmp_path, state):
    """Of 20 flips in files without a digest 6 gave another run with exit status 0."""
    path = tmp_path / "checkpoint.pt"
    content = (whole_run / "checkpoint.pt").read_bytes()
    path.write_bytes(content)
    expected = load(path, state)
    draw, refused = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert equal(load(path, state), expected)
        except UserError as error:
            assert "is not a training checkpoint or is damaged" in str(error) or "was written with" in str(
                error
            )
            refused += 1
    assert 25 < refused < 150


def change(*keys, value):
    """Puts a value at the end of a path of keys; value None: takes it out."""

    def damage(state):
        *path, last = keys
        for key in path:
            state = state[key]
        if value is None:
            del state[last]
        else:
            state[last] = value(state[last]) if callable(value) else value

    return damage


def with_nan(tensor):
    return torch.where(torch.arange(tensor.numel()).view_as(tensor) == 5, torch.nan, tensor)


GROUP, FIRST = ("optimizer", "param_groups", 0), ("optimizer", "state", 0)
DAMAGE = {
    "more steps than the run has": change("step", value=10**12),
    "no number of steps": change("step", value=True),
    "steps below 0": change("step", value=-1),
    "fewer steps than the optimizer did": change("step", value=3),
    "prompts cut": change("adapter", "prompts", value=lambda tensor: tensor[:1]),
    "prompts of another dtype": change("adapter", "prompts", value=lambda tensor: tensor.double()),
    "prompts that are no numbers": change("adapter", "prompts", value=with_nan),
    "prompts that are no tensor": change("adapter", "prompts", value=3),
    "no gates": change("adapter", "gates", value=None),
    "no groups": change("optimizer", "param_groups", value=None),
    "groups that are none": change("optimizer", "param_groups", value=[3]),
    "no betas": change(*GROUP, "betas", value=None),
    "no learning rate": change(*GROUP, "lr", value=None),
    "a learning rate that is none": change(*GROUP, "lr", value=float("nan")),
    "other betas": change(*GROUP, "betas", value=(0.5, 0.5)),
    "another weight decay": change(*GROUP, "weight_decay", value=0.5),
    "no state": change("optimizer", "state", value={}),
    "no moments": change(*FIRST, "exp_avg", value=None),
    "moments cut": change(*FIRST, "exp_avg", value=lambda tensor: tensor[:1]),
    "moments that are no numbers": change(*FIRST, "exp_avg_sq", value=with_nan),
    "negative squares": change(*FIRST, "exp_avg_sq", value=lambda tensor: tensor - 1),
    "no count of steps": change(*FIRST, "step", value=None),
    "a run that is none": change("run", value=[1]),
}


@pytest.mark.parametrize("digest", [True, False])
@pytest.mark.parametrize("kind", DAMAGE)
def test_every_field_is_checked(tmp_path, state, kind, digest):
    """Also in files of the first version, which have no digest."""
    path, run = tmp_path / "checkpoint.pt", state["run"]
    if not digest:
        del state["digest"]
    torch.save(state, path)
    load(path, state)
    DAMAGE[kind](state)
    torch.save(state, path)
    with pytest.raises(UserError, match=r"is not a training checkpoint or is damaged \("):
        load(path, {"run": run})


def test_only_the_digest_knows_another_number(tmp_path, state):
    """A whole file, whose own checksums are right, with one prompt a little off."""
    path = tmp_path / "checkpoint.pt"
    state["adapter"]["prompts"] = state["adapter"]["prompts"] * (1 + 2**-20)
    torch.save(state, path)
    with pytest.raises(UserError, match="its content does not fit its digest"):
        load(path, state)


def test_more_steps_than_the_run_has_are_refused(tmp_path, state):
    """Whatever the optimizer says it did: a run that is "done" would train nothing and say nothing."""
    path = tmp_path / "checkpoint.pt"
    del state["digest"]
    state["step"] = 7
    for moments in state["optimizer"]["state"].values():
        moments["step"] = torch.tensor(7.0)
    torch.save(state, path)
    with pytest.raises(UserError, match="7 steps are done, and the run has 6"):
        load(path, state)


def test_a_field_more_or_less_is_refused(tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    for damaged in (state | {"more": 1}, {k: v for k, v in state.items() if k != "adapter"}, [1], 3):
        torch.save(damaged, path)
        with pytest.raises(UserError, match="is not a training checkpoint or is damaged"):
            load_checkpoint(path, {}, 6)


def test_what_a_file_cannot_hold_is_not_written(tmp_path, state):
    adapter, optimizer = fresh(state)
    with pytest.raises(TypeError, match="Path does not belong into a checkpoint"):
        save_checkpoint(tmp_path / "checkpoint.pt", 0, adapter, optimizer, {"out": type("Path", (), {})()})


def test_a_run_of_the_first_version_goes_on(folder, whole_run, tmp_path, state):
    """Its checkpoint has no digest, no fingerprint of the whole base and no conditions."""
    output = tmp_path / "out"
    shutil.copytree(whole_run, output)
    old = {name: state[name] for name in Checkpoint._fields}
    old["run"] = {k: v for k, v in old["run"].items() if k not in ("base weights", "conditions")} | {
        "max_tokens": 2048
    }
    torch.save(old, output / "checkpoint.pt")
    assert run(*arguments(folder, output, "--resume")) == 0
    assert losses_of(output) == losses_of(whole_run)


@pytest.mark.parametrize("changed", ["threads", "max_tokens"])
def test_other_conditions_are_warned_of(folder, whole_run, tmp_path, capsys, monkeypatch, changed):
    """The number of threads and how a step is cut change the last digits: the run goes on, and it is said."""
    output = tmp_path / "out"
    shutil.copytree(whole_run, output)
    assert run(*arguments(folder, output, "--resume")) == 0
    assert "will differ in their last digits" not in capsys.readouterr().err
    words = []
    if changed == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    else:
        words = ["--max-tokens", "77"]
    assert run(*arguments(folder, output, *words, "--resume")) == 0
    warning = f"this run has {changed} 77: its numbers will differ in their last digits from those of a run without a"
    assert warning in capsys.readouterr().err


def test_an_installation_without_kernels_is_a_condition(folder, whole_run, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    shutil.copytree(whole_run, output)
    monkeypatch.setattr(resume, "explain", lambda *_: SimpleNamespace(selected="composed"))
    assert run(*arguments(folder, output, "--resume")) == 0
    assert "was written with attention cpu, this run has attention composed" in capsys.readouterr().err


def test_compiled_layers_are_a_condition(folder, whole_run, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    shutil.copytree(whole_run, output)
    monkeypatch.setattr(Llama, "compile_layers", lambda self: None)
    assert run(*arguments(folder, output, "--resume"), "--compile") == 0
    assert "was written with compile False, this run has compile True" in capsys.readouterr().err


def test_other_validation_data_are_refused(folder, whole_run, tmp_path, capsys):
    """The training data are the same; the best adapter would be chosen by losses of two kinds."""
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    _, held_back = split_indices(len(records), 0.2, 0)
    records[held_back[0]]["output"] = "another"
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    output = tmp_path / "out"
    shutil.copytree(whole_run, output)
    words = arguments(folder, output, "--data", str(tmp_path / "data.jsonl"), "--resume")
    assert run(*words) == 2
    assert "checkpoint.pt was written with validation data = " in capsys.readouterr().err
    path = output / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["run"]["validation data"]  # as before that was asked
    parts = (SimpleNamespace(state_dict=lambda name=name: state[name]) for name in ("adapter", "optimizer"))
    save_checkpoint(path, state["step"], *parts, state["run"])
    assert run(*words) == 0


def test_lost_metrics_are_told(folder, whole_run, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(whole_run, output)
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(lines[:2] + lines[5:]))
    left = sum('"loss"' in line for line in lines[:2] + lines[5:])
    assert run(*arguments(folder, output, "--resume")) == 0
    assert f"metrics.jsonl lacks the lines of {6 - left} of the 6 steps" in capsys.readouterr().err
    (output / "metrics.jsonl").write_text("".join(lines))
    assert run(*arguments(folder, output, "--resume")) == 0
    assert "lacks the lines" not in capsys.readouterr().err


def damaged_base(folder, directory):
    """The base with one weight changed, in the middle of a matrix that has many rows."""
    base = load_base(folder / "base")
    with torch.no_grad():
        weight = base.layers[1].mlp.up_proj.weight
        weight[20, 7] = weight[20, 7] * 1.5
    save_base(base, directory)
    write_tokenizer(directory)
    return base


def test_a_base_changed_anywhere_is_noticed(folder, whole_run, tmp_path, capsys):
    base = damaged_base(folder, tmp_path / "base")
    assert first_fingerprint(base) == first_fingerprint(load_base(folder / "base"))
    words = arguments(folder, whole_run, "--base", str(tmp_path / "base"), "--resume")
    assert run(*words) == 2
    assert "was written with base weights = " in capsys.readouterr().err
    load_adapter(whole_run / "adapter.safetensors", base.config, base=base)
    assert "was trained on another base of the same shape" in capsys.readouterr().err


def test_a_fingerprint_is_of_every_bit():
    base = make_base()
    seen = {base_fingerprint(base)}
    assert base_fingerprint(make_base()) in seen and base_fingerprint(make_base(seed=1)) not in seen
    with torch.no_grad():
        for _, parameter in base.named_parameters():
            number = parameter.view(-1)
            before = number[-1].clone()
            number[-1] = torch.nextafter(before, before + 1)
            assert base_fingerprint(base) not in seen
            number[-1] = before
            if len(number) > 1 and number[0] != number[1]:
                number[:2] = number[:2].flip(0)
                assert base_fingerprint(base) not in seen
                number[:2] = number[:2].flip(0)
    assert base_fingerprint(base) in seen


def test_a_fingerprint_in_bfloat16_is_that_of_the_base_in_any_dtype(tmp_path):
    save_base(make_base(), tmp_path)
    bases = [load_base(tmp_path, dtype) for dtype in (None, torch.bfloat16)]
    assert len({base_fingerprint(base, torch.bfloat16) for base in bases}) == 1
    assert len({base_fingerprint(base) for base in bases}) == 2
    save_base(bases[0].half(), tmp_path / "half")
    halves = [load_base(tmp_path / "half", dtype) for dtype in (None, torch.float32, torch.bfloat16)]
    assert len({base_fingerprint(base, torch.bfloat16) for base in halves}) == 1


def test_adapters_of_the_first_version_are_still_compared(tmp_path, capsys):
    from model.adapter import LlamaAdapter

    base, other = make_base(), make_base(seed=1)
    adapter = LlamaAdapter(base.config, AdapterConfig(3))
    old = {"base": first_fingerprint(base, torch.bfloat16)}
    for metadata, file in ((old, "old"), (adapter_metadata(base), "new"), ({}, "none")):
        save_adapter(tmp_path / file, adapter, base.config, metadata=metadata)
        load_adapter(tmp_path / file, base.config, base=base)
        assert capsys.readouterr().err == ""
        load_adapter(tmp_path / file, base.config, base=other)
        assert capsys.readouterr().err.count("another base of the same shape") == (file != "none")


def test_a_broken_line_of_the_metrics_costs_that_line_alone(folder, whole_run, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(whole_run, output)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:20]
    (output / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert run(*arguments(folder, output, "--resume")) == 0
    kept = (output / "metrics.jsonl").read_text().splitlines()
    assert kept == lines[:3] + lines[4:]
    assert "metrics.jsonl: what is in line 4 cannot be read and is left out." in capsys.readouterr().err
    assert contents(output).keys() == contents(whole_run).keys()


def test_a_pipe_in_the_place_of_a_checkpoint_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="is not a training checkpoint .* is neither a file nor a folder"):
        load_checkpoint(tmp_path / "checkpoint.pt", {}, 6)


def test_a_pipe_in_the_place_of_the_metrics_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="is no metrics file, it is not a file at all"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("replaced", [True, False])
def test_a_folder_that_is_taken_away_while_the_run_writes(folder, tmp_path, capsys, monkeypatch, replaced):
    """Another run may stand in its place by then, and gets no files of this one."""
    output, real = tmp_path / "out", program.train

    def train(*args, **kwargs):
        for step, report in enumerate(real(*args, **kwargs)):
            if step == 0:
                output.rename(tmp_path / "moved")
                if replaced:
                    output.mkdir()
            yield report

    monkeypatch.setattr(program, "train", train)
    assert run(*arguments(folder, output, "--epochs", "1")) == 2
    said = "another folder has its name now" if replaced else "cannot write"
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not output.exists() or not list(output.iterdir())
    assert (tmp_path / "moved" / "checkpoint.pt").exists()


def test_a_new_run_that_is_killed_at_once_leaves_nothing_of_the_old_one(folder, tmp_path, monkeypatch):
    """--overwrite, then kill -9 right behind the first checkpoint: --resume removes what the new run would have."""
    output = tmp_path / "out"
    assert run(*arguments(folder, output), "--keep-best") == 0

    class Killed(BaseException):
        pass

    def killed(*args):
        save_checkpoint(*args)
        raise Killed

    words = arguments(folder, output, "--base-lr", "0.25")
    with monkeypatch.context() as patched:
        patched.setattr(run_output, "save_checkpoint", killed)
        with pytest.raises(Killed):
            run(*words, "--overwrite")
    assert (output / "best.safetensors").exists()
    assert run(*words, "--resume") == 0
    assert not (output / "best.safetensors").exists()
