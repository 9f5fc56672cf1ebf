"""From what users pass to the one canonical form that every backend takes, or to an error that says what to
change.

Nothing here computes attention. The three layouts (SDPA's, packed, cached) become `Call`s; the checks are
plain Python on shapes, dtypes and devices, so they cost no synchronisation and trace under torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .calls import CacheCall, Call

MAX_PROMPT_LENGTH = 128
GATE_ACTIVATIONS = ("tanh", "identity")


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
    gate_activation: str,
    prompt_index: Tensor | None,
) -> Call:
    """[B, H, T, D] tensors, SDPA's mask rules."""
    query, key, value = _under_autocast(query, key, value)
    checks.check_tensor("query", query, 4, "[B, Hq, T, D]")
    checks.check_tensor("key", key, 4, "[B, Hkv, S, D]", like=query)
    checks.check_tensor("value", value, 4, "[B, Hkv, S, D]", like=query)
    batch, heads_q, seqlen_q, head_dim = query.shape
    heads_kv, seqlen_k = key.shape[1], key.shape[2]
    checks.check_shape("key", key, (batch, heads_kv, seqlen_k, head_dim), free=(1, 2))
    checks.check_shape("value", value, (batch, heads_kv, seqlen_k, head_dim))
    checks.check_groups(heads_q, heads_kv, seqlen_q, "query", "[B, H, T, D]")

    window_left, window_right = _window(window_size, is_causal)
    if (window_left, window_right) != (-1, -1) and seqlen_q != seqlen_k:
        raise ValueError(
            f"is_causal and window_size need as many queries as keys here, got {seqlen_q} queries and {seqlen_k} keys: "
            "SDPA aligns the causal mask to the top left, decoding needs the bottom right. Call "
            "zero_init_attention_with_kvcache (or zero_init_attention_varlen), which align to the bottom right, "
            "or pass the mask you mean as attn_mask"
        )
    key_bias, dense_mask = _classify_mask(attn_mask, query, seqlen_k)
    prompt_key, prompt_value, gate, prompt_index = _prompt_table(
        prompt_key, prompt_value, gate, prompt_index, query, batch, heads_q, heads_kv, True, gate_activation
    )
    return Call(
        _dense_rows(query), _dense_rows(key), _dense_rows(value), prompt_key, prompt_value, gate, prompt_index,
        key_bias, dense_mask, None, None, seqlen_q, seqlen_k, _scale(scale, head_dim),
        window_left, window_right, gate_activation == "tanh",
    )  # fmt: skip


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
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int] | None,
    gate_activation: str,
    prompt_index: Tensor | None,
) -> Call:
    """Packed [total, H, D] tensors, flash-attn's rules."""
    q, k, v = _under_autocast(q, k, v)
    checks.check_tensor("q", q, 3, "[total_q, Hq, D]")
    checks.check_tensor("k", k, 3, "[total_k, Hkv, D]", like=q)
    checks.check_tensor("v", v, 3, "[total_k, Hkv, D]", like=q)
    _, heads_q, head_dim = q.shape
    checks.check_shape("k", k, (k.shape[0], k.shape[1], head_dim), free=(0, 1))
    checks.check_shape("v", v, k.shape)
    checks.check_groups(heads_q, k.shape[1], q.shape[0], "q", "[total, H, D]")
    cu_seqlens_q = checks.as_int32("cu_seqlens_q", cu_seqlens_q, 1, q)
    cu_seqlens_k = checks.as_int32("cu_seqlens_k", cu_seqlens_k, 1, q)
    if cu_seqlens_q.shape[0] < 1 or cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must both hold B + 1 cumulative lengths, got "
            f"{tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
        )
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(length, Tensor):
            raise TypeError(
                f"{name} must be a Python int, got a tensor: reading it here would stall the device"
            )
        if checks.as_int(name, length) < 0:
            raise ValueError(f"{name} must not be negative, got {length}")
    sequences = cu_seqlens_q.shape[0] - 1
    prompt_k, prompt_v, gate, prompt_index = _prompt_table(
        prompt_k, prompt_v, gate, prompt_index, q, sequences, heads_q, k.shape[1], False, gate_activation
    )
    if prompt_k is not None and prompt_v is not None:
        prompt_k, prompt_v = prompt_k.transpose(1, 2), prompt_v.transpose(1, 2)
    window_left, window_right = _window(window_size, causal)
    return Call(
        _packed_rows(q), _packed_rows(k), _packed_rows(v), prompt_k, prompt_v, gate, prompt_index, None, None,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, _scale(softmax_scale, head_dim),
        window_left, window_right, gate_activation == "tanh",
    )  # fmt: skip


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
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int] | None,
    num_splits: int,
    gate_activation: str,
    prompt_index: Tensor | None,
) -> CacheCall:
    """[B, T, H, D] queries against caches [B, S, Hkv, D] or pages [num_pages, page, Hkv, D], flash-attn's rules."""
    layout = "[B, S, Hkv, D]" if block_table is None else "[num_pages, page_size, Hkv, D]"
    checks.check_tensor("q", q, 4, "[B, T, Hq, D]")
    checks.check_tensor("k_cache", k_cache, 4, layout, like=q)
    checks.check_tensor("v_cache", v_cache, 4, layout, like=q)
    batch, seqlen_q, heads_q, head_dim = q.shape
    blocks, slots, heads_kv, _ = k_cache.shape
    if block_table is None:
        checks.check_shape("k_cache", k_cache, (batch, slots, heads_kv, head_dim), free=(1, 2))
    else:
        checks.check_shape("k_cache", k_cache, (blocks, slots, heads_kv, head_dim), free=(0, 1, 2))
    checks.check_shape("v_cache", v_cache, k_cache.shape)
    checks.check_groups(heads_q, heads_kv, seqlen_q, "q", "[B, T, H, D]")
    checks.check_written("k_cache", k_cache)
    checks.check_written("v_cache", v_cache)
    if k is not None and v is not None:
        if k_cache is v_cache or checks.overlaps(k_cache) or checks.overlaps(v_cache):
            raise ValueError(
                "to append, k_cache and v_cache must be two caches in which every sequence has slots of its own, not "
                f"expanded ones; got strides {k_cache.stride()} and {v_cache.stride()}"
            )
        checks.check_tensor("k", k, 4, "[B, T_new, Hkv, D]", like=q)
        checks.check_tensor("v", v, 4, "[B, T_new, Hkv, D]", like=q)
        checks.check_shape("k", k, (batch, k.shape[1], heads_kv, head_dim), free=(1,))
        checks.check_shape("v", v, k.shape)
        k, v = _dense_rows(k), _dense_rows(v)
    elif k is not None or v is not None:
        raise ValueError(
            "k and v must be given together, or neither: they are appended to the caches as a pair"
        )
    if not isinstance(cache_seqlens, Tensor):
        if not 0 <= checks.as_int("cache_seqlens", cache_seqlens) < 2**31:
            raise ValueError(f"cache_seqlens must lie in 0 .. 2**31 - 1, got {cache_seqlens}")
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    cache_seqlens = checks.as_int32("cache_seqlens", cache_seqlens, 1, q)
    checks.check_shape("cache_seqlens", cache_seqlens, (batch,))
    if block_table is not None:
        block_table = checks.as_int32("block_table", block_table, 2, q)
        checks.check_shape("block_table", block_table, (batch, block_table.shape[1]), free=(1,))
    if rotary_cos is not None or rotary_sin is not None:
        rotary_cos, rotary_sin = checks.as_rotary(rotary_cos, rotary_sin, q, head_dim)
    if checks.as_int("num_splits", num_splits) < 0:
        raise ValueError(f"num_splits must be 0 (choose) or positive, got {num_splits}")
    prompt_k, prompt_v, gate, prompt_index = _prompt_table(
        prompt_k, prompt_v, gate, prompt_index, q, batch, heads_q, heads_kv, False, gate_activation
    )
    window_left, window_right = _window(window_size, causal)
    return CacheCall(
        _dense_rows(q), k_cache, v_cache, k, v, prompt_k, prompt_v, gate, prompt_index, cache_seqlens, block_table,
        rotary_cos, rotary_sin, rotary_interleaved, _scale(softmax_scale, head_dim), window_left, window_right,
        gate_activation == "tanh", num_splits,
    )  # fmt: skip


