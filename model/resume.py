"""The state of a training run, as it is written to go on from exactly there."""

from __future__ import annotations

import hashlib
import io
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zinit_kernels import explain
from zinit_kernels.checkpoints.tensor_files import read_torch, regular_file

from .errors import UserError, is_out_of_memory, warn
from .run_folder import write_file

# What a group of AdamW cannot do without; torch adds others in newer versions
_HYPERPARAMETERS = {"params", "lr", "betas", "eps", "weight_decay"}
# of a run that names nothing else
_USUAL = {"attention": "cpu", "compile": False, "processes": 1, "tensor parallel": 1, "sharded": False}
_LATER = {"validation data"}  # checkpoints of before December 2026 do not say
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}


class Checkpoint(NamedTuple):
    """All that a run's next step depends on; the order of the data follows from the recipe's seed and the step.

    In the file it has a digest beside it, so that a damaged file is known whatever bit of it changed.
    """

    step: int  # optimizer steps done
    adapter: dict[str, Any]
    optimizer: dict[str, Any]
    run: dict[str, Any]  # what the run that goes on must share: the recipe, the fingerprints of base and data


def save_checkpoint(
    path: str | Path, step: int, adapter: nn.Module, optimizer: torch.optim.Optimizer, run: dict[str, Any]
) -> None:
    """Writes the state after `step` steps; a failure leaves the checkpoint before it."""
    state = Checkpoint(step, adapter.state_dict(), optimizer.state_dict(), run)._asdict()
    buffer = io.BytesIO()
    torch.save(state | {"digest": _digest(state)}, buffer)
    write_file(path, buffer.getvalue())


def refuse_missing(path: Path) -> None:
    """Raises UserError if there is no checkpoint."""
    if not path.exists():
        raise UserError(
            f"there is no {path} to resume from: start without --resume, and with --overwrite if the "
            "folder is not empty."
        )


def machine(device: torch.device) -> dict[str, Any]:
    """What decides the last digits of a run, beside its recipe: the threads, the chip, torch and the kernels."""
    chip = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cuda":
        chip = torch.cuda.get_device_name(device)
    elif cpuinfo.exists():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if "model name" in line
        ]
        chip = (names or [chip])[0]
    found = {
        "threads": torch.get_num_threads(),
        "chip": chip,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
    }
    if device.type == "cpu":  # an installation without the compiled kernels computes in PyTorch
        row = torch.zeros(1, 1, 1, 8)
        attention = explain(row, row, row, None, None, None).selected
        found |= {} if attention == _USUAL["attention"] else {"attention": attention}
    return found


def load_checkpoint(path: str | Path, run: dict[str, Any], num_steps: int) -> Checkpoint:
    """What save_checkpoint wrote, for a run of `num_steps` steps in all.

    Raises UserError if the file is damaged, or of a run that differs from `run`. What `run` has under "conditions" may
    differ, with a warning: it changes the last digits of the numbers and nothing else.
    """
    try:
        fields = dict(read_torch(regular_file(path)))
        digest = fields.pop("digest", None)  # files of the first version have none
        state = Checkpoint(**fields)
        if digest is not None and digest != _digest(fields):
            raise ValueError("its content does not fit its digest")
        if type(state.step) is not int or state.step < 0:
            raise ValueError(f"step {state.step!r} is no number of steps")
        if not all(isinstance(part, dict) for part in state[1:]):
            raise ValueError("a part of it is no dictionary")
    except Exception as error:  # in a damaged pickle whatever the next instruction stumbles over
        if is_out_of_memory(error):
            raise
        raise _damaged(path, error) from None
    for name, value in run.items():
        is_new = digest is None or name in _LATER
        if name == "conditions" or (is_new and name not in state.run):
            continue
        if state.run.get(name) != value:
            raise UserError(
                f"{path} was written with {name} = {state.run.get(name)}, this run has {value}: "
                "resume with what it was started with, or start anew in another folder."
            )
    if state.step > num_steps:
        raise _damaged(path, ValueError(f"{state.step} steps are done, and the run has {num_steps}"))
    _say_conditions(path, state.run.get("conditions"), run.get("conditions", {}))
    return state


