"""An adapter in memory, whatever its file format, and what the formats' readers and writers share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..console import InputError, shortened, shown

MOST_LAYERS = 9999  # of a base: every format's names have room for four digits
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of prompts and gates


class CheckpointError(InputError, ValueError):
    """A file is not an adapter, or not one for this base. The message is one printable sentence."""


class Told(NamedTuple):
    """What the caller says about a file that may not say it itself: the arguments of `load_adapter`."""

    prompt_length: int | None = None
    layout: str | None = None
    stack: str | None = None
    gate_activation: str | None = None
    num_heads: int | None = None


@dataclass(frozen=True)
class AdapterCheckpoint:
    """What every format says about an adapter."""

    prompts: Tensor  # [L, P, C], lowest layer first
    gates: Tensor  # [L, 1 or Hq], raw
    gate_activation: str  # tanh or identity
    layers: tuple[int, ...]  # the base's layer of each of the L rows, ascending
    num_layers: int  # of the base; a format that does not say adapts the topmost layers
    num_heads: int | None = None  # of the base; None where the format does not say
    metadata: dict[str, str] = field(default_factory=dict)
    # Which rows of litgpt's fused qkv projection make the prompts' keys and values. "interleaved" are the rows that
    # litgpt takes from 0.5.5 on; they are the layer's keys and values only where it is multi-query.
    layout: str = "blocked"
    # the format's other tensors under its own names, and the format's name
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    extras_format: str = ""

    @property
    def hidden_size(self) -> int:
        return self.prompts.shape[2]

    def check_base(self, hidden_size: int, num_layers: int, num_heads: int) -> AdapterCheckpoint:
        """Returns itself if its prompts and gates alone adapt a base of these sizes. CheckpointError says why not."""
        heads = num_heads if self.num_heads is None else self.num_heads
        if (self.hidden_size, self.num_layers, heads) != (hidden_size, num_layers, num_heads):
            raise CheckpointError(
                f"the adapter is for a base of hidden size {self.hidden_size}, {self.num_layers} layers and "
                f"{heads} heads; this base has hidden size {hidden_size}, {num_layers} layers "
                f"and {num_heads} heads"
            )
        if self.gates.shape[1] not in (1, num_heads):
            raise CheckpointError(
                f"the adapter has {self.gates.shape[1]} gates in each layer, this base has {num_heads} heads"
            )
        if lost := self.beside_the_formula():
            raise CheckpointError(f"prompts and gates are not the whole adapter: it also has {lost}")
        return self

    def beside_the_formula(self) -> str:
        """Names what the adapter has beside prompts, gates and activation; '' if it has nothing else."""
        parts = []
        if self.layout != "blocked":
            parts.append("prompts trained through litgpt's interleaved rows of qkv")
        if self.extras:
            parts.append(f"{len(self.extras)} tensors of {self.extras_format} ({some(self.extras)})")
        return " and ".join(parts)

    @property
    def are_topmost(self) -> bool:
        return self.layers == tuple(range(self.num_layers - len(self.layers), self.num_layers))


def as_tanh(gates: Tensor, activation: str, format: str) -> Tensor:
    """Raw gates for a format that applies tanh: their tanh is the given gates after their own `activation`."""
    if activation == "tanh":
        return gates
    if bool((gates.abs() >= 1).any()):
        raise CheckpointError(
            f"{format} applies tanh to its gates, and this adapter's identity gates reach "
            f"{float(gates.abs().max()):.3g}, which no tanh gives: keep it in the zinit format"
        )
    return gates.double().atanh().to(gates.dtype)


def as_identity(gates: Tensor, activation: str) -> Tensor:
    """Gates for a format that applies them as they are."""
    return gates.double().tanh().to(gates.dtype) if activation == "tanh" else gates


def check_topmost(checkpoint: AdapterCheckpoint, format: str) -> None:
    """CheckpointError unless the adapter has the topmost layers, which are all that `format` knows."""
    if not checkpoint.are_topmost:
        raise CheckpointError(
            f"{format} adapts the topmost layers, this adapter has layers {shown(list(checkpoint.layers))} "
            f"of {checkpoint.num_layers}"
        )


def lose(what: str, format: str, allow_loss: bool) -> None:
    """CheckpointError if there is something that `format` cannot hold, unless the caller allows the loss."""
    if what and not allow_loss:
        raise CheckpointError(
            f"{format} has no room for {what}, which would be lost; --allow-loss (allow_loss=True) writes the rest"
        )


def check_keys(
    path: object, found: Iterable[str], expected: Iterable[str], ignored: Iterable[str] = ()
) -> None:
    """CheckpointError unless the names found are the expected ones; it names the difference."""
    missing, unknown = set(expected) - set(found), set(found) - set(expected) - set(ignored)
    if missing or unknown:
        words = [
            f"{what} {some(names)}"
            for what, names in (("lacks", missing), ("holds unknown", unknown))
            if names
        ]
        raise CheckpointError(f"{path} {' and '.join(words)}")


def check_numbers(path: object, tensors: Iterable[Tensor]) -> None:
    """CheckpointError unless all are floating-point numbers that are finite in float32."""
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            known = ", ".join(name_of(dtype) for dtype in DTYPES)
            raise CheckpointError(
                f"{path}: prompts and gates must be finite floating-point numbers ({known}), got "
                f"{name_of(tensor.dtype)}"
            )
        if not bool(tensor.float().isfinite().all()):
            raise CheckpointError(
                f"{path}: prompts and gates must be finite numbers in float32, and some are not"
            )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def some(names: Iterable[str]) -> str:
    """The first three names, and how many more."""
    ordered = sorted(names)
    words = ", ".join(shortened(name) for name in ordered[:3])
    return words + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "") or "nothing"


def stack_rows(path: object, what: str, rows: list[Tensor]) -> Tensor:
    """Stacks one tensor per layer. CheckpointError if they differ in shape or are no numbers of an adapter."""
    if len({row.shape for row in rows}) != 1:
        raise CheckpointError(f"{path}: the layers' {what} differ in shape")
    check_numbers(path, rows)  # some dtypes cannot be stacked
    return torch.stack(rows)
