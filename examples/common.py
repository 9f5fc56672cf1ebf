"""What the examples share: the way they train, pick settings and print."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

_Trained = TypeVar("_Trained")


def is_quick(description: str | None) -> bool:
    """The command line, which has one option."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps and settings, for a test")
    return parser.parse_args().quick


def fit(groups: list[dict[str, Any]], loss: Callable[[], torch.Tensor], steps: int) -> None:
    """AdamW over parameter groups, each warmed up to its `lr` and cooled down again; `loss` draws its own batch."""
    optimizer = torch.optim.AdamW(groups)
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


def best(trained: Iterable[_Trained], validate: Callable[[_Trained], float]) -> _Trained:
    """The one that does best on the validation split, the first of equals."""
    return max(trained, key=validate)


def head_group(model: Any, learning_rate: float) -> dict[str, Any]:
    """The classifier of a transformers model, to be trained, as a parameter group."""
    model.classifier.requires_grad_(True)
    return {"params": list(model.classifier.parameters()), "lr": learning_rate, "weight_decay": 0.01}


def trained_numbers(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def show(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """A table: the first column is text; whole numbers are counts, fractions are shares, None is left empty."""
    table = Table(title=title)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    for name, *values in rows:
        texts = ("" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.1%}" for v in values)
        table.add_row(name, *texts)
    Console(width=110).print(table)
