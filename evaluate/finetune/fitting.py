"""Training of a few parameters of a frozen model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..shared import UserError

WARM_UP = 0.1  # share of the steps


def fit(
    groups: list[dict[str, Any]],
    loss: Callable[[Tensor], Tensor],
    count: int,
    batch_size: int,
    steps: int,
    seed: int,
) -> None:
    """AdamW on parameter groups: linear warm-up to each group's `lr`, then half a cosine; gradients clipped at norm 1.

    Args:
        loss: of these rows of the training data, int64 [batch_size]. count: how many rows there are; they are drawn
            without repetition within an epoch, in an order that depends on the seed alone.

    Raises:
        UserError: the loss is not a number any more.
    """
    optimizer = torch.optim.AdamW(groups)
    shares = [
        min((step + 1) / max(1, round(WARM_UP * steps)), 0.5 * (1 + math.cos(math.pi * step / steps)))
        for step in range(steps)
    ]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shares[min(step, steps - 1)])
    parameters = [parameter for group in groups for parameter in group["params"]]
    draw = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        while len(order) < min(batch_size, count):
            order = torch.cat([order, torch.randperm(count, generator=draw)])
        rows, order = order[:batch_size], order[batch_size:]
        optimizer.zero_grad()
        found = loss(rows)
        if not found.isfinite():
            raise UserError(f"the loss is {found.item()} at step {step}: lower the learning rates.")
        found.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
