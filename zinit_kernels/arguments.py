"""From what users pass to the one canonical form that every backend takes, or to an error that says what to
change.

Nothing here computes attention. The layouts of the public functions (SDPA's, packed, cached) become calls. The
checks are plain Python on shapes, dtypes and devices, so they cost no synchronisation and trace under
torch.compile.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import checks
from .call import CacheCall, Call, PromptCall
from .checks import BRANCH, CACHED, PACKED_BRANCH, VARLEN, WHOLE
from .pages import gather_pages
from .prompts_and_masks import classify_mask, dense_rows, prompt_table
from .values import has_autocast, has_values


def from_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor | None,
    prompt_value: Tensor | None,
    gate: Tensor | float | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    window_size: tuple[int, int] | None,
    scale: float | None,
    softcap: float | None,
    gate_activation: str,
    prompt_index: Tensor | None,
    sinks: Tensor | None = None,
) -> Call:
    """[B, H, T, D] tensors, SDPA's mask rules."""
    query, key, value = _under_autocast(query, key, value)
    attn_mask, lower_right = _from_causal_bias(attn_mask, is_causal, query, key)
    checks.check_storage(
        query=query,
        key=key,
        value=value,
        prompt_key=prompt_key,
        prompt_value=prompt_value,
        gate=gate,
        attn_mask=attn_mask,
        prompt_index=prompt_index,
        sinks=sinks,
    )
    checks.check_tensor("query", query, 4, "[B, Hq, T, D]")
    checks.check_tensor("key", key, 4, "[B, Hkv, S, D]", like=query)
    checks.check_tensor("value", value, 4, "[B, Hkv, S, D]", like=query)
    batch, heads_q, seqlen_q, head_dim = query.shape
    heads_kv, seqlen_k = key.shape[1], key.shape[2]
    checks.check_shape("key", key, (batch, heads_kv, seqlen_k, head_dim), free=(1, 2))
    checks.check_shape("value", value, (batch, heads_kv, seqlen_k, head_dim))
    checks.check_groups(WHOLE, query, key, ("query", "key"))

    window_left, window_right = checks.as_window(window_size, is_causal)
    if (window_left, window_right) != (-1, -1) and seqlen_q != seqlen_k:
        swapped = heads_q == heads_kv and checks.are_groups(seqlen_q, seqlen_k)
        raise ValueError(
            f"is_causal and window_size need as many queries as keys here, got {seqlen_q} queries and {seqlen_k} keys: "
            "SDPA aligns the causal mask to the top left, decoding needs the bottom right. Call "
            "zero_init_attention_with_kvcache (or zero_init_attention_varlen), which align to the bottom right, "
            "or pass the mask you mean as attn_mask" + (f"; unless {WHOLE.swap()}" if swapped else "")
        )
    if lower_right:
        window_right = 0
    prompt_index = checks.as_prompt_index(prompt_index, batch)
    sinks = checks.as_sinks(sinks, query, heads_q)
    key_bias, dense_mask = classify_mask(attn_mask, query, key)
    prompt_key, prompt_value, gate = prompt_table(
        WHOLE,
        ("prompt_key", "prompt_value"),
        (prompt_key, prompt_value),
        gate,
        prompt_index,
        query,
        key,
        batch,
        gate_activation,
    )
    return Call(
        query=dense_rows(query),
        key=dense_rows(key),
        value=dense_rows(value),
        prompt_key=prompt_key,
        prompt_value=prompt_value,
        gate=gate,
        sinks=sinks,
        prompt_index=prompt_index,
        key_bias=key_bias,
        max_seqlen_q=seqlen_q,
        max_seqlen_k=seqlen_k,
        scale=checks.as_scale(scale, head_dim),
        softcap=checks.as_softcap(softcap),
        window_left=window_left,
        window_right=window_right,
        tanh_gate=gate_activation == "tanh",
        dense_mask=dense_mask,
    )


