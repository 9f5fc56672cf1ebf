"""The training program: what a run leaves, and that one that was interrupted goes on as if it had not been."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tiny_runs import CONFIG, arguments, contents, losses_of, power_cut, run

from model import generate, train_loop, train_options
from model import train as program
from model.adapter_files import load_adapter
from model.errors import UserError
from model.loading import load_base
from model.resume import Checkpoint
from model.run_folder import MetricsLog, read_metrics

FILES = {"checkpoint.pt", "metrics.jsonl", "loss.png", "layers.png", "config.yaml"}


def test_a_run_leaves_its_files(folder, whole_run):
    assert set(contents(whole_run)) == {"adapter.safetensors", *FILES}
    entries = read_metrics(whole_run / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(6))
    assert [entry["step"] for entry in entries if "val_loss" in entry] == [0, 2, 4, 6]
    assert (whole_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    base = load_base(folder / "base")
    adapter = load_adapter(whole_run / "adapter.safetensors", base.config)
    assert adapter.layers == (2, 3) and adapter.gates.abs().min() > 0


@pytest.mark.parametrize("after", [0, 2, 5])
def test_a_resumed_run_is_the_same_run(folder, whole_run, tmp_path, monkeypatch, after):
    """Ctrl-C after some steps, then --resume: each loss and the adapter are as without it, bit for bit."""
    real, done = train_loop.batch_loss, []

    def pressing(*args):
        done.append(None)
        if len(done) == after + 1 + validations:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    validations = 1 + after // 2  # each one pass
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(train_loop, "batch_loss", pressing)
        assert run(*arguments(folder, output)) == 130
    assert len(losses_of(output)) == after + validations < len(losses_of(whole_run))
    assert run(*arguments(folder, output, "--resume")) == 0
    assert losses_of(output) == losses_of(whole_run)
    resumed, whole = (load_adapter(path / "adapter.safetensors", CONFIG) for path in (output, whole_run))
    assert torch.equal(resumed.prompts, whole.prompts) and torch.equal(resumed.gates, whole.gates)


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_ctrl_c_in_a_validation_ends_it_and_resuming_makes_up_for_it(
    folder, whole_run, tmp_path, monkeypatch, epoch
):
    real, validations = program.evaluate, []

    def pressing(*args):
        validations.append(None)
        if len(validations) == epoch + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(program, "evaluate", pressing)
        assert run(*arguments(folder, output)) == 130
    assert len(validations) == epoch + 1
    assert losses_of(output) == losses_of(whole_run)[: 3 * epoch]
    assert run(*arguments(folder, output, "--resume")) == 0
    assert losses_of(output) == losses_of(whole_run)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_crashes_before_its_first_step_resumes(
    folder, whole_run, tmp_path, monkeypatch, overwrite
):
    """Also where --overwrite replaces a finished run: the old one is never gone on with."""
    output = tmp_path / "out"
    if overwrite:
        assert run(*arguments(folder, output, "--epochs", "1", "--seed", "5")) == 0

    def crash(*args):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="power cut"):
        patched.setattr(train_loop, "batch_loss", crash)
        program.main(arguments(folder, output, *["--overwrite"] * overwrite))
    assert torch.load(output / "checkpoint.pt", weights_only=True)["step"] == 0
    assert not (output / "adapter.safetensors").exists()
    assert run(*arguments(folder, output, "--resume")) == 0
    assert losses_of(output) == losses_of(whole_run)


def test_resume_after_a_crash_takes_the_last_checkpoint(folder, whole_run, tmp_path):
    output = tmp_path / "out"
    with power_cut(save=5):
        program.main(arguments(folder, output, "--save-every", "1"))
    with open(output / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # a line the crash cut short
    assert run(*arguments(folder, output, "--resume")) == 0
    assert losses_of(output) == losses_of(whole_run)


def test_the_official_format(folder, whole_run, tmp_path):
    output = tmp_path / "out"
    assert run(*arguments(folder, output, "--format", "official-v1")) == 0
    ours = load_adapter(whole_run / "adapter.safetensors", CONFIG)
    official = load_adapter(output / "adapter.pth", CONFIG, prompt_length=3)
    assert torch.equal(ours.prompts, official.prompts) and torch.equal(ours.gates, official.gates)
    ask = ["--base", str(folder / "base"), "--prompt", "Say", "--max-new-tokens", "1"]
    ask += ["--adapter", str(output / "adapter.pth"), "--prompt-length"]
    generate.main([*ask, "3", "--gate-activation", "identity"])
    with pytest.raises(UserError, match="is not a whole number of at most 4 layers of 5 prompts"):
        generate.main([*ask, "5"])


@pytest.mark.parametrize("stopped", [False, True])
def test_resuming_with_another_format_leaves_one_adapter_in_it(folder, whole_run, tmp_path, stopped):
    """Of a finished run, and of one that an epoch's end follows."""
    output = tmp_path / "out"
    shutil.copytree(whole_run, output)
    if stopped:
        first = run_until(folder, tmp_path / "first", steps=3)
        shutil.rmtree(output)
        first.rename(output)
        assert (output / "adapter.safetensors").exists()
    assert run(*arguments(folder, output, "--format", "official-v1", "--resume")) == 0
    assert set(contents(output)) == {"adapter.pth", *FILES}
    ours = load_adapter(whole_run / "adapter.safetensors", CONFIG)
    official = load_adapter(output / "adapter.pth", CONFIG, prompt_length=3)
    assert torch.equal(ours.prompts, official.prompts) and torch.equal(ours.gates, official.gates)
    assert run(*arguments(folder, output, "--resume")) == 0
    assert (output / "adapter.safetensors").read_bytes() == (whole_run / "adapter.safetensors").read_bytes()
    assert not (output / "adapter.pth").exists()


def run_until(folder: Path, output: Path, steps: int) -> Path:
    """A run that Ctrl-C ends after so many steps."""
    with pytest.MonkeyPatch.context() as patched:
        real = MetricsLog.write

        def pressing(log, **entry):
            real(log, **entry)
            if "loss" in entry and entry["step"] == steps - 1:
                os.kill(os.getpid(), signal.SIGINT)

        patched.setattr(MetricsLog, "write", pressing)
        assert run(*arguments(folder, output)) == 130
    return output


def test_padded_and_packed_runs_agree(folder, whole_run, tmp_path):
    output = tmp_path / "out"
    assert run(*arguments(folder, output, "--padded")) == 0
    for padded, packed in zip(losses_of(output), losses_of(whole_run), strict=True):
        assert [value or 0.0 for value in padded] == pytest.approx(
            [value or 0.0 for value in packed], rel=1e-3
        )


def test_several_data_files_count_all(folder, whole_run, tmp_path):
    lines = (folder / "data.jsonl").read_text().split("\n")
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("\n".join(lines[:4]))
    second.write_text("\n".join(lines[4:]))
    words = arguments(folder, tmp_path / "out", "--data", str(first)) + ["--data", str(second)]
    assert run(*words) == 0
    assert losses_of(tmp_path / "out") == losses_of(whole_run)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_both_programs_take_the_same_device_unless_told(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    base = ["--base", "base"]
    assert (
        train_options.training_parser().parse_args([*base, "--data", "data", "--out", "out"]).device == device
    )
    assert generate._parser().parse_args([*base, "--prompt", "Say"]).device == device


def test_a_checkpoint_holds_tensors_and_plain_values_only(whole_run):
    state = torch.load(whole_run / "checkpoint.pt", weights_only=True)
    assert state.keys() == {*Checkpoint._fields, "digest"}
