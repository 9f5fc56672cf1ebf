"""Gradient checkpointing computes layers again in backward: in the blocks that they were first computed in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .scope import blocks_here, standing_in

_CHECKPOINT = (
    "_gradient_checkpointing_func"  # transformers' name for the function that each layer checkpoints by
)


def remember_blocks(model: nn.Module) -> None:
    """From now on, what the model checkpoints is computed again in the blocks of the first time, ended or not.

    Called where a block begins, since a model without any has nothing to remember.
    """
    for module in model.modules():
        checkpoint = module.__dict__.get(_CHECKPOINT)
        if checkpoint is not None and getattr(checkpoint, "func", None) is not _checkpointed:
            module.__dict__[_CHECKPOINT] = partial(_checkpointed, checkpoint)


def forget_blocks(model: nn.Module) -> None:
    """Undoes `remember_blocks`."""
    for module in model.modules():
        checkpoint = module.__dict__.get(_CHECKPOINT)
        if getattr(checkpoint, "func", None) is _checkpointed:
            module.__dict__[_CHECKPOINT] = checkpoint.args[0]  # type: ignore[union-attr]


def _checkpointed(
    checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, **kwargs)
    blocks = blocks_here()

    def computed(*inputs: Any, **options: Any) -> Any:
        with standing_in(blocks):
            return function(*inputs, **options)

    return checkpoint(computed, *args, **kwargs)
