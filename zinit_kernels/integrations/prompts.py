"""Prompts on their way into attention: through the layer's own key and value projections, and kept while decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..api import zero_init_attention
from ..projected import KeptProjections, in_transform, sources_of, stamp
from .architectures import Projection


class Prompts(NamedTuple):
    """The adapters that one attention call sees."""

    prompts: Sequence[Tensor]  # one [1, P, C] per adapter
    gates: Sequence[Tensor]  # one per adapter, 1 or Hq values, raw
    gate_activation: str
    projection: Projection
    rows: Tensor | None = None  # int32 [B]: the adapter (or entry of the table) of each row, -1 = none
    # [N, P or 1, C]: what is added to the one adapter's prompts, in per_sample_prompts. With rows the table has its own
    # prompts first, then the N sums; without, N is 1 and the sum is all there is.
    added: Tensor | None = None
    heads: int | None = None  # query heads of the whole layer, where one gate for all of them does not say

    def gate(self, query: Tensor) -> Tensor:
        """[1 or Hq], or with several adapters [N, Hq]; on the query's device, where not every adapter needs to be."""
        heads = query.shape[1]
        gates = [gate.flatten().to(query.device) for gate in self.gates]
        divided = "divided among processes (tensor parallelism) are not supported with zero-init prompts"
        for gate in gates:
            if gate.numel() not in (1, heads):
                raise ValueError(
                    f"the layer has {gate.numel()} gates, and this attention call {heads} heads: heads that are "
                    f"{divided}"
                )
        if self.heads not in (None, heads):
            raise ValueError(
                f"the layer has {self.heads} heads, and this attention call {heads}: heads that are {divided}"
            )
        return gates[0] if len(gates) == 1 else torch.stack([gate.expand(heads) for gate in gates])

    def row_index(self, query: Tensor) -> Tensor | None:
        """The adapter of every row; beams and returned sequences of one row follow each other."""
        if self.rows is None:
            return None
        batch, rows = query.shape[0], self.rows.to(query.device)
        if len(rows) == batch:
            return rows
        if batch % len(self.rows):
            what = "adapter names" if self.added is None else "rows of per_sample_prompts"
            raise ValueError(f"{len(self.rows)} {what} do not go evenly into a batch of {batch} rows")
        return rows.repeat_interleave(batch // len(self.rows))

    def by_row(self, query: Tensor) -> Prompts:
        """The same, with prompts of its own for every row, though some may be equal.

        Where the rows' projections differ: in a call with adapter_names on a base with LoRA.
        """
        rows = self.row_index(query)
        rows = query.new_zeros(query.shape[0], dtype=torch.int32) if rows is None else rows
        tables = torch.cat([table.to(query.device) for table in self.tables(query.device)])
        gates = self.gates if len(self.gates) == 1 else [self.gates[max(row, 0)] for row in rows.tolist()]
        own = torch.arange(len(rows), dtype=torch.int32, device=query.device).masked_fill(rows < 0, -1)
        return self._replace(prompts=(tables[rows.clamp(min=0)],), gates=gates, rows=own, added=None)

    def tables(self, device: torch.device) -> list[Tensor]:
        """The prompts [., P, C] that the rows choose from, one after the other."""
        tables = [prompt.reshape(-1, *prompt.shape[-2:]) for prompt in self.prompts]
        if self.added is None:
            return tables
        own = tables[0].to(device)
        sums = own + self.added.to(device, own.dtype)
        return [sums] if self.rows is None else [own, sums]

    def at_rest(self) -> bool:
        """Whether every gate is 0; False where looking would cost a synchronisation or a graph, or is not possible."""
        if torch.compiler.is_compiling() or in_transform():
            return False
        if any(gate.device.type != "cpu" for gate in self.gates):
            return False
        return not any(bool(gate.any()) for gate in self.gates)


class Table(NamedTuple):
    """The adapters as attention takes them."""

    key: Tensor  # [N, P, Hkv, D]
    value: Tensor
    gate: Tensor  # [1 or Hq], or with several adapters [N, Hq]


_kept_tables: KeptProjections[Table] = KeptProjections()  # by attention module


def recall(module: nn.Module, prompts: Prompts, query: Tensor, keys: int) -> Table | None:
    """The table of the module's last call, while one token is decoded against a cache; None if it may be outdated.

    Numbers that were overwritten behind PyTorch's back between two tokens, by `tensor.data.mul_` or numpy, are seen
    from the next call of more than one token on.
    """
    if query.shape[2] != 1 or keys == 1:
        return None
    return _kept_tables.recall(module, _settings(query, prompts), _sources(module, prompts))


def tabulate(module: nn.Module, prompts: Prompts, query: Tensor) -> Table:
    """The table by the module's own projections, kept for `recall`."""
    is_kept = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    made_of = stamp(_settings(query, prompts), _sources(module, prompts)) if is_kept else None
    key, value = _project(module, prompts, query)
    table = Table(key, value, prompts.gate(query))
    if not is_kept:
        return table
    # the type that the decoding operator takes: converting it for every token costs 3 us
    gate = table.gate if table.gate.dtype == torch.float64 else table.gate.float()
    gate = gate.expand(query.shape[1]).contiguous() if gate.numel() == 1 else gate
    table = table._replace(gate=gate)
    _kept_tables.keep(module, made_of, table)
    return table


def _settings(query: Tensor, prompts: Prompts) -> tuple[Any, ...]:
    """What a table depends on beside tensors."""
    return query.dtype, prompts.projection, prompts.rows is None


def _sources(module: nn.Module, prompts: Prompts) -> list[Tensor] | None:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # said again by sources_of, for less
        return None
    used = []
    for name in (*prompts.projection.modules, prompts.projection.key_norm):
        child = module._modules.get(name) if name else None
        if child is not None:
            used.append(child)
    added = () if prompts.added is None else (prompts.added,)
    return sources_of((*prompts.prompts, *prompts.gates, *added), used)


def adapter_names_of(module: nn.Module) -> Sequence[str] | None:
    """The names that PEFT hands to this layer of LoRA's, or of modules_to_save, in a call with adapter_names.

    It does so by a hook for each such layer, for the time of the call.
    """
    for hook in module._forward_pre_hooks.values():
        names: Sequence[str] | None = getattr(hook, "keywords", {}).get("adapter_names")
        if names is not None:
            return names
    return None


def projects_by_row(module: nn.Module, projection: Projection) -> bool:
    """Whether this call projects every row by another adapter."""
    parts = (module._modules.get(name) for name in projection.modules)
    return any(part is not None and adapter_names_of(part) for part in parts)


def _key_norm(module: nn.Module, projection: Projection) -> nn.Module | None:
    return module._modules.get(projection.key_norm) if projection.key_norm else None


def _project(module: nn.Module, prompts: Prompts, query: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [N, P, Hkv, D]."""
    tables = prompts.tables(query.device)
    projection = prompts.projection
    # the modules are called, their weights never touched: quantised ones have no weight to multiply with
    hidden = torch.cat([table.to(query.device, query.dtype) for table in tables])
    key, value = projection.key_value(module, hidden)
    norm = _key_norm(module, projection)
    if norm is not None and projection.norm_of == "width":
        key = norm(key)
    key, value = (t.unflatten(-1, (-1, query.shape[-1])) for t in (key, value))
    if norm is not None and projection.norm_of == "head":
        key = norm(key)
    return key, value


def prompt_branch(
    query: Tensor, table: Table, prompts: Prompts, scale: float, softcap: float | None
) -> Tensor:
    """act(gate) * softmax(scale * q pk^T) pv, [B, Hq, T, D]; a soft cap bounds these scores as it does the tokens'.

    By PyTorch's own operators within torch.func's transforms, which the kernels cannot follow.
    """
    prompt_key, prompt_value = table.key.transpose(1, 2), table.value.transpose(1, 2)
    gate, index = table.gate, prompts.row_index(query)
    if not in_transform():
        no_keys = query.new_empty((query.shape[0], prompt_key.shape[1], 0, query.shape[-1]))
        branch = zero_init_attention(
            query, no_keys, no_keys, prompt_key, prompt_value, gate, scale=scale,
            softcap=softcap, gate_activation=prompts.gate_activation, prompt_index=index,
        )  # fmt: skip
        return cast(Tensor, branch)
    weight = gate.tanh() if prompts.gate_activation == "tanh" else gate
    weight = weight.reshape(-1, weight.shape[-1], 1, 1)
    if index is not None:
        row = index.clamp(min=0)
        prompt_key, prompt_value = prompt_key[row], prompt_value[row]
        weight = (
            weight if len(weight) == 1 else weight[row]
        )  # one adapter's gates are the same for all its rows
        weight = weight * (index >= 0)[:, None, None, None]
    grouped = query.unflatten(1, (prompt_key.shape[1], -1))  # [B, Hkv, Hq / Hkv, T, D]
    scores = (scale * grouped @ prompt_key[:, :, None].mT).float()
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.softmax(-1).to(query.dtype)
    return weight.to(query.dtype) * (weights @ prompt_value[:, :, None]).flatten(1, 2)