def from_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    gate: Tensor | float | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_table: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int] | None,
    softcap: float | None,
    gate_activation: str,
    prompt_index: Tensor | None,
    sinks: Tensor | None = None,
) -> Call:
    """Packed [total, H, D] tensors, flash-attn's rules."""
    checks.check_storage(
        q=q,
        k=k,
        v=v,
        prompt_k=prompt_k,
        prompt_v=prompt_v,
        gate=gate,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        block_table=block_table,
        prompt_index=prompt_index,
        sinks=sinks,
    )
    if block_table is not None:
        k, v = gather_pages(q, k, v, cu_seqlens_k, block_table)
    q, k, v = _under_autocast(q, k, v)
    checks.check_tensor("q", q, 3, "[total_q, Hq, D]")
    checks.check_tensor("k", k, 3, "[total_k, Hkv, D]", like=q)
    checks.check_tensor("v", v, 3, "[total_k, Hkv, D]", like=q)
    head_dim = q.shape[2]
    checks.check_shape("k", k, (k.shape[0], k.shape[1], head_dim), free=(0, 1))
    checks.check_shape("v", v, k.shape)
    checks.check_groups(VARLEN, q, k, ("q", "k"))
    cu_seqlens_q = checks.as_int32("cu_seqlens_q", cu_seqlens_q, 1)
    cu_seqlens_k = checks.as_int32("cu_seqlens_k", cu_seqlens_k, 1)
    if cu_seqlens_q.shape[0] < 1 or cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must both hold B + 1 cumulative lengths, got "
            f"{tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
        )
    max_seqlen_q = checks.as_length("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = checks.as_length("max_seqlen_k", max_seqlen_k)
    window_left, window_right = checks.as_window(window_size, causal)
    prompt_index = checks.as_prompt_index(prompt_index, cu_seqlens_q.shape[0] - 1)
    sinks = checks.as_sinks(sinks, q, q.shape[1])
    prompt_k, prompt_v, gate = prompt_table(
        VARLEN,
        ("prompt_k", "prompt_v"),
        (prompt_k, prompt_v),
        gate,
        prompt_index,
        q,
        k,
        cu_seqlens_q.shape[0] - 1,
        gate_activation,
    )
    if prompt_k is not None and prompt_v is not None:
        prompt_k, prompt_v = prompt_k.transpose(1, 2), prompt_v.transpose(1, 2)
    return Call(
        query=_packed_rows(q),
        key=_packed_rows(k),
        value=_packed_rows(v),
        prompt_key=prompt_k,
        prompt_value=prompt_v,
        gate=gate,
        sinks=sinks,
        prompt_index=prompt_index,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        scale=checks.as_scale(softmax_scale, head_dim),
        softcap=checks.as_softcap(softcap),
        window_left=window_left,
        window_right=window_right,
        tanh_gate=gate_activation == "tanh",
    )


def refuse(error: RuntimeError, check: Callable[..., Any], *given: Any) -> NoReturn:
    """Raises what is wrong with the arguments in the words of the public function, else the operator's error."""
    try:
        check(*given)
    except (TypeError, ValueError) as named:
        raise named from error
    raise error


def blame_layout(error: Exception, call: Call) -> None:
    """Raises that heads and tokens of a packed call are swapped, if its lengths say so; after an error."""
    assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
    if call.query.device.type == "cpu" and has_values(call.cu_seqlens_q):
        totals = int(call.cu_seqlens_q[-1]), int(call.cu_seqlens_k[-1])
        if totals == (call.query.shape[1], call.key.shape[1]) != (call.query.shape[2], call.key.shape[2]):
            raise ValueError(f"{VARLEN.swap()}") from error


def from_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    gate: Tensor | float | None,
    cache_seqlens: Tensor | int,
    cache_leftpad: Tensor | None,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool | None,
    softmax_scale: float | None,
    causal: bool | None,
    window_size: tuple[int, int] | None,
    softcap: float | None,
    num_splits: int,
    gate_activation: str,
    prompt_index: Tensor | None,
    sinks: Tensor | None = None,
) -> CacheCall:
    """[B, T, H, D] queries against caches [B, S, Hkv, D] or pages [num_pages, page, Hkv, D], flash-attn's rules."""
    if causal is None:
        raise TypeError(
            "zero_init_attention_with_kvcache needs causal: flash_attn_with_kvcache's default is False, the default of "
            "this function was True. Pass causal=True (a query sees the keys up to its own) or causal=False (all keys)"
        )
    checks.check_storage(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        k=k,
        v=v,
        prompt_k=prompt_k,
        prompt_v=prompt_v,
        gate=gate,
        cache_seqlens=cache_seqlens,
        cache_leftpad=cache_leftpad,
        cache_batch_idx=cache_batch_idx,
        block_table=block_table,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        prompt_index=prompt_index,
        sinks=sinks,
    )
    layout = "[B, S, Hkv, D]" if block_table is None else "[num_pages, page_size, Hkv, D]"
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError(
                "cache_batch_idx and block_table both say where a sequence's keys are: pass one of them, "
                "cache_batch_idx for contiguous caches [B_cache, S, Hkv, D], block_table for pages"
            )
        layout = "[B_cache, S, Hkv, D]"
    checks.check_tensor("q", q, 4, "[B, T, Hq, D]")
    checks.check_tensor("k_cache", k_cache, 4, layout, like=q)
    checks.check_tensor("v_cache", v_cache, 4, layout, like=q)
    batch, _, _, head_dim = q.shape
    blocks, slots, heads_kv, _ = k_cache.shape
    if cache_batch_idx is not None:  # each sequence has one page, a row of the caches
        block_table = checks.as_rows("cache_batch_idx", cache_batch_idx, batch, blocks, "k_cache")[:, None]
    if block_table is None:
        checks.check_shape("k_cache", k_cache, (batch, slots, heads_kv, head_dim), free=(1, 2))
    else:
        checks.check_shape("k_cache", k_cache, (blocks, slots, heads_kv, head_dim), free=(0, 1, 2))
    checks.check_shape("v_cache", v_cache, k_cache.shape)
    checks.check_groups(CACHED, q, k_cache, ("q", "k_cache"))
    checks.check_written("k_cache", k_cache)
    checks.check_written("v_cache", v_cache)
    if k is not None and v is not None:
        if checks.share_memory(k_cache, v_cache) or checks.overlaps(k_cache) or checks.overlaps(v_cache):
            raise ValueError(
                "to append, k_cache and v_cache must be two caches that share no memory, in which every sequence has "
                f"slots of its own, not expanded ones; got strides {k_cache.stride()} and {v_cache.stride()}"
            )
        checks.check_tensor("k", k, 4, "[B, T_new, Hkv, D]", like=q)
        checks.check_tensor("v", v, 4, "[B, T_new, Hkv, D]", like=q)
        # in this order: torch.compile keeps what is asked, and right calls differ in k.shape[1] alone
        swapped = k.shape[2] != heads_kv and k.shape[1] == heads_kv
        checks.check_shape(
            "k",
            k,
            (batch, k.shape[1], heads_kv, head_dim),
            free=(1,),
            hint=f"; it seems that {CACHED.swap('k and v')}" if swapped else "",
        )
        checks.check_shape("v", v, k.shape)
        for name, read in (("q", q), ("k", k), ("v", v), ("prompt_k", prompt_k), ("prompt_v", prompt_v)):
            if isinstance(read, Tensor) and any(checks.share_memory(c, read) for c in (k_cache, v_cache)):
                raise ValueError(
                    f"{name} shares memory with k_cache or v_cache, which this call writes: pass {name}.clone()"
                )
        k, v = dense_rows(k), dense_rows(v)
    elif k is not None or v is not None:
        raise ValueError(
            "k and v must be given together, or neither: they are appended to the caches as a pair"
        )
    if not isinstance(cache_seqlens, Tensor):
        if not 0 <= checks.as_int("cache_seqlens", cache_seqlens) < 2**31:
            raise ValueError(f"cache_seqlens must lie in 0 .. 2**31 - 1, got {cache_seqlens}")
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    cache_seqlens = checks.as_int32("cache_seqlens", cache_seqlens, 1)
    checks.check_shape("cache_seqlens", cache_seqlens, (batch,))
    if cache_leftpad is not None:
        cache_leftpad = checks.as_int32("cache_leftpad", cache_leftpad, 1)
        checks.check_shape("cache_leftpad", cache_leftpad, (batch,))
    if block_table is not None:
        block_table = checks.as_int32("block_table", block_table, 2)
        checks.check_shape("block_table", block_table, (batch, block_table.shape[1]), free=(1,))
    if rotary_cos is not None or rotary_sin is not None:
        rotary_cos, rotary_sin = checks.as_rotary(rotary_cos, rotary_sin, q, head_dim)
        if rotary_interleaved is None:
            raise TypeError(
                "rotary_cos and rotary_sin need rotary_interleaved: flash_attn_with_kvcache's default is True, the "
                "default of this function was False. Pass True (pairs of dimensions 2i and 2i + 1, GPT-J) or False "
                "(i and i + rotary_dim / 2, GPT-NeoX and Llama in transformers)"
            )
    if checks.as_int("num_splits", num_splits) < 0:
        raise ValueError(f"num_splits must be 0 (choose) or positive, got {num_splits}")
    window_left, window_right = checks.as_window(window_size, causal)
    prompt_index = checks.as_prompt_index(prompt_index, batch)
    sinks = checks.as_sinks(sinks, q, q.shape[2])
    prompt_k, prompt_v, gate = prompt_table(
        CACHED,
        ("prompt_k", "prompt_v"),
        (prompt_k, prompt_v),
        gate,
        prompt_index,
        q,
        k_cache,
        batch,
        gate_activation,
    )
    return CacheCall(
        query=dense_rows(q),
        key_cache=k_cache,
        value_cache=v_cache,
        new_key=k,
        new_value=v,
        prompt_key=prompt_k,
        prompt_value=prompt_v,
        gate=gate,
        sinks=sinks,
        prompt_index=prompt_index,
        cache_seqlens=cache_seqlens,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=bool(rotary_interleaved),
        scale=checks.as_scale(softmax_scale, head_dim),
        softcap=checks.as_softcap(softcap),
        window_left=window_left,
        window_right=window_right,
        tanh_gate=gate_activation == "tanh",
        num_splits=num_splits,
    )


