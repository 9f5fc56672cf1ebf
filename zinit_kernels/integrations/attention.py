"""The attention function that transformers calls by the name "zinit", and the mask function of that name.

Attention modules without prompts get `sdpa`, unchanged. With prompts, one fused call computes

    out = softmax(scale * q k^T + mask) v + act(gate) * softmax(scale * q pk^T) pv

(LLaMA-Adapter, arXiv 2303.16199, equations 5 to 8), where pk and pv are what the layer's own key and value
projections make of the prompts, without the rotary embedding. Attention sinks (GPT-OSS) enter the first softmax alone.
What the fused kernels do not take (dense masks, dropout, a paged cache) gets the token branch from transformers and the
prompt branch added.

On a CPU, a layer whose gates are all 0 (how training starts) gives the output of a base with SDPA attention bit for
bit, because its tokens then take transformers' own function too. On other devices and under torch.compile, looking at
the gates would cost a synchronisation or a graph; there the tokens go through the fused kernel, whose output differs by
rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import transformers  # noqa: F401  # see integrations/peft.py
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from ..api import zero_init_attention, zero_init_attention_with_kvcache
from ..projected import in_transform
from .added_prompts import with_added
from .architectures import architecture_of
from .prompts import Prompts, Table, adapter_names_of, projects_by_row, prompt_branch, recall, tabulate
from .scope import Scope
from .usage import asks_for_weights, mark_used

try:  # of transformers 5: which outputs the running call collects
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _active_collector = None

NAME = "zinit"
NEEDS_KWARGS = _active_collector is None  # of the attention modules, to know about output_attentions

# Arguments of transformers' attention functions that change the scores and that `sdpa` does not know. Those in FUSED
# have an argument of the fused operator that means the same. Where a layer has another one, or is not fused for
# another reason, its token branch is the eager formula of the model's own file.
EAGER = ("softcap", "s_aux")  # capped scores (Gemma 2), attention sinks (GPT-OSS)
FUSED = {"softcap": "softcap", "s_aux": "sinks"}
_UNFUSED = {"cache", "position_bias"}  # arguments of sdpa's that change its keys or scores

# Of a call whose rows have different adapters: what gives an attention module its prompts (None: it has none there).
mixed: Scope[Mapping[nn.Module, Callable[[], Prompts | None]]] = Scope("zinit_mixed_adapters")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    zinit_prompts: Prompts | None = None,
    zinit_tokens: Callable[..., tuple[Tensor, Any]] = sdpa_attention_forward,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function of the name "zinit".

    Args:
        query: [B, Hq, T, D], rotated; key, value: [B, Hkv, S, D] with the cache's, not repeated.
        attention_mask: as `sdpa` gets it: None, or bool or additive [B, 1, T, S].
        zinit_prompts: the prompts, where they are not a submodule `zinit` of `module`.
        zinit_tokens: the attention function of the token branch, where that is neither fused nor eager.
        dropout, scaling, kwargs: as transformers passes them.

    Returns:
        ([B, T, Hq, D], weights). The weights are None unless output_attentions asks for them and the token branch is
        the eager formula (Gemma 2, GPT-OSS); then they are its softmax [B, Hq, T, S]. The prompts' softmax, each row
        of which has a sum of 1 of its own, is not in them.

    Raises:
        ValueError: for what would be lost without a word: a second adapter in the layer, output_attentions where no
            weights are kept, a soft cap or attention sinks with a paged cache.
    """
    prompts = _prompts(module, zinit_prompts, served=kwargs.get("cache") is not None)
    weighed, score_options = _wants_weights(kwargs), _score_options(kwargs)
    tokens = (module, query, key, value, attention_mask, dropout, scaling, kwargs, zinit_tokens, weighed)
    if prompts is None:
        return _token_branch(*tokens)
    if weighed and not score_options:
        raise ValueError(
            f"output_attentions is not supported with zero-init prompts in {type(module).__name__}: no weights are "
            "kept there; set it to False"
        )
    kept = recall(module, prompts, query, key.shape[2])
    at_rest = kept is None and prompts.at_rest()
    if at_rest and not torch.is_grad_enabled():
        return _token_branch(*tokens)

    if not kept and projects_by_row(module, prompts.projection):
        prompts = prompts.by_row(query)
    table = kept or tabulate(module, prompts, query)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask, causal, fusable = _fusable_mask(module, query, attention_mask, kwargs.get("is_causal"))
    unfused = at_rest or dropout or weighed or not fusable or any(name in kwargs for name in _UNFUSED)
    # what was kept was not kept within a transform
    if unfused or (score_options and not FUSED.keys() >= set(score_options)) or (not kept and in_transform()):
        out, weights = _token_branch(*tokens)
        return out + prompt_branch(query, table, prompts, scale, kwargs.get("softcap")).transpose(
            1, 2
        ), weights
    options = {FUSED[name]: kwargs[name] for name in score_options}
    if query.shape[2] == 1 and mask is None and not torch.is_grad_enabled():
        return _decode(query, key, value, table, prompts, scale, options), None
    if causal:  # in an empty static cache the keys behind the queries are not written yet
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    out = zero_init_attention(
        query, key, value, table.key.transpose(1, 2), table.value.transpose(1, 2), table.gate, attn_mask=mask,
        is_causal=causal, scale=scale, gate_activation=prompts.gate_activation,
        prompt_index=prompts.row_index(query), **options,
    )  # fmt: skip
    return cast(Tensor, out).transpose(1, 2), None


