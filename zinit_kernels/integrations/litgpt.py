"""litgpt's adapter (v1 and v2) through the fused attention: the same model, parameters and files.

    model = litgpt.adapter.GPT(config)
    accelerate(model)

litgpt keeps the projected prompts of its first pass for ever, with their graph: the second training step raises, and
after a pass under no_grad (its own validation is one) the prompts get no gradient again. Here they are projected anew
wherever gradients are on.

From 0.5.5 on litgpt projects its prompts through the wrong rows of the fused qkv weights, unless the model is
multi-query: the base's rows are in blocks [Q | K | V], the adapter still reads them group by group. `layout` chooses.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast

from litgpt import adapter, adapter_v2
from litgpt.model import CausalSelfAttention
from torch import Tensor, nn

from ..api import zero_init_attention
from ..projected import in_transform
from .architectures import Projection
from .prompts import Prompts, prompt_branch, recall, tabulate

_Model = TypeVar("_Model", bound=nn.Module)


def _blocked(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    config = attention.config
    width = config.n_query_groups * config.head_size
    _, key, value = attention.qkv(hidden).split((config.n_head * config.head_size, width, width), -1)
    return key, value


def _interleaved(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    config = attention.config
    groups = attention.qkv(hidden).unflatten(-1, (config.n_query_groups, -1, config.head_size))
    return groups[..., -2, :].flatten(-2), groups[..., -1, :].flatten(-2)


_LAYOUTS = {
    "blocked": Projection(_blocked, ("qkv",)),
    "interleaved": Projection(_interleaved, ("qkv",)),
}


class _FusedAttention:
    """The override, for both of litgpt's adapter classes."""

    def scaled_dot_product_attention(
        self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """[B, T, H, D] from q [B, H, T, D], rotated, and k, v repeated to H heads or, multi-query, with one."""
        if self.block_idx < self.config.adapter_start_layer:
            return CausalSelfAttention.scaled_dot_product_attention(self, q, k, v, mask)
        # the parameter itself, not a view of it: its identity and version say whether kept projections are stale
        prompts = Prompts(
            (self.adapter_wte.weight,), (self.gating_factor,), "identity", _LAYOUTS[self.zinit_layout]
        )
        at_rest = prompts.at_rest()
        softcap = self.config.attention_logit_softcapping
        scale = self.mscale**2 / math.sqrt(self.config.attention_scores_scalar or self.config.head_size)
        table = recall(self, prompts, q, k.shape[2]) or tabulate(self, prompts, q)
        if at_rest or mask is not None or in_transform():
            out = CausalSelfAttention.scaled_dot_product_attention(self, q, k, v, mask)
            return out + prompt_branch(q, table, prompts, scale, softcap).transpose(1, 2)
        repeats = k.shape[1] // table.key.shape[2]  # one of every group's equal heads is enough
        fused = zero_init_attention(
            q, k[:, ::repeats], v[:, ::repeats], table.key.transpose(1, 2), table.value.transpose(1, 2),
            table.gate, is_causal=q.shape[2] > 1, scale=scale, softcap=softcap, gate_activation="identity",
        )  # fmt: skip
        return cast(Tensor, fused).transpose(1, 2)


class FusedAdapterAttention(_FusedAttention, adapter.CausalSelfAttention):
    """litgpt.adapter's attention with its parameters."""


class FusedAdapterV2Attention(_FusedAttention, adapter_v2.CausalSelfAttention):
    """litgpt.adapter_v2's attention with its parameters."""


_FUSED: dict[type, type] = {
    adapter.CausalSelfAttention: FusedAdapterAttention,
    adapter_v2.CausalSelfAttention: FusedAdapterV2Attention,
}


def accelerate(model: _Model, layout: str = "interleaved") -> _Model:
    """Makes litgpt's adapter model attend through zinit_kernels, in place, and returns it.

    State dict, checkpoints, KV cache and generation work as before. Prompt keys are not normalised and not rotated, as
    in litgpt.

    Args:
        model: a `litgpt.adapter.GPT` or `litgpt.adapter_v2.GPT`.
        layout: the rows of qkv that make prompt keys and values. "interleaved": those litgpt takes, for adapters that
            it trained from 0.5.5 on. "blocked": the layer's own keys and values, the paper's formula, for adapters of
            older releases or of other programs, and for new ones. Multi-query models: the same.

    Raises:
        TypeError: no layer with litgpt's adapter. ValueError: another layout.
    """
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(_LAYOUTS)}, got {layout!r}")
    restore(model)
    layers = [layer for layer in model.modules() if type(layer) in _FUSED]
    if not layers:
        raise TypeError(f"expected a litgpt.adapter.GPT or litgpt.adapter_v2.GPT, got {type(model).__name__}")
    for layer in layers:
        layer.__class__ = _FUSED[type(layer)]
        layer.zinit_layout = layout  # type: ignore[assignment]
        _forget(layer)
    return model


def restore(model: _Model) -> _Model:
    """Undoes `accelerate`, in place."""
    plain = {fused: theirs for theirs, fused in _FUSED.items()}
    for layer in model.modules():
        if type(layer) in plain:
            layer.__class__ = plain[type(layer)]
            del layer.zinit_layout
            _forget(layer)
    return model


def _forget(layer: Any) -> None:
    if getattr(layer, "adapter_kv_cache", None) is not None:
        layer.adapter_kv_cache = None