def from_prompt_branch(
    out: Tensor,
    q: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    gate: Tensor | float,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    softmax_scale: float | None,
    gate_activation: str,
    prompt_index: Tensor | None,
) -> tuple[Tensor, Call]:
    """(out as [B, Hq, T, D], a call without keys) of queries [B, T, Hq, D], or packed ones [total, Hq, D]."""
    dims = q.dim() if isinstance(q, Tensor) and q.dim() == 3 else 4
    layout = "[total, Hq, D]" if dims == 3 else "[B, T, Hq, D] (or packed [total, Hq, D])"
    checks.check_tensor("q", q, dims, layout)
    checks.check_tensor("out", out, dims, layout, like=q)
    checks.check_shape("out", out, q.shape)
    if not isinstance(prompt_k, Tensor) or prompt_k.dim() not in (3, 4):
        came = tuple(prompt_k.shape) if isinstance(prompt_k, Tensor) else type(prompt_k).__name__
        raise TypeError(f"prompt_k must be a tensor [N, P, Hkv, D] or [P, Hkv, D], got {came}")
    heads_kv = prompt_k.shape[-2]
    if dims == 3:
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, q.shape[0]], dtype=torch.int32, device=q.device)
        no_keys = q.new_empty((0, heads_kv, q.shape[2]))
        return out.transpose(0, 1).unsqueeze(0), from_varlen(
            q, no_keys, no_keys, prompt_k, prompt_v, gate, cu_seqlens, torch.zeros_like(cu_seqlens),
            q.shape[0] if max_seqlen is None else max_seqlen, 0, softmax_scale, False, None, gate_activation,
            prompt_index,
        )  # fmt: skip
    if cu_seqlens is not None or max_seqlen is not None:
        raise ValueError(
            f"cu_seqlens and max_seqlen go with packed tensors [total, Hq, D], got q of shape {tuple(q.shape)}"
        )
    checks.check_groups(q.shape[2], heads_kv, q.shape[1], "q", "[B, T, H, D]")
    q = _under_autocast(q, q, q)[0]
    key, value, gates, prompt_index = _prompt_table(
        prompt_k, prompt_v, gate, prompt_index, q, q.shape[0], q.shape[2], heads_kv, False, gate_activation
    )
    assert key is not None and value is not None
    query, no_keys = _dense_rows(q).transpose(1, 2), q.new_empty((q.shape[0], heads_kv, 0, q.shape[3]))
    return out.transpose(1, 2), Call(
        query, no_keys, no_keys, key.transpose(1, 2), value.transpose(1, 2), gates, prompt_index, None, None,
        None, None, q.shape[1], 0, _scale(softmax_scale, q.shape[3]), -1, -1, gate_activation == "tanh",
    )  # fmt: skip


