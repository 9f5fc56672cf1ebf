"""Prompts on their way into attention: through the layer's own key and value projections, and kept while decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

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


class _Projected(NamedTuple):
    made_by: tuple[torch.dtype, Projection]
    sources: tuple[tuple[ref[Tensor], tuple[int, int]], ...]  # all they were made from, each with its stamp
    key: Tensor
    value: Tensor


_projected_prompts: WeakKeyDictionary[nn.Module, _Projected] = WeakKeyDictionary()


def projected(module: nn.Module, prompts: Prompts, query: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """prompt_key and prompt_value [N, Hkv, P, D] by the layer's own projections.

    While one token is decoded against a cache, those of the last call are taken again, as the token keys and values
    are: only with gradients off, by the same projection, if every tensor they came from is the same object at the same
    version and address (which `tensor.data = ...` changes), and if the projections are plain modules (an adapted or
    hooked one may answer differently by a state that no version shows). Numbers overwritten behind PyTorch's back
    between two tokens, by `tensor.data.mul_` or numpy, are seen from the next call of more than one token on.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _project(module, prompts, query)
    sources = _sources(module, prompts)
    if sources is None:
        return _project(module, prompts, query)
    made_by = (query.dtype, prompts.projection)
    kept = _projected_prompts.get(prompts.owner)
    if kept is not None and query.shape[2] == 1 and keys > 1 and kept.made_by == made_by:
        same = len(kept.sources) == len(sources) and all(
            was() is tensor and stamp == _stamp(tensor)
            for (was, stamp), tensor in zip(kept.sources, sources, strict=True)
        )
        if same:
            return kept.key, kept.value
    key, value = _project(module, prompts, query)
    stamped = tuple((ref(tensor), _stamp(tensor)) for tensor in sources)
    _projected_prompts[prompts.owner] = _Projected(made_by, stamped, key, value)
    return key, value


def _stamp(tensor: Tensor) -> tuple[int, int]:
    """Its version and address; a subclass that wraps others (quantised, sharded) has no address of its own."""
    return tensor._version, tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else 0


def _sources(module: nn.Module, prompts: Prompts) -> list[Tensor] | None:
    """Every tensor the projected prompts depend on, or None where that cannot be told."""
    tensors = list(prompts.prompts)
    for name in (*prompts.projection.modules, prompts.projection.key_norm):
        projection = module._modules.get(name) if name else None
        if projection is None:
            continue
        plain = type(projection).__module__.startswith(("torch.nn.modules.", "transformers."))
        if not plain or _is_hooked(projection) or any(True for _ in projection.children()):
            return None
        tensors += [
            t for t in (*projection._parameters.values(), *projection._buffers.values()) if t is not None
        ]
    return None if any(tensor.is_inference() for tensor in tensors) else tensors  # those have no version


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _project(module: nn.Module, prompts: Prompts, query: Tensor) -> tuple[Tensor, Tensor]:
    tables = (prompt.reshape(-1, *prompt.shape[-2:]) for prompt in prompts.prompts)
    # the modules are called, their weights never touched: quantised ones have no weight to multiply with
    hidden = torch.cat([table.to(query.device, query.dtype) for table in tables])
    key, value = prompts.projection.key_value(module, hidden)
    key, value = (t.unflatten(-1, (-1, query.shape[-1])) for t in (key, value))  # [N, P, Hkv, D]
    if prompts.projection.key_norm is not None:
        key = getattr(module, prompts.projection.key_norm)(key)
    return key.transpose(1, 2), value.transpose(1, 2)


def prompt_branch(
    query: Tensor, table: tuple[Tensor, Tensor], prompts: Prompts, scale: float, softcap: float | None
) -> Tensor:
    """act(gate) * softmax(scale * q pk^T) pv, [B, Hq, T, D]; a soft cap bounds these scores as it does the tokens'."""
    prompt_key, prompt_value = table
    gate, index = prompts.gate(query), prompts.row_index(query)
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
