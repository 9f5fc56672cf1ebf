"""Prompt tables, gates and masks: from what users pass to the form that all calls have."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .call import GATE_ACTIVATIONS
from .checks import WHOLE, Layout

MAX_PROMPT_LENGTH = 128


def prompt_table(
    layout: Layout,
    names: tuple[str, str],
    tables: tuple[Tensor | None, Tensor | None],
    gate: Tensor | float | None,
    prompt_index: Tensor | None,
    query: Tensor,
    key: Tensor,
    batch: int,
    gate_activation: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Checked prompt tables of four dimensions and the gate, float32 [1 or N, Hq], or three Nones."""
    prompt_key, prompt_value = tables
    if gate_activation not in GATE_ACTIVATIONS:
        raise ValueError(f"gate_activation must be one of {GATE_ACTIVATIONS}, got {gate_activation!r}")
    if prompt_key is None and prompt_value is None:
        if gate is not None or prompt_index is not None:
            raise ValueError(
                f"gate and prompt_index need {names[0]} and {names[1]}; without prompts leave them out too"
            )
        return None, None, None
    if prompt_key is None or prompt_value is None or gate is None:
        raise ValueError(f"{names[0]}, {names[1]} and gate must be given together, or none of them")

    prompt_key = _prompt_tensor(layout, names[0], prompt_key, query, key)
    prompt_value = _prompt_tensor(layout, names[1], prompt_value, query, key)
    shape = prompt_key.shape
    if prompt_value.shape != shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same shape, got {tuple(shape)} and {tuple(prompt_value.shape)}"
        )
    rows, prompt_length = shape[0], shape[layout.tokens]
    if prompt_length > MAX_PROMPT_LENGTH:
        raise ValueError(
            f"at most {MAX_PROMPT_LENGTH} prompts per layer are supported, got P = {prompt_length}"
        )
    if prompt_index is None and rows not in (1, batch):
        raise ValueError(
            f"{names[0]} has {rows} rows for a batch of {batch}: give 1 row (shared), {batch} (one per sample), "
            "or say with prompt_index which row each sequence takes"
        )
    return prompt_key, prompt_value, _gate(gate, rows, query, layout)


def dense_rows(tensor: Tensor) -> Tensor:
    """Kernels take any strides with a contiguous last dimension; only the rest is copied."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _prompt_tensor(layout: Layout, name: str, table: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A checked table of four dimensions, in the function's layout."""
    if not isinstance(table, Tensor) or table.dtype not in checks.DTYPES:
        came = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(
            f"{name} must be a floating-point tensor (float32, bfloat16, float16 or float64), got {came}"
        )
    if table.dim() == 3:
        table = table.unsqueeze(0)
    heads, head_dim = key.shape[layout.heads], query.shape[-1]
    shape = table.shape
    if len(shape) != 4 or shape[layout.heads] != heads or shape[3] != head_dim:
        sizes: dict[int, int | str] = {layout.heads: heads, layout.tokens: "P"}
        expected = ("N", sizes[-3], sizes[-2], head_dim)
        tokens_q, tokens_k = query.shape[layout.tokens], key.shape[layout.tokens]
        hint = ""
        if len(shape) == 4 and shape[layout.tokens] == heads:
            hint = "; heads and prompts look swapped, use .transpose(-3, -2)"
        elif len(shape) == 4 and tokens_k in shape[1:3] and checks.are_groups(tokens_q, tokens_k):
            raise ValueError(
                f"{layout.swap()} ({name} {tuple(shape)} has {tokens_k} heads, queries and keys have {tokens_q} and "
                f"{tokens_k} where this function has the tokens)"
            )
        raise ValueError(f"{name} must have shape {checks.spell(expected)}, got {tuple(shape)}{hint}")
    return dense_rows(table)


def _gate(gate: Tensor | float, rows: int, query: Tensor, layout: Layout) -> Tensor:
    """[1 or N, Hq] in the softmax's precision; the raw gate, before its activation."""
    heads_q = query.shape[layout.heads]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if not isinstance(gate, Tensor):
        if not isinstance(gate, (int, float)):
            raise TypeError(f"gate must be a tensor or a number, got {type(gate).__name__}")
        return torch.full((1, heads_q), float(gate), dtype=dtype, device=query.device)
    if not gate.is_floating_point():
        raise TypeError(f"gate must be a floating-point tensor, got {gate.dtype}")
    gate = gate if gate.dtype == dtype else gate.to(dtype)
    shape = gate.shape
    if shape == (1, heads_q):
        return gate.contiguous()
    if shape in ((heads_q,), (1, heads_q, 1, 1), (1, 1, heads_q, 1)):
        return gate.reshape(1, heads_q).contiguous()  # a view of a view with gaps keeps them
    if gate.numel() == 1:
        return gate.reshape(1, 1).expand(1, heads_q).contiguous()
    if shape in ((rows, heads_q), (rows, 1)):
        return gate.expand(rows, heads_q).contiguous()
    swapped = gate.numel() == query.shape[layout.tokens]
    raise ValueError(
        f"gate must hold 1 or {heads_q} values, [Hq], [1, Hq, 1, 1], [1, 1, Hq, 1], or with a table of {rows} adapters "
        f"[{rows}, {heads_q}], got {tuple(shape)}" + (f"; unless {layout.swap()}" if swapped else "")
    )


def classify_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(key_bias, dense_mask): a mask that depends on the key alone is fused, any other is dense."""
    if mask is None:
        return None, None
    batch, heads, seqlen_q, _ = query.shape
    seqlen_k = key.shape[2]
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"attn_mask must be a bool tensor (True = attend) or an additive floating-point one, got {came}"
        )
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
            + (f"; unless {WHOLE.swap()}" if mask.shape[-1:] == key.shape[1:2] else "")
        )
    if mask.dtype == torch.float64 and query.dtype != torch.float64:
        mask = _narrowed(mask)
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


def _narrowed(mask: Tensor) -> Tensor:
    """A float64 mask in float32. What is finite stays so: a row of float64's smallest number would hide every key."""
    bound = torch.finfo(torch.float32).max
    return torch.where(mask.isinf(), mask, mask.clamp(-bound, bound)).to(torch.float32)
