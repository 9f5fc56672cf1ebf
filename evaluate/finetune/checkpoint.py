"""A transformers checkpoint by its folder: the model with a task's head, and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from ..shared import UserError, is_out_of_memory

# transformers makes an empty tokenizer, without a word, where none of these is there
_VOCABULARIES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "hidden_dropout", "resid_pdrop",
    "embd_pdrop", "attn_pdrop", "drop_path_rate", "dropout",
)  # fmt: skip


def load_model(auto: Any, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model of this auto class, with dropout off. Weights that the checkpoint lacks are drawn from torch's generator.

    Raises:
        UserError: no checkpoint there, or one that this class cannot load.
    """
    _check(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        for name in _DROPOUTS:
            if isinstance(getattr(config, name, None), float):
                setattr(config, name, 0.0)
        return auto.from_pretrained(folder, config=config, dtype=dtype, ignore_mismatched_sizes=True).eval()
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{folder} cannot be loaded as {auto.__name__}: {_first_line(error)}.") from error


def load_tokenizer(folder: Path, **options: Any) -> Any:
    """The fast tokenizer of a checkpoint. Raises UserError where there is none."""
    _check(folder)
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise UserError(f"{folder} has no tokenizer: none of {', '.join(_VOCABULARIES)} is there.")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, use_fast=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{folder} has no tokenizer that loads: {_first_line(error)}.") from error
    if not tokenizer.is_fast:
        raise UserError(
            f"{folder} needs a tokenizer.json: only fast tokenizers say where a token stands in the text."
        )
    return tokenizer


def call(model: Any, inputs: Mapping[str, Any]) -> Any:
    """The model's outputs; tensors are brought to its device first."""
    device = getattr(model, "device", torch.device("cpu"))
    return model(**{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()})


def _check(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not the folder of a checkpoint: there is no config.json.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def quiet() -> None:
    """transformers says at length which weights of a head are new."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
