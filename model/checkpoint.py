"""The state of a training run, as it is written to go on from exactly there."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .data import Sample
from .errors import UserError
from .llama import Llama
from .storage import write_file


class Checkpoint(NamedTuple):
    """All that a run's next step depends on; the order of the data follows from the recipe's seed and the step."""

    step: int  # optimizer steps done
    adapter: dict[str, Any]
    optimizer: dict[str, Any]
    # what must be the same in the run that goes on: the recipe, the prints of base and data
    run: dict[str, Any]


def save_checkpoint(
    path: str | Path, step: int, adapter: nn.Module, optimizer: torch.optim.Optimizer, run: dict[str, Any]
) -> None:
    """Writes the state after `step` steps; a failure leaves the checkpoint before it."""
    state = Checkpoint(step, adapter.state_dict(), optimizer.state_dict(), run)
    buffer = io.BytesIO()
    torch.save(state._asdict(), buffer)
    write_file(path, buffer.getvalue())


def refuse_missing(path: Path) -> None:
    """Raises UserError if there is no checkpoint."""
    if not path.exists():
        raise UserError(
            f"there is no {path} to resume from: start without --resume, and with --overwrite if the "
            "folder is not empty."
        )


def load_checkpoint(path: str | Path, run: dict[str, Any]) -> Checkpoint:
    """What save_checkpoint wrote. Raises UserError if it is damaged or of a run that differs from `run`."""
    try:
        state = Checkpoint(**torch.load(path, map_location="cpu", weights_only=True))
        if not isinstance(state.run, dict) or not isinstance(state.step, int) or state.step < 0:
            raise TypeError("its step or its run is none")
    except Exception as error:  # in a damaged pickle whatever the next instruction stumbles over
        raise _damaged(path, error) from None
    for name, value in run.items():
        if state.run.get(name) != value:
            raise UserError(
                f"{path} was written with {name} = {state.run.get(name)}, this run has {value}: "
                "resume with what it was started with, or start anew in another folder."
            )
    return state


def restore(path: Path, checkpoint: Checkpoint, adapter: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts the checkpoint, which came from `path`, into both. Raises UserError where its tensors do not fit them."""
    try:
        adapter.load_state_dict(checkpoint.adapter)
        optimizer.load_state_dict(checkpoint.optimizer)
        for parameter, state in optimizer.state.items():  # torch looks at no shape here
            for name, value in state.items():
                if torch.is_tensor(value) and value.dim() and value.shape != parameter.shape:
                    raise ValueError(
                        f"{name} of shape {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}"
                    )
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: str | Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split()).rstrip(".")
    return UserError(f"{path} is not a training checkpoint or is damaged ({reason}).")


def base_print(base: Llama, dtype: torch.dtype = torch.float32) -> str:
    """A short print of the base model: its configuration, and the first and last rows of every weight as `dtype`.

    Rounded to bfloat16 it is the same for the base loaded in another dtype.
    """
    digest = hashlib.sha256(repr(base.config).encode())
    for name, weight in base.state_dict().items():
        rows = torch.cat([weight[:2], weight[-2:]]).to(dtype).float().cpu()
        digest.update(name.encode() + rows.numpy().tobytes())
    return digest.hexdigest()[:16]


def data_print(samples: Sequence[Sample]) -> str:
    """A short print of the samples, as the tokenizer made them."""
    return hashlib.sha256(repr([tuple(sample) for sample in samples]).encode()).hexdigest()[:16]
