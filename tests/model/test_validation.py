"""What watches a run: the best adapter, early stopping, previews, trackers, forecasts, and how layers are computed."""

from __future__ import annotations

import json
import shutil
import sys
import types

import pytest
import torch
from full_disk import files_of_at_most
from tiny_runs import CONFIG, arguments, losses_of, make_base, run
from torch import nn

from model import forecast as forecasts
from model import trackers, train_loop
from model import train as program
from model.adapter import LlamaAdapter
from model.adapter_files import load_adapter
from model.data import Sample
from model.errors import UserError
from model.mixture import Mixture
from model.recipe import Recipe
from model.run_folder import append, read_metrics
from model.validation import Best, drop_later


def test_best_counts_validations_without_progress():
    best = Best(
        [{"step": 0, "val_loss": 3.0}, {"step": 1, "loss": 1.0}, {"step": 2, "val_loss": 3.5}], patience=2
    )
    assert (best.loss, best.since, best.exhausted) == (3.0, 1, False)
    assert not best.improves(3.0) and best.exhausted
    assert best.improves(2.0) and not best.exhausted
    assert not best.improves(float("nan"))


def scripted(monkeypatch, losses):
    """Validations give these losses, one after the other."""
    left = list(losses)
    monkeypatch.setattr(program, "evaluate", lambda *args: left.pop(0))


def test_the_best_adapter_is_kept_and_a_run_without_progress_ends(
    folder, whole_run, tmp_path, monkeypatch, capsys
):
    scripted(monkeypatch, [5.0, 4.0, 4.5, 4.2, 4.1])
    output = tmp_path / "out"
    words = arguments(folder, output, "--validate-every", "1", "--patience", "2")
    assert run(*words) == 0
    entries = read_metrics(output / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "val_loss" in entry] == [0, 1, 2, 3]
    assert "Stopped after step 3 of 6: 2 validations brought nothing better." in capsys.readouterr().err
    best, last = (load_adapter(output / f"{name}.safetensors", CONFIG) for name in ("best", "adapter"))
    assert not torch.equal(best.prompts, last.prompts)
    assert torch.load(output / "checkpoint.pt", weights_only=True)["step"] == 3
    # one step, and with the loss of the run without validations between
    assert [entry["loss"] for entry in entries if "loss" in entry] == [
        entry["loss"] for entry in read_metrics(whole_run / "metrics.jsonl") if "loss" in entry
    ][:3]
    # a run that has ended does not begin again
    assert run(*words, "--resume") == 0
    assert "Stopped after step 3 of 6" in capsys.readouterr().err


def test_a_best_adapter_that_was_not_kept_is_told(folder, whole_run, tmp_path, capsys):
    """--keep-best on a run that began without it."""
    output = tmp_path / "out"
    shutil.copytree(whole_run, output)
    assert run(*arguments(folder, output, "--resume"), "--keep-best") == 0
    lowest = min(entry["val_loss"] for entry in read_metrics(output / "metrics.jsonl") if "val_loss" in entry)
    said = f"warning: the adapter with the lowest validation loss until now, {lowest:.4f}, was not kept: "
    assert said in capsys.readouterr().err and not (output / "best.safetensors").exists()