def _under_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast all three in its dtype, as scaled_dot_product_attention has them."""
    if not isinstance(query, Tensor):
        return query, key, value
    device = query.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (query, key, value)
    )


def _dense_rows(tensor: Tensor) -> Tensor:
    """Kernels take any strides with a contiguous last dimension; only the rest is copied."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _packed_rows(tensor: Tensor) -> Tensor:
    return _dense_rows(tensor).transpose(0, 1).unsqueeze(0)


def _scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    # numbers first: torch.compile asks a dynamic float for its type, and cannot ask it for its attributes
    if not isinstance(scale, (int, float)) and (isinstance(scale, Tensor) or not hasattr(scale, "__float__")):
        raise TypeError(
            "scale must be a Python number (no gradient flows into it, and a tensor would be read here), "
            f"got {type(scale).__name__}"
        )
    return float(scale)


def _window(window_size: tuple[int, int] | None, causal: bool) -> tuple[int, int]:
    if window_size is None or window_size == (-1, -1):
        left = right = -1
    else:
        if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
            raise TypeError(
                f"window_size must be (left, right) or None, -1 for no limit, got {window_size!r}"
            )
        left, right = (checks.as_int("window_size", side) for side in window_size)
        if left < -1 or right < -1:
            raise ValueError(f"window_size must hold numbers >= -1 (-1 = no limit), got {tuple(window_size)}")
    return left, 0 if causal else right


