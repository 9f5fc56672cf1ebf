"""The state of a training run, as it is written to go on from exactly there."""

from __future__ import annotations

import hashlib
import io
import pickle
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
    rng: torch.Tensor
    run: dict[
        str, Any
    ]  # what must be the same in the run that goes on: the recipe, and the prints of base and data


def save_checkpoint(
    path: str | Path, step: int, adapter: nn.Module, optimizer: torch.optim.Optimizer, run: dict[str, Any]
) -> None:
    """Writes the state after `step` steps; a failure leaves the checkpoint before it."""
    state = Checkpoint(step, adapter.state_dict(), optimizer.state_dict(), torch.get_rng_state(), run)
    buffer = io.BytesIO()
    torch.save(state._asdict(), buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path: str | Path, run: dict[str, Any]) -> Checkpoint:
    """What save_checkpoint wrote. Raises UserError if it is missing, damaged, or of a run that differs from `run`."""
    try:
        state = Checkpoint(**torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UserError(f"there is no {path} to resume from: start without --resume.") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, TypeError) as error:
        raise UserError(
            f"{path} is not a training checkpoint or is damaged ({str(error).splitlines()[0]})."
        ) from None
    for name, value in run.items():
        if state.run.get(name) != value:
            raise UserError(
                f"{path} was written with {name} = {state.run.get(name)}, this run has {value}: "
                "resume with what it was started with, or start anew in another folder."
            )
    return state


def base_print(base: Llama) -> str:
    """A short print of the base model: its configuration, and a few weights from its beginning and its end."""
    digest = hashlib.sha256(repr(base.config).encode())
    for weight in (
        base.embed_tokens.weight[:64],
        base.layers[-1].self_attn.k_proj.weight[:8],
        base.norm.weight,
    ):
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def data_print(samples: Sequence[Sample]) -> str:
    """A short print of the samples, as the tokenizer made them."""
    return hashlib.sha256(repr([tuple(sample) for sample in samples]).encode()).hexdigest()[:16]