def test_previews_are_written_and_change_nothing(folder, whole_run, tmp_path):
    output = tmp_path / "out"
    assert run(*arguments(folder, output, "--sample-every", "2")) == 0
    lines = [json.loads(line) for line in (output / "previews.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2, 4, 4, 6, 6]
    assert lines[0].keys() == {"step", "prompt", "answer"} and "### Instruction:\nSay" in lines[0]["prompt"]
    assert losses_of(output) == losses_of(whole_run)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Say it.\n" + "long " * 200)
    words = arguments(folder, output, "--sample-every", "6", "--sample-prompts", str(prompts), "--overwrite")
    assert run(*words) == 0
    (line,) = (output / "previews.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"].endswith("Say it.")


LINES = b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


@pytest.mark.parametrize("tail", [b'{"step": 2, "answer": "\xc3', b'{"step"', b"\xff\n"])
def test_previews_that_a_crash_cut_short_are_dropped(tmp_path, tail):
    """Also where it cut a character."""
    path = tmp_path / "previews.jsonl"
    path.write_bytes(LINES + tail)
    drop_later(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_previews_that_cannot_be_read_are_named(tmp_path, capsys):
    """A broken line in the middle went without a word."""
    path = tmp_path / "previews.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step: 1}\n[1]\n' + b"[" * 5000 + b'\n{"step": 2}\n')
    drop_later(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    said = f"warning: {path}: what is in line 2, 3, 4 cannot be read and is left out.\n"
    assert capsys.readouterr().err == said


def test_previews_survive_a_full_disk(tmp_path):
    path = tmp_path / "previews.jsonl"
    path.write_bytes(LINES)
    with files_of_at_most(5), pytest.raises(UserError, match="previews.jsonl: File too large; .*unchanged"):
        drop_later(path, 2)
    assert path.read_bytes() == LINES and list(tmp_path.iterdir()) == [path]
    too_large = pytest.raises(OSError, match="File too large")
    with files_of_at_most(len(LINES) + 5), open(path, "ab", buffering=0) as file, too_large:
        append(file, LINES)
    assert path.read_bytes() == LINES


def test_metrics_have_each_layers_gradient_and_gate(whole_run):
    entries = [entry for entry in read_metrics(whole_run / "metrics.jsonl") if "loss" in entry]
    adapter = load_adapter(whole_run / "adapter.safetensors", CONFIG)
    assert entries[-1]["layer_gates"] == pytest.approx(adapter.gates.tanh().abs().mean(1).tolist())
    for entry in entries:
        norms = torch.tensor(entry["layer_grad_norms"])
        assert len(norms) == 2 and norms.norm().item() == pytest.approx(entry["grad_norm"])
    assert (whole_run / "layers.png").read_bytes().startswith(b"\x89PNG")


def samples():
    generator = torch.Generator().manual_seed(1)
    return [
        Sample(torch.randint(3, 131, (length,), generator=generator).tolist(), 3)
        for length in (40, 30, 20, 50)
    ]


def step_of(base, **options):
    torch.manual_seed(3)
    adapter = LlamaAdapter(base.config)
    nn.init.normal_(adapter.gates)
    optimizer = train_loop.make_optimizer(adapter, Recipe(**options))
    (report,) = train_loop.train(base, adapter, samples(), Recipe(epochs=1, **options), optimizer)
    return report, adapter


def test_recomputed_activations_give_the_same_step_from_fewer_bytes():
    base = make_base()
    reports, kept = [], []
    for recompute in (False, True):
        base.recompute = recompute
        reports.append(step_of(base))
        found = forecasts.forecast(base, LlamaAdapter(CONFIG), samples(), Mixture.of([4]), Recipe())
        kept.append(found.activations)
    assert reports[0][0]._replace(seconds=0) == reports[1][0]._replace(seconds=0)
    assert torch.equal(reports[0][1].prompts, reports[1][1].prompts)
    assert kept[1] < kept[0] / 2


def test_compiled_layers_give_the_same_step(monkeypatch):
    """Through TorchDynamo, without the compiler behind it, which takes a minute."""
    real = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, **options: real(module, backend="eager", **options)
    )
    plain, compiled = step_of(make_base()), step_of(make_base().compile_layers())
    assert compiled[0].loss == pytest.approx(plain[0].loss, rel=1e-6)
    torch.testing.assert_close(compiled[1].prompts, plain[1].prompts)


def test_a_forecast_counts_what_is_there():
    base, adapter = make_base(), LlamaAdapter(CONFIG)
    found = forecasts.forecast(base, adapter, samples(), Mixture.of([4]), Recipe(epochs=3, batch_size=2))
    assert found.base_parameters == sum(p.numel() for p in base.parameters())
    assert found.trained_parameters == adapter.num_parameters
    assert found.training_state == 16 * adapter.num_parameters and found.weights == 4 * found.base_parameters
    assert found.num_steps == 6 and found.seconds > 0
    assert all(parameter.grad is None for parameter in adapter.parameters())
    assert "that are trained" in str(found) and "for 6 steps" in str(found)


class Recorder:
    """Stands in for wandb and for mlflow: what they were told."""

    def __init__(self):
        self.told = []

    def init(self, **options):
        self.told.append(("init", options["id"], options["resume"]))
        return types.SimpleNamespace(log=lambda values: self.told.append(values), finish=lambda: None)

    def start_run(self, run_id, run_name):
        self.told.append(("start", run_id, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

    def log_params(self, params):
        self.told.append(("params", params["epochs"]))

    def log_metrics(self, values, step):
        self.told.append((step, values))

    def end_run(self):
        self.told.append("end")


def test_trackers_are_told_every_entry_and_go_on_with_the_same_run(folder, tmp_path, monkeypatch):
    wandb, mlflow = Recorder(), Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    words = arguments(folder, tmp_path / "out", "--log", "wandb,mlflow")
    assert run(*words) == run(*words, "--resume") == 0
    (first, *_, second) = [told for told in wandb.told if isinstance(told, tuple)]
    assert first == second and first[2] == "allow"
    steps = [told["trained_steps"] for told in wandb.told if isinstance(told, dict) and "loss" in told]
    assert steps == list(range(6))
    assert [told for told in mlflow.told if told[0] in ("start", "params")] == [
        ("start", None, "out"), ("params", "3"), ("start", "abc", None),
    ]  # fmt: skip
    step, values = mlflow.told[3]
    assert step == 0 and values["layer_gates/00"] == 0.0 and "layer_grad_norms/01" in values
    assert mlflow.told[-1] == "end"


def test_a_tracker_that_fails_ends_no_training(folder, whole_run, tmp_path, monkeypatch, capsys):
    mlflow = Recorder()
    mlflow.log_metrics = lambda values, step: 1 / 0
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    assert run(*arguments(folder, tmp_path / "out", "--log", "mlflow")) == 0
    assert (
        capsys.readouterr().err.count("--log mlflow failed and is left out from here on (division by zero)")
        == 1
    )
    assert losses_of(tmp_path / "out") == losses_of(whole_run)


def test_tensorboard_has_the_losses(folder, whole_run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(*arguments(folder, tmp_path / "out", "--log", "tensorboard")) == 0
    found = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload().Scalars("loss")
    expected = [row[1] for row in losses_of(whole_run) if row[1] is not None]
    assert [event.value for event in found] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_library_that_is_missing_is_named(name, monkeypatch):
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UserError, match=f"--log {name} needs a library that is not installed: pip install {name}"
    ):
        trackers.check_trackers(name)


BAD = {
    ("--log", "comet"): "--log comet: the trackers are tensorboard, wandb, mlflow",
    ("--patience", "0"): "--patience must be at least 1, got 0.",
    ("--validate-every", "-1"): "--validate-every must be at least 1, got -1.",
    ("--validate-every", "2", "--validation", "0"): "--validate-every has no effect with --validation 0",
    ("--sample-prompts", "a.txt"): "--sample-prompts has no effect without --sample-every",
}


@pytest.mark.parametrize("words", BAD)
def test_options_without_an_effect_are_refused(folder, tmp_path, capsys, words):
    assert run(*arguments(folder, tmp_path / "out", *words)) == 2
    assert BAD[words] in capsys.readouterr().err and not (tmp_path / "out").exists()