def _classify_mask(mask: Tensor | None, query: Tensor, seqlen_k: int) -> tuple[Tensor | None, Tensor | None]:
    """(key_bias, dense_mask): a mask that depends on the key alone is fused, any other is dense."""
    if mask is None:
        return None, None
    batch, heads, seqlen_q, _ = query.shape
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"attn_mask must be a bool tensor (True = attend) or an additive floating-point one, got {came}"
        )
    if mask.device != query.device:
        raise ValueError(f"attn_mask must be on the query's device {query.device}, got {mask.device}")
    full = (batch, heads, seqlen_q, seqlen_k)
    is_key_padding = mask.dim() == 2 and mask.shape == (batch, seqlen_k)
    is_dense_pair = mask.dim() == 2 and mask.shape[0] in (1, seqlen_q) and mask.shape[1] in (1, seqlen_k)
    if is_key_padding and is_dense_pair and batch > 1:
        raise ValueError(
            f"attn_mask of shape {tuple(mask.shape)} can mean [B, S] (key padding) and [T, S] (dense) here: "
            "pass mask[:, None, None, :] for key padding or mask[None, None] for a dense mask"
        )
    if is_key_padding and not (is_dense_pair and batch > 1):
        mask = mask[:, None, None, :]
    elif mask.dim() > 4 or any(m not in (1, f) for m, f in zip(mask.shape[::-1], full[::-1], strict=False)):
        raise ValueError(
            f"attn_mask must be a key-padding mask [B, S] = ({batch}, {seqlen_k}) or broadcast to "
            f"[B, Hq, T, S] = {full}, got {tuple(mask.shape)}"
        )
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    depends_on_key_alone = shape[1] == 1 and shape[2] == 1 and not mask.requires_grad
    if not depends_on_key_alone:
        return None, mask.reshape(shape)
    key_mask = mask.reshape(shape[0], shape[3])
    if mask.dtype == torch.bool:
        bias_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        bias = torch.zeros(key_mask.shape, dtype=bias_dtype, device=mask.device).masked_fill(
            ~key_mask, float("-inf")
        )
    else:
        bias = key_mask.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    return bias.expand(batch, seqlen_k).contiguous(), None


