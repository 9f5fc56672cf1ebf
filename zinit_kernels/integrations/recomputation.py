"""Gradient checkpointing computes layers again in backward: in the blocks that they were first computed in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from .scope import blocks_here, standing_in

# The attributes that hold the function which a module checkpoints by: in transformers' layers, and in the wrapper of
# torch.distributed, which FSDP's activation checkpointing puts around layers.
_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")


def remember_blocks(model: nn.Module) -> None:
    """From now on, what the model checkpoints is computed again in the blocks of the first time, ended or not.

    Called where a block begins, since a model without any has nothing to remember.
    """
    for module, name, checkpoint in _checkpoints(model):
        if getattr(checkpoint, "func", None) is not _checkpointed:
            module.__dict__[name] = partial(_checkpointed, checkpoint)


def forget_blocks(model: nn.Module) -> None:
    """Undoes `remember_blocks`."""
    for module, name, checkpoint in _checkpoints(model):
        if getattr(checkpoint, "func", None) is _checkpointed:
            module.__dict__[name] = checkpoint.args[0]


def _checkpoints(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for module in model.modules():
        for name in _CHECKPOINTS:
            if (checkpoint := module.__dict__.get(name)) is not None:
                yield module, name, checkpoint


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
