"""The first or the next tokens of cached sequences through all layers in one call of the CPU kernels.

A decoded token reads every weight once. In a model of 135 million parameters that takes 5 ms, and the 400 calls that
its layers are made of would take 2 ms more. The operator `decode_layers` does them in one: norm, query, key and value
products, rotary embedding, cache, attention with its gated prompts, output product and residual, norm, SwiGLU and its
products, for all layers. `prefill_layers` does the same for a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zinit_kernels import operators
from zinit_kernels.packed import MANY_ROWS, NATIVE
from zinit_kernels.projected import Stamp, stamp

from .layer_weights import DTYPES, LayerWeights, may_decode, may_replace

_DECODE, _PREFILL = (operators.operator(stage, "cpu") for stage in ("decode_layers", "prefill_layers"))


class Prompts(NamedTuple):
    """What an adapter adds to all layers, as the operator takes it."""

    tensors: list[Tensor]  # key [N, P, Hkv, D], value, gate [N or 1, Hq] of each adapted layer
    layers: list[int]
    index: Tensor | None
    tanh: bool


class Decoder(LayerWeights):
    """A model's weights in the order of the operator, and its adapter's prompts.

    The prompts of an adapter that says what they are made of (`LlamaAdapter.made_of`) are looked up once, and again
    where that has changed. Asking it for the prompts of 30 layers takes 0.5 ms a token, as much as a tenth of the
    weights' read at 4 bits.
    """

    BACKENDS = ("auto", "cpu")

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._kept: tuple[Callable[[Any], Any], Stamp, Prompts] | None = None

    def prompts(self, model: nn.Module, adapter: Callable[[Any], Any] | None) -> Prompts | None:
        """The prompts of all layers; None for an adapter whose prompts the operator cannot take together."""
        if adapter is None:
            return _NO_PROMPTS
        made_of = getattr(adapter, "made_of", None)
        settings, own = (None, None) if made_of is None else made_of()
        if own is None:
            return _prompts(model, adapter)
        sources = [*own, *self._tensors[3::9], *self._tensors[4::9]]  # key and value weights
        if self._kept is not None:
            owner, state, prompts = self._kept
            if owner is adapter and state.is_current(settings, sources):
                return prompts
        state_now = stamp(settings, sources)  # before the prompts: a change meanwhile is then noticed
        found = _prompts(model, adapter)
        self._kept = None if found is None or state_now is None else (adapter, state_now, found)
        return found

    def run(self, model: nn.Module, x: Tensor, prompts: Prompts, cache: Any) -> Tensor:
        """The normed hidden states of x [B, T, C]; the cache is written, its lengths stay."""
        return _DECODE(*self._arguments(model, x, prompts, cache, cache.lengths, cache.block_table))

    def fill(
        self, model: nn.Module, x: Tensor, prompts: Prompts, cache: Any, cu_seqlens: Tensor, last: bool
    ) -> Tensor:
        """The normed hidden states of packed tokens x [total, C], or of each sequence's last one, [B, C]; the cache is
        written from its beginning, its lengths stay."""
        return _PREFILL(*self._arguments(model, x, prompts, cache, cu_seqlens), last)

    def _arguments(
        self, model: nn.Module, x: Tensor, prompts: Prompts, cache: Any, *where: Tensor | None
    ) -> tuple[Any, ...]:
        config = model.config
        return (
            x, self.weights, self.schemes, self.norm, config.norm_eps, config.num_heads_q,
            config.num_heads_kv, config.intermediate_size, cache.keys, cache.values, *where, cache.cos, cache.sin,
            prompts.tensors, prompts.layers, prompts.index, config.head_dim**-0.5, config.window_left, prompts.tanh,
        )  # fmt: skip


def decode(model: nn.Module, x: Tensor, adapter: Callable[[Any], Any] | None, cache: Any) -> Tensor | None:
    """`Decoder.run` of a model's next tokens; None for what the operator does not take."""
    if not may_decode(x, cache) or (found := _decoder(model, x, adapter, cache)) is None:
        return None
    decoder, prompts = found
    return decoder.run(model, x.contiguous(), prompts, cache)


def prefill(
    model: nn.Module,
    x: Tensor,
    adapter: Callable[[Any], Any] | None,
    cache: Any,
    cu_seqlens: Tensor,
    last: bool,
) -> Tensor | None:
    """`Decoder.fill` of the first tokens of a cache's sequences; None for what the operator does not take."""
    if not MANY_ROWS or not may_replace(x, cache):
        return None
    if len(cu_seqlens) != len(cache.lengths) + 1 or cu_seqlens.dtype != torch.int32:
        return None
    if (found := _decoder(model, x, adapter, cache)) is None:
        return None
    decoder, prompts = found
    return decoder.fill(model, x.contiguous(), prompts, cache, cu_seqlens.contiguous(), last)


def _decoder(
    model: nn.Module, x: Tensor, adapter: Callable[[Any], Any] | None, cache: Any
) -> tuple[Decoder, Prompts] | None:
    """The decoder of a model and the prompts of its layers; None where the operators cannot stand for the layers."""
    if x.device.type != "cpu" or not NATIVE:
        return None
    decoder = Decoder.of(model, cache)
    if not decoder.usable or x.dtype != model.dtype or decoder.is_hooked():
        return None
    prompts = decoder.prompts(model, adapter)
    return None if prompts is None else (decoder, prompts)


_NO_PROMPTS = Prompts([], [], None, True)


def _prompts(model: nn.Module, adapter: Callable[[Any], Any]) -> Prompts | None:
    tensors: list[Tensor] = []
    layers: list[int] = []
    seen: set[tuple[Any, ...]] = set()
    for layer in model.layers:
        prompt = adapter(layer.self_attn)
        if prompt is None:
            continue
        if prompt.gate is None or prompt.key.dtype not in DTYPES:
            return None
        key, value = (t if t.dim() == 4 else t[None] for t in (prompt.key, prompt.value))
        gate = prompt.gate if prompt.gate.dim() == 2 else prompt.gate[None]
        tensors += (key, value, gate.detach().float().contiguous())
        layers.append(layer.self_attn.layer_index)
        seen.add((prompt.gate_activation, None if prompt.index is None else id(prompt.index)))
        index = prompt.index
    if not layers:
        return _NO_PROMPTS
    if len(seen) > 1:
        return None
    return Prompts(tensors, layers, index, prompt_activation(seen))


def prompt_activation(seen: set[tuple[Any, ...]]) -> bool:
    """Whether the one gate activation of all layers is tanh."""
    ((activation, _),) = seen
    return bool(activation == "tanh")
