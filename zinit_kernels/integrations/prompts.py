"""Prompts on their way into attention: through the layer's own key and value projections, and kept while decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..api import zero_init_attention


class Projection(NamedTuple):
    """How an architecture's attention module turns hidden states into keys and values."""

    key_value: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]  # [..., C] -> two of [..., Hkv * D]
    modules: tuple[str, ...]  # the submodules it calls
    key_norm: str | None = None  # the submodule that normalises every key head


def split_key_value(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return attention.k_proj(hidden), attention.v_proj(hidden)


SPLIT = Projection(split_key_value, ("k_proj", "v_proj"))


class Prompts(NamedTuple):
    """The adapters that one attention call sees."""

    owner: nn.Module  # for whom projected prompts are kept
    prompts: Sequence[Tensor]  # one [1, P, C] per adapter
    gates: Sequence[Tensor]  # one per adapter, 1 or Hq values, raw
    gate_activation: str
    projection: Projection
    rows: Tensor | None = None  # int32 [B]: the adapter of each row, -1 = none

    def gate(self, query: Tensor) -> Tensor:
        """[1 or Hq], or with several adapters [N, Hq]; on the query's device, where not every adapter needs to be."""
        gates = [gate.flatten().to(query.device) for gate in self.gates]
        return gates[0] if len(gates) == 1 else torch.stack([gate.expand(query.shape[1]) for gate in gates])

    def row_index(self, query: Tensor) -> Tensor | None:
        """The adapter of every row; beams and returned sequences of one row follow each other."""
        if self.rows is None:
            return None
        batch, rows = query.shape[0], self.rows.to(query.device)
        if len(rows) == batch:
            return rows
        if batch % len(self.rows):
            raise ValueError(f"{len(self.rows)} adapter names do not go evenly into a batch of {batch} rows")
        return rows.repeat_interleave(batch // len(self.rows))

    def at_rest(self) -> bool:
        """Whether every gate is 0; False where looking would cost a synchronisation or a graph."""
        if torch.compiler.is_compiling() or any(gate.device.type != "cpu" for gate in self.gates):
            return False
        return not any(bool(gate.any()) for gate in self.gates)


class Table(NamedTuple):
    """The adapters as attention takes them."""

    key: Tensor  # [N, P, Hkv, D]
    value: Tensor
    gate: Tensor  # [1 or Hq], or with several adapters [N, Hq]


class _Kept(NamedTuple):
    dtype: torch.dtype
    projection: Projection
    # all the table was made from, with versions and addresses
    sources: tuple[tuple[ref[Tensor], int, int], ...]
    table: Table


_kept_tables: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()
# a fused optimizer, the default of transformers' Trainer, changes parameters and not their versions (torch 2.13)
register_optimizer_step_post_hook(lambda *_: _kept_tables.clear())


def recall(module: nn.Module, prompts: Prompts, query: Tensor, keys: int) -> Table | None:
    """The table of the last call, while one token is decoded against a cache, as the token keys and values are kept.

    Only with gradients off, by the same projection, if every tensor it came from is the same object at the same
    version and address (which `tensor.data = ...` changes), if no optimizer made a step since, and if the projections
    are plain modules (an adapted or hooked one may answer differently by a state that no version shows). Numbers
    overwritten behind PyTorch's back between two tokens, by `tensor.data.mul_` or numpy, are seen from the next call
    of more than one token on.
    """
    if query.shape[2] != 1 or keys == 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    kept = _kept_tables.get(prompts.owner)
    if kept is None or kept.dtype != query.dtype or kept.projection is not prompts.projection:
        return None
    sources = _sources(module, prompts)
    if sources is None or len(sources) != len(kept.sources):
        return None
    for tensor, (was, version, address) in zip(sources, kept.sources, strict=True):
        if was() is not tensor or tensor._version != version or _address(tensor) != address:
            return None
    return kept.table


def tabulate(module: nn.Module, prompts: Prompts, query: Tensor) -> Table:
    """The table by the layer's own projections, kept for `recall`."""
    table = Table(*_project(module, prompts, query), prompts.gate(query))
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return table
    # as the decoding operator takes it: to convert it for every token costs 3 us
    gate = table.gate if table.gate.dtype == torch.float64 else table.gate.float()
    gate = gate.expand(query.shape[1]).contiguous() if gate.numel() == 1 else gate
    table = table._replace(gate=gate)
    sources = _sources(module, prompts)
    if sources is not None and not any(tensor.is_inference() for tensor in sources):  # those have no version
        stamped = tuple((ref(tensor), tensor._version, _address(tensor)) for tensor in sources)
        _kept_tables[prompts.owner] = _Kept(query.dtype, prompts.projection, stamped, table)
    return table


def _address(tensor: Tensor) -> int:
    """A subclass that wraps others (quantised, sharded) has none of its own."""
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else 0


def _sources(module: nn.Module, prompts: Prompts) -> list[Tensor] | None:
    """Every tensor the table depends on, or None where that cannot be told."""
    tensors = [*prompts.prompts, *prompts.gates]
    for name in (*prompts.projection.modules, prompts.projection.key_norm):
        projection = module._modules.get(name) if name else None
        if projection is None:
            continue
        if not _is_plain(type(projection)) or _is_hooked(projection) or projection._modules:
            return None
        tensors += [tensor for tensor in projection._parameters.values() if tensor is not None]
        tensors += [tensor for tensor in projection._buffers.values() if tensor is not None]
    return tensors


def _is_plain(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith(("torch.nn.modules.", "transformers."))


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _project(module: nn.Module, prompts: Prompts, query: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [N, P, Hkv, D]."""
    tables = (prompt.reshape(-1, *prompt.shape[-2:]) for prompt in prompts.prompts)
    # the modules are called, their weights never touched: quantised ones have no weight to multiply with
    hidden = torch.cat([table.to(query.device, query.dtype) for table in tables])
    key, value = prompts.projection.key_value(module, hidden)
    key, value = (t.unflatten(-1, (-1, query.shape[-1])) for t in (key, value))
    if prompts.projection.key_norm is not None:
        key = getattr(module, prompts.projection.key_norm)(key)
    return key, value


def prompt_branch(
    query: Tensor, table: Table, prompts: Prompts, scale: float, softcap: float | None
) -> Tensor:
    """act(gate) * softmax(scale * q pk^T) pv, [B, Hq, T, D]; a soft cap bounds these scores as it does the tokens'."""
    prompt_key, prompt_value = table.key.transpose(1, 2), table.value.transpose(1, 2)
    gate, index = table.gate, prompts.row_index(query)
    if softcap is None:
        no_keys = query.new_empty((query.shape[0], prompt_key.shape[1], 0, query.shape[-1]))
        branch = zero_init_attention(
            query, no_keys, no_keys, prompt_key, prompt_value, gate, scale=scale,
            gate_activation=prompts.gate_activation, prompt_index=index,
        )  # fmt: skip
        return cast(Tensor, branch)
    weight = gate.tanh() if prompts.gate_activation == "tanh" else gate
    weight = weight.reshape(-1, weight.shape[-1], 1, 1)
    if index is not None:
        row = index.clamp(min=0)
        prompt_key, prompt_value = prompt_key[row], prompt_value[row]
        weight = weight[row] * (index >= 0)[:, None, None, None]
    grouped = query.unflatten(1, (prompt_key.shape[1], -1))  # [B, Hkv, Hq / Hkv, T, D]
    scores = (scale * grouped @ prompt_key[:, :, None].mT).float()
    weights = (softcap * (scores / softcap).tanh()).softmax(-1).to(query.dtype)
    return weight.to(query.dtype) * (weights @ prompt_value[:, :, None]).flatten(1, 2)