def from_prompt_branch(
    out: Tensor,
    q: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    gate: Tensor | float,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    softmax_scale: float | None,
    softcap: float | None,
    gate_activation: str,
    prompt_index: Tensor | None,
) -> PromptCall:
    """Of queries [B, T, Hq, D], or packed ones [total, Hq, D]."""
    checks.check_storage(
        q=q,
        out=out,
        prompt_k=prompt_k,
        prompt_v=prompt_v,
        gate=gate,
        cu_seqlens=cu_seqlens,
        prompt_index=prompt_index,
    )
    packed = isinstance(q, Tensor) and q.dim() == 3
    layout = PACKED_BRANCH if packed else BRANCH
    dims, written = (3, "[total, Hq, D]") if packed else (4, "[B, T, Hq, D] (or packed [total, Hq, D])")
    checks.check_tensor("q", q, dims, written)
    checks.check_tensor("out", out, dims, written, like=q)
    checks.check_shape("out", out, q.shape)
    if not isinstance(prompt_k, Tensor) or prompt_k.dim() not in (3, 4):
        came = tuple(prompt_k.shape) if isinstance(prompt_k, Tensor) else type(prompt_k).__name__
        raise TypeError(f"prompt_k must be a tensor [N, P, Hkv, D] or [P, Hkv, D], got {came}")
    checks.check_groups(layout, q, prompt_k, ("q", "prompt_k"))
    q = _under_autocast(q, q, q)[0]
    batch, longest = q.shape[0], q.shape[dims - 3]
    if packed:
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, q.shape[0]], dtype=torch.int32, device=q.device)
        cu_seqlens = checks.as_int32("cu_seqlens", cu_seqlens, 1)
        if cu_seqlens.shape[0] < 1:
            raise ValueError("cu_seqlens must hold B + 1 cumulative lengths, got none")
        batch = cu_seqlens.shape[0] - 1
        longest = q.shape[0] if max_seqlen is None else checks.as_length("max_seqlen", max_seqlen)
    elif cu_seqlens is not None or max_seqlen is not None:
        raise ValueError(
            f"cu_seqlens and max_seqlen go with packed tensors [total, Hq, D], got q of shape {tuple(q.shape)}"
        )
    prompt_index = checks.as_prompt_index(prompt_index, batch)
    key, value, gates = prompt_table(
        layout,
        ("prompt_k", "prompt_v"),
        (prompt_k, prompt_v),
        gate,
        prompt_index,
        q,
        prompt_k,
        batch,
        gate_activation,
    )
    assert key is not None and value is not None and gates is not None
    return PromptCall(
        out=out.transpose(0, 1).unsqueeze(0) if packed else out.transpose(1, 2),
        query=_packed_rows(q) if packed else dense_rows(q).transpose(1, 2),
        prompt_key=key.transpose(1, 2),
        prompt_value=value.transpose(1, 2),
        gate=gates,
        prompt_index=prompt_index,
        cu_seqlens=cu_seqlens,
        max_seqlen=longest,
        scale=checks.as_scale(softmax_scale, q.shape[-1]),
        softcap=checks.as_softcap(softcap),
        tanh_gate=gate_activation == "tanh",
    )


