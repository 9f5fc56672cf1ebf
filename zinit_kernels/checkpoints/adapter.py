"""The neutral form of an adapter, and what the formats' readers and writers share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A file is not an adapter, or not one for this base. The message is one sentence."""


@dataclass(frozen=True)
class AdapterCheckpoint:
    """What every format says about an adapter."""

    prompts: Tensor  # [L, P, C], lowest layer first
    gates: Tensor  # [L, 1 or Hq], raw
    gate_activation: str  # tanh or identity
    layers: tuple[int, ...]  # the base's layers that the L rows belong to
    num_layers: int  # of the base; formats that do not say adapt the topmost layers
    num_heads: int | None = None  # of the base; None where the format does not say
    metadata: dict[str, str] = field(default_factory=dict)
    # rows of litgpt's fused qkv projection that make prompt keys and values: "interleaved" are those that litgpt from
    # 0.5.5 on takes, which are not the layer's keys and values unless it is multi-query
    layout: str = "blocked"
    extras: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # what a format holds beside, under its own names
    extras_format: str = ""  # whose names

    @property
    def hidden_size(self) -> int:
        return self.prompts.shape[2]

    def check_base(self, hidden_size: int, num_layers: int, num_heads: int) -> AdapterCheckpoint:
        """Itself if prompts and gates alone adapt a base of these sizes; CheckpointError that says why not."""
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
        """What prompts, gates and activation do not say; '' where they are the whole adapter."""
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
    """Raw gates whose tanh is what `activation` made of the given ones."""
    if activation == "tanh":
        return gates
    if bool((gates.abs() >= 1).any()):
        raise CheckpointError(
            f"{format} applies tanh to its gates, and this adapter's identity gates reach "
            f"{float(gates.abs().max()):.3g}, which no tanh gives: keep it in the zinit format"
        )
    return gates.double().atanh().to(gates.dtype)


def as_identity(gates: Tensor, activation: str) -> Tensor:
    return gates.double().tanh().to(gates.dtype) if activation == "tanh" else gates


def check_topmost(checkpoint: AdapterCheckpoint, format: str) -> None:
    if not checkpoint.are_topmost:
        raise CheckpointError(
            f"{format} adapts the topmost layers, this adapter has layers {list(checkpoint.layers)} "
            f"of {checkpoint.num_layers}"
        )


def lose(what: str, format: str, allow_loss: bool) -> None:
    if what and not allow_loss:
        raise CheckpointError(
            f"{format} has no room for {what}, which would be lost; --allow-loss (allow_loss=True) writes the rest"
        )


def check_keys(
    path: object, found: Iterable[str], expected: Iterable[str], ignored: Iterable[str] = ()
) -> None:
    """Strict keys: CheckpointError with the difference."""
    missing, unknown = set(expected) - set(found), set(found) - set(expected) - set(ignored)
    if missing or unknown:
        words = [
            f"{what} {some(names)}"
            for what, names in (("lacks", missing), ("holds unknown", unknown))
            if names
        ]
        raise CheckpointError(f"{path} {' and '.join(words)}")


def check_numbers(path: object, tensors: Iterable[Tensor]) -> None:
    if not all(tensor.is_floating_point() and bool(tensor.isfinite().all()) for tensor in tensors):
        raise CheckpointError(f"{path}: prompts and gates must be finite floating-point numbers")


def some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "") or "nothing"


def stack_rows(path: object, what: str, rows: list[Tensor]) -> Tensor:
    """One tensor out of one per layer; CheckpointError where they differ in shape."""
    if len({row.shape for row in rows}) != 1:
        raise CheckpointError(f"{path}: the layers' {what} differ in shape")
    return torch.stack(rows)