def restore(path: Path, checkpoint: Checkpoint, adapter: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts the checkpoint, which came from `path`, into both. Raises UserError where it does not fit them."""
    try:
        _check_tensors(adapter.state_dict(), checkpoint.adapter)
        _check_optimizer(optimizer, checkpoint)
        adapter.load_state_dict(checkpoint.adapter)
        optimizer.load_state_dict(checkpoint.optimizer)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        raise _damaged(path, error) from None


def _check_tensors(expected: dict[str, Tensor], found: dict[str, Any]) -> None:
    """Raises ValueError unless these are the tensors that are expected, with finite numbers."""
    if expected.keys() != found.keys():
        raise ValueError(f"it has {sorted(map(str, found))} where {sorted(expected)} belong")
    for name, tensor in expected.items():
        other = found[name]
        if not isinstance(other, Tensor) or other.shape != tensor.shape or other.dtype != tensor.dtype:
            shape = tuple(other.shape) if isinstance(other, Tensor) else type(other).__name__
            raise ValueError(f"{name} is {shape} where {tensor.dtype} of {tuple(tensor.shape)} belongs")
        if not other.isfinite().all():
            raise ValueError(f"{name} holds what is no finite number")


def _check_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Raises ValueError unless this is AdamW's state of the optimizer's parameters after the checkpoint's steps."""
    fresh, found = optimizer.state_dict()["param_groups"], checkpoint.optimizer["param_groups"]
    if len(found) != len(fresh):
        raise ValueError(f"its optimizer has {len(found)} groups of parameters, this one {len(fresh)}")
    for ours, theirs in zip(fresh, found, strict=True):
        if missing := _HYPERPARAMETERS - theirs.keys():
            raise ValueError(f"its optimizer lacks {', '.join(sorted(missing))}")
        for name, value in theirs.items():
            if name not in ours or (name != "lr" and value != ours[name]):
                raise ValueError(f"its optimizer has {name} = {value}")
        if not isinstance(theirs["lr"], float) or not 0 <= theirs["lr"] < float("inf"):
            raise ValueError(f"its optimizer has lr = {theirs['lr']}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = checkpoint.optimizer["state"]
    if state.keys() != set(range(len(parameters)) if checkpoint.step else ()):
        raise ValueError(f"its optimizer has a state for {len(state)} parameters of {len(parameters)}")
    for index, values in state.items():
        like = parameters[index].detach()
        _check_tensors(
            {"exp_avg": like, "exp_avg_sq": like}, {k: v for k, v in values.items() if k != "step"}
        )
        if values.keys() != _MOMENTS or float(values["step"]) != checkpoint.step:
            raise ValueError(f"its optimizer did {values.get('step')} steps and its run {checkpoint.step}")
        if values["exp_avg_sq"].min() < 0:
            raise ValueError("its optimizer has a negative mean of squares")


def _say_conditions(path: str | Path, before: Any, now: dict[str, Any]) -> None:
    if not isinstance(before, dict) or before == now:
        return
    # what is usual is not named, and checkpoints from before there was anything else do not name it either
    before, now = ({**_USUAL, **conditions} for conditions in (before, now))
    changed = [name for name in now if before.get(name) != now[name]]
    then, today = (", ".join(f"{name} {values.get(name)}" for name in changed) for values in (before, now))
    warn(
        f"{path} was written with {then}, this run has {today}: its numbers will differ in their last digits from "
        "those of a run without a break."
    )


def _digest(value: Any) -> str:
    """SHA-256 of plain values and tensors, whatever container a file has them in."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            digest.update(f"dict {len(value)}\n".encode())
            for key, item in value.items():
                add(key)
                add(item)
        elif isinstance(value, list | tuple):
            digest.update(f"{type(value).__name__} {len(value)}\n".encode())
            for item in value:
                add(item)
        elif isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif value is None or type(value) in (bool, int, float, str):
            text = value.hex() if isinstance(value, float) else str(value)
            digest.update(f"{type(value).__name__} {len(text)} {text}\n".encode())
        else:
            raise TypeError(f"{type(value).__name__} does not belong into a checkpoint")

    add(value)
    return digest.hexdigest()


def _damaged(path: str | Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split()).rstrip(".")
    return UserError(f"{path} is not a training checkpoint or is damaged ({reason}).")
