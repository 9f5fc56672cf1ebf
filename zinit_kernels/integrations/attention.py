"""The attention function that transformers calls by the name "zinit", and the mask function of that name.

Attention modules without prompts get `sdpa`, unchanged. With prompts, one fused call computes

    out = softmax(scale * q k^T + mask) v + act(gate) * softmax(scale * q pk^T) pv

(LLaMA-Adapter, arXiv 2303.16199, equations 5 to 8), where pk and pv are what the layer's own key and value
projections make of the prompts, without the rotary embedding. What the fused kernels do not take (dense masks,
dropout, a soft cap, a paged cache) gets the token branch from transformers and the prompt branch added.

A layer whose gates are all 0 (how training starts) is the base's layer bit for bit: on a CPU its token branch is
`sdpa`'s too. Elsewhere, and under torch.compile, looking at the gates would cost a synchronisation or a graph, and
the token branch is the fused kernel's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from ..api import zero_init_attention, zero_init_attention_with_kvcache
from .prompts import Prompts, Table, prompt_branch, recall, tabulate

NAME = "zinit"
_UNFUSED = {"cache", "position_bias"}  # arguments of sdpa's that change its keys or scores


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    zinit_prompts: Prompts | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function of the name "zinit".

    Args:
        query: [B, Hq, T, D], rotated; key, value: [B, Hkv, S, D] with the cache's, not repeated.
        attention_mask: as `sdpa` gets it: None, or bool or additive [B, 1, T, S].
        zinit_prompts: the prompts, where they are not a submodule `zinit` of `module` with a method
            `prompts(module)`.
        dropout, scaling, kwargs: as transformers passes them.

    Returns:
        ([B, T, Hq, D], None).

    Raises:
        ValueError: for what would be lost without a word: output_attentions, attention sinks, a second adapter.
    """
    prompts = zinit_prompts
    own: Any = module._modules.get("zinit")
    if own is not None:
        if prompts is not None:
            raise ValueError("the layer has PEFT's prompts and zero-init prompts too: take one of them away")
        prompts = own.prompts(module)
    token = (module, query, key, value, attention_mask, dropout, scaling, kwargs)
    if prompts is None:
        return _token_branch(*token), None
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions is not supported with zero-init prompts: no weights are kept; set it to False"
        )
    if kwargs.get("s_aux") is not None:
        raise ValueError("attention sinks (s_aux) are not supported together with zero-init prompts")
    table = recall(module, prompts, query, key.shape[2])
    at_rest = table is None and prompts.at_rest()
    if at_rest and not torch.is_grad_enabled():
        return _token_branch(*token), None

    table = table or tabulate(module, prompts, query)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = kwargs.get("softcap")
    mask, causal, fusable = _fusable_mask(module, query, attention_mask, kwargs.get("is_causal"))
    if at_rest or dropout or softcap is not None or not fusable or _UNFUSED & kwargs.keys():
        branch = prompt_branch(query, table, prompts, scale, softcap)
        return _token_branch(*token) + branch.transpose(1, 2), None
    if query.shape[2] == 1 and mask is None and not torch.is_grad_enabled():
        return _decode(query, key, value, table, prompts, scale), None
    if causal:  # in an empty static cache the keys behind the queries are not written yet
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    out = zero_init_attention(
        query, key, value, table.key.transpose(1, 2), table.value.transpose(1, 2), table.gate, attn_mask=mask,
        is_causal=causal, scale=scale, gate_activation=prompts.gate_activation,
        prompt_index=prompts.row_index(query),
    )  # fmt: skip
    return cast(Tensor, out).transpose(1, 2), None


def attend_by_zinit(model: Any, attentions: Iterable[Any]) -> str:
    """Makes a transformers model attend by the name "zinit"; returns the implementation from before.

    Raises:
        TypeError: a part of a model, or a wrapper around one.
        ValueError: one of `attentions` does not take it (transformers only warns); the model is then as it was.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(
            f"expected a transformers model, got {type(model).__name__}, which has no set_attn_implementation: pass "
            "the whole model, before it is wrapped"
        )
    before: str = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    for attention in attentions:
        if attention.config._attn_implementation != NAME:
            model.set_attn_implementation(before)
            raise ValueError(
                f"{type(model).__name__} does not take its attention from AttentionInterface: its "
                f"{type(attention).__name__} stays with {attention.config._attn_implementation!r}"
            )
    return before


def _decode(
    query: Tensor, key: Tensor, value: Tensor, table: Table, prompts: Prompts, scale: float
) -> Tensor:
    """One query against many keys: with 32/8 heads, D = 128 and 512 keys 166 us a call, 1208 us by the other door.

    Lengths and gates as the operator takes them: what has to be converted first costs 30 us more.
    """
    lengths = torch.full((query.shape[0],), key.shape[2], dtype=torch.int32, device=query.device)
    out = zero_init_attention_with_kvcache(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), prompt_k=table.key,
        prompt_v=table.value, gate=table.gate, cache_seqlens=lengths, causal=False, softmax_scale=scale,
        gate_activation=prompts.gate_activation, prompt_index=prompts.row_index(query),
    )  # fmt: skip
    return cast(Tensor, out)


def _token_branch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """[B, T, Hq, D] by sdpa, or by the modelling file's own eager formula where sdpa has no soft cap."""
    if kwargs.get("softcap") is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )[0]
    eager = sys.modules[type(module).__module__].eager_attention_forward
    queries, keys = query.shape[2], key.shape[2]
    if mask is None and _is_causal(module, kwargs.get("is_causal")) and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, lowest)
    return eager(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)[0]


def _is_causal(module: nn.Module, told: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if told is None else told)


def _fusable_mask(
    module: nn.Module, query: Tensor, mask: Tensor | None, told_causal: bool | None
) -> tuple[Tensor | None, bool, bool]:
    """(mask, is_causal, whether the fused kernels take them), by sdpa's rules."""
    if mask is None:
        return None, query.shape[2] > 1 and _is_causal(module, told_causal), True
    if mask.dim() != 4 or mask.shape[1] != 1 or query.shape[2] == 1:
        return mask, False, False
    if mask.shape[2] > 1 and mask.stride(2) == 0:  # one row of key padding, expanded over the queries
        mask = mask[:, :, :1]
    return mask, False, mask.shape[2] == 1


AttentionInterface.register(NAME, attention_forward)
# without a mask function of the same name transformers hands over no mask at all, and padding is attended to
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