def _prompt_table(
    prompt_key: Tensor | None,
    prompt_value: Tensor | None,
    gate: Tensor | float | None,
    prompt_index: Tensor | None,
    query: Tensor,
    batch: int,
    heads_q: int,
    heads_kv: int,
    head_major: bool,
    gate_activation: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Checked prompt tables of four dimensions, gate float32 [1 or N, Hq] and int32 index, or four Nones."""
    names = ("prompt_key", "prompt_value") if head_major else ("prompt_k", "prompt_v")
    if gate_activation not in GATE_ACTIVATIONS:
        raise ValueError(f"gate_activation must be one of {GATE_ACTIVATIONS}, got {gate_activation!r}")
    if prompt_key is None and prompt_value is None:
        if gate is not None or prompt_index is not None:
            raise ValueError(
                f"gate and prompt_index need {names[0]} and {names[1]}; without prompts leave them out too"
            )
        return None, None, None, None
    if prompt_key is None or prompt_value is None or gate is None:
        raise ValueError(f"{names[0]}, {names[1]} and gate must be given together, or none of them")

    prompt_key = _prompt_tensor(names[0], prompt_key, query, heads_kv, head_major)
    prompt_value = _prompt_tensor(names[1], prompt_value, query, heads_kv, head_major)
    shape = prompt_key.shape
    if prompt_value.shape != shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same shape, got {tuple(shape)} and {tuple(prompt_value.shape)}"
        )
    rows, prompt_length = shape[0], shape[2 if head_major else 1]
    if prompt_length > MAX_PROMPT_LENGTH:
        raise ValueError(
            f"at most {MAX_PROMPT_LENGTH} prompts per layer are supported, got P = {prompt_length}"
        )
    if prompt_index is not None:
        prompt_index = checks.as_int32("prompt_index", prompt_index, 1, query)
        checks.check_shape("prompt_index", prompt_index, (batch,))
    elif rows not in (1, batch):
        raise ValueError(
            f"{names[0]} has {rows} rows for a batch of {batch}: give 1 row (shared), {batch} (one per sample), "
            "or say with prompt_index which row each sequence takes"
        )
    return prompt_key, prompt_value, _gate(gate, rows, heads_q, query), prompt_index


def _prompt_tensor(name: str, table: Tensor, query: Tensor, heads_kv: int, head_major: bool) -> Tensor:
    """A checked [N, Hkv, P, D] table, or [N, P, Hkv, D] where it is not head-major."""
    if not isinstance(table, Tensor) or table.dtype not in checks.DTYPES:
        came = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(
            f"{name} must be a floating-point tensor (float32, bfloat16, float16 or float64), got {came}"
        )
    if table.device != query.device:
        raise ValueError(f"{name} must be on the query's device {query.device}, got {table.device}")
    if table.dim() == 3:
        table = table.unsqueeze(0)
    heads, prompts = (1, 2) if head_major else (2, 1)
    shape, head_dim = table.shape, query.shape[-1]
    if len(shape) != 4 or shape[heads] != heads_kv or shape[3] != head_dim:
        expected = ("N", heads_kv, "P", head_dim) if head_major else ("N", "P", heads_kv, head_dim)
        swapped = len(shape) == 4 and shape[prompts] == heads_kv
        hint = "; heads and prompts look swapped, use .transpose(-3, -2)" if swapped else ""
        raise ValueError(f"{name} must have shape {checks.spell(expected)}, got {tuple(shape)}{hint}")
    return _dense_rows(table)


def _gate(gate: Tensor | float, rows: int, heads_q: int, query: Tensor) -> Tensor:
    """[1 or N, Hq] in the softmax's precision; the raw gate, before its activation."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if not isinstance(gate, Tensor):
        if not isinstance(gate, (int, float)):
            raise TypeError(f"gate must be a tensor or a number, got {type(gate).__name__}")
        return torch.full((1, heads_q), float(gate), dtype=dtype, device=query.device)
    if not gate.is_floating_point():
        raise TypeError(f"gate must be a floating-point tensor, got {gate.dtype}")
    if gate.device != query.device:
        raise ValueError(f"gate must be on the query's device {query.device}, got {gate.device}")
    gate = gate if gate.dtype == dtype else gate.to(dtype)
    shape = gate.shape
    if shape == (1, heads_q):
        return gate.contiguous()
    if shape in ((heads_q,), (1, heads_q, 1, 1), (1, 1, heads_q, 1)):
        return gate.reshape(1, heads_q)
    if gate.numel() == 1:
        return gate.reshape(1, 1).expand(1, heads_q).contiguous()
    if shape in ((rows, heads_q), (rows, 1)):
        return gate.expand(rows, heads_q).contiguous()
    raise ValueError(
        f"gate must hold 1 or {heads_q} values, [Hq], [1, Hq, 1, 1], [1, 1, Hq, 1], or with a table of {rows} adapters "
        f"[{rows}, {heads_q}], got {tuple(shape)}"
    )
