"""Prompts as VPT and P-tuning v2 have them: in the softmax of the tokens, without a gate.

    out = softmax(scale * q [pk, k]^T + [0, mask]) [pv, v]

The prompts of a layer go through its own key and value projections, as zero-init prompts do. So a comparison of the two
differs in the softmax and the gate, and in nothing else.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from zinit_kernels.integrations.architectures import Projection, architecture_of
from zinit_kernels.integrations.layers import Layer, attention_layers

from ..shared import UserError

NAME = "one_softmax_prompts"


class SharedPrompts(nn.Module):
    """Of one layer: prompts [P, C], drawn from N(0, 1) as zero-init prompts are."""

    def __init__(self, prompt: Tensor, projection: Projection):
        super().__init__()
        self.prompt, self.projection = nn.Parameter(prompt), projection


def add_one_softmax_prompts(model: Any, prompt_length: int, num_layers: int) -> list[nn.Parameter]:
    """Gives the topmost layers of each stack prompts, in place. Returns them; the base keeps its `requires_grad`.

    Raises:
        ValueError: no layer of a known architecture.
    """
    stacks: dict[str, list[Layer]] = {}
    for layer in attention_layers(model):
        stacks.setdefault(layer.stack, []).append(layer)
    found = []
    for layers in stacks.values():
        for layer in layers[-num_layers:]:
            prompt = torch.randn(prompt_length, layer.attention.config.hidden_size)
            shared = SharedPrompts(prompt, architecture_of(layer.attention)[1])
            layer.attention.shared_prompts = shared
            found.append(shared.prompt)
    model.set_attn_implementation(NAME)
    return found


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function of this name: sdpa with the prompts in front of keys and values.

    Raises:
        UserError: a model with capped scores or attention sinks.
    """
    if changed := [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]:
        raise UserError(
            f"one-softmax: {type(module).__name__} changes its scores by {changed[0]}, which prompts in the same "
            "softmax do not support: leave this method out."
        )
    own = module._modules.get("shared_prompts")
    if own is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    prompts = cast(SharedPrompts, own)
    prompt_key, prompt_value = _project(module, prompts, key)
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", False) if causal is None else causal)
    queries, keys, count = query.shape[2], key.shape[2], prompt_key.shape[2]
    if attention_mask is None and causal and queries > 1:
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(
            keys - queries
        )[None, None]
    if attention_mask is not None:
        seen = True if attention_mask.dtype == torch.bool else 0.0
        attention_mask = F.pad(attention_mask, (count, 0), value=seen)
    out = F.scaled_dot_product_attention(
        query, torch.cat([prompt_key, key], 2), torch.cat([prompt_value, value], 2), attention_mask, dropout,
        scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2), None


def _project(module: nn.Module, prompts: SharedPrompts, key: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hkv, P, D] of the prompts."""
    projection = prompts.projection
    hidden = prompts.prompt.to(key.dtype)[None]
    found_key, found_value = projection.key_value(module, hidden)
    norm = module._modules.get(projection.key_norm) if projection.key_norm else None
    if norm is not None and projection.norm_of == "width":
        found_key = norm(found_key)
    found_key, found_value = (t.unflatten(-1, (-1, key.shape[-1])) for t in (found_key, found_value))
    if norm is not None and projection.norm_of == "head":
        found_key = norm(found_key)
    shape = (len(key), -1, -1, -1)
    return found_key.transpose(1, 2).expand(shape), found_value.transpose(1, 2).expand(shape)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