def attend_by_zinit(model: Any, attentions: Iterable[Any]) -> str:
    """Makes a transformers model attend by the name "zinit"; returns the implementation from before.

    Raises:
        TypeError: a part of a model, or a wrapper around one.
        ValueError: one of `attentions` does not take it (transformers only warns), or the model is divided among
            processes by tensor parallelism; the model is then as it was.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(
            f"expected a transformers model, got {type(model).__name__}, which has no set_attn_implementation: pass "
            "the whole model, before it is wrapped"
        )
    if (processes := getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            f"{type(model).__name__} is divided among {processes} processes by tensor parallelism (tp_plan), which "
            "zero-init prompts do not support yet: load it without tp_plan, or with device_map"
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


def _prompts(module: nn.Module, given: Prompts | None, served: bool) -> Prompts | None:
    """The prompts of this layer in this call: PEFT's, the layer's own, or those of a call with several adapters."""
    own = module._modules.get("zinit")
    for layers in mixed.values():
        if module in layers:
            given = layers[module]()
    if given is not None or own is not None:
        mark_used(module)
    if own is None:
        return given
    if given is not None:
        raise ValueError("the layer has PEFT's prompts and zero-init prompts too: take one of them away")
    if own._forward_pre_hooks and (names := adapter_names_of(own)):
        return _prompts_of_rows(own, names, served)
    # a call, not attributes: offloaded and wrapped parameters are there only during one
    adapter: Any = own
    found = adapter(served) if own._forward_hooks or own._forward_pre_hooks else adapter.forward(served)
    if found is None:
        return None
    prompt, gate = found
    own_prompts = Prompts((prompt,), (gate,), adapter.gate_activation, adapter.projection)
    return with_added(adapter, own_prompts, packed=served)


def _prompts_of_rows(wrapper: Any, names: Sequence[str], served: bool) -> Prompts | None:
    """In PEFT's wrapper (modules_to_save), for rows of these adapters; one without prompts has those of before."""
    saved = dict(wrapper.modules_to_save.items())
    copies = [saved.get(name, wrapper.original_module) for name in names]
    distinct = [copy for copy in dict.fromkeys(copies) if copy.is_on]
    if not distinct:
        return None
    rows = [distinct.index(copy) if copy in distinct else -1 for copy in copies]
    prompts, gates = zip(*(copy(served) for copy in distinct), strict=True)
    index = torch.tensor(rows, dtype=torch.int32)
    found = Prompts(prompts, gates, distinct[0].gate_activation, distinct[0].projection, index)
    if any(with_added(copy, found, packed=served).added is not None for copy in distinct):
        raise ValueError(
            "per_sample_prompts is not supported in a call with adapter_names and prompts in modules_to_save: call the "
            "model once for each adapter"
        )
    return found


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Table,
    prompts: Prompts,
    scale: float,
    options: dict[str, Any],
) -> Tensor:
    """One query against many keys: with 32/8 heads, D = 128 and 512 keys 166 us a call, 1208 us by the other door.

    Lengths and gates as the operator takes them: what has to be converted first costs 30 us more.
    """
    lengths = torch.full((query.shape[0],), key.shape[2], dtype=torch.int32, device=query.device)
    out = zero_init_attention_with_kvcache(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), prompt_k=table.key,
        prompt_v=table.value, gate=table.gate, cache_seqlens=lengths, causal=False, softmax_scale=scale,
        gate_activation=prompts.gate_activation, prompt_index=prompts.row_index(query), **options,
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
    function: Callable[..., tuple[Tensor, Any]],
    weighed: bool,
) -> tuple[Tensor, Tensor | None]:
    """([B, T, Hq, D], weights or None) of the tokens alone, as transformers computes them.

    By `function` (sdpa), or by the modelling file's own eager formula where that one lacks an option.
    """
    if options := _score_options(kwargs):
        if kwargs.get("cache") is not None:
            raise ValueError(
                f"{type(module).__name__} is not supported by continuous batching with zero-init prompts: nothing "
                f"computes its {' and '.join(options)} with a paged cache; use generate instead"
            )
        function, mask = _eager_formula(module), _additive_mask(module, query, key, mask, kwargs)
    out, weights = function(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    return out, weights if weighed else None


def _score_options(kwargs: dict[str, Any]) -> list[str]:
    return [name for name in EAGER if kwargs.get(name) is not None]


def _eager_formula(module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    found = architecture_of(module)
    file = (found[0] if found else type(module)).__module__
    function = getattr(sys.modules[file], "eager_attention_forward", None)
    if function is None:
        raise ValueError(f"{file} has no eager_attention_forward, which a soft cap or attention sinks need")
    return cast("Callable[..., tuple[Tensor, Any]]", function)


def _additive_mask(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    queries, keys = query.shape[2], key.shape[2]
    if mask is None and _is_causal(module, kwargs.get("is_causal")) and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, lowest)
    return mask


def _wants_weights(kwargs: dict[str, Any]) -> bool:
    """Whether the caller asked for output_attentions.

    GPT-2 and SigLIP, for example, do not hand that argument on to their attention function. transformers 5 knows during
    such a call that it collects attentions; in transformers 4 it is an argument of the attention module at least.
    """
    if kwargs.get("output_attentions"):
        return True
    if _active_collector is None:
        return asks_for_weights()
    if (
        torch.compiler.is_compiling()
    ):  # its variable cannot be traced; transformers keeps a global one beside it
        collected = _active_collector.global_var if _active_collector.compiling else None
    else:
        collected = _active_collector.get()
    return collected is not None and any(name.endswith("attentions") for name in collected)


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