def _from_causal_bias(
    mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor
) -> tuple[Tensor | None, bool]:
    """(mask, is it causal and aligned at the end) of a `torch.nn.attention.bias.CausalBias`, whose storage is
    empty."""
    module = sys.modules.get("torch.nn.attention.bias")
    if module is None or not isinstance(mask, module.CausalBias):
        return mask, False
    if is_causal:
        raise ValueError(
            "attn_mask is a CausalBias and is_causal is set: leave one of the two out, as for SDPA"
        )
    sizes = mask.seq_len_q, mask.seq_len_kv
    if isinstance(query, Tensor) and isinstance(key, Tensor) and query.dim() == key.dim() == 4:
        lengths = query.shape[2], key.shape[2]
        if sizes != lengths:
            raise ValueError(
                f"attn_mask is a CausalBias of {sizes[0]} queries and {sizes[1]} keys, there are {lengths[0]} and "
                f"{lengths[1]}"
            )
    if mask.variant == module.CausalVariant.LOWER_RIGHT or sizes[0] == sizes[1]:
        return None, True
    device = query.device if isinstance(query, Tensor) else None
    return torch.ones(sizes, dtype=torch.bool, device=device).tril(), False


def _under_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast all three in its dtype, as scaled_dot_product_attention has them."""
    if not isinstance(query, Tensor):
        return query, key, value
    device = query.device.type
    if not has_autocast(device) or not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (query, key, value)
    )


def _packed_rows(tensor: Tensor) -> Tensor:
    return dense_rows(tensor).transpose(0, 1).unsqueeze(0)
