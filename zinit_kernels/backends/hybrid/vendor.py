"""PyTorch's own attention kernels that return the log-sum-exp: the one place that knows their operators.

`scaled_dot_product_attention` keeps the log-sum-exp to itself, so the operators beneath it are called: on an NVIDIA GPU
cuDNN's or flash-attention's, on a CPU the one that the tests stand on. All of them return natural logarithms and align
a causal mask at the first key. cuDNN and flash-attention store their output in the order of dimensions that the query
has in memory.

An operator's backward reads `out` for rowsum(dO * out), so it must be given the output of the tokens alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

_ATEN = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]
# With this experimental setting cuDNN's log-sum-exp has another layout, which its backward then expects.
_CUDNN_IS_RAGGED = os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") == "1"
_CUDNN_MAX_HEAD_DIM = 128  # of its backward on every chip
_cudnn_lse_dims = (
    0  # of the log-sum-exp as cuDNN's forward returns it, [B, H, T, 1] up to torch 2.13; 0: not seen yet
)


class Vendor(NamedTuple):
    """Attention of query [B, Hq, T, D] to key and value [B, Hkv, S, D], without dropout.

    forward: (query, key, value, is_causal, scale) -> (out, lse float32 [B, Hq, T] contiguous). backward: (grad_out,
    query, key, value, out, lse, is_causal, scale) -> gradients of query, key and value. empty_out: memory for `out`,
    as backward reads it without a copy, for a query.
    """

    forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    backward: Callable[..., Gradients]
    empty_out: Callable[[Tensor], Tensor]


def of_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Vendor:
    """The one that scaled_dot_product_attention would choose, or flash-attention where that is none of these."""
    if query.is_cpu:
        return CPU
    return CUDNN if _is_cudnn_chosen(query, key, value, is_causal, scale) else FLASH


def of_backward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Vendor:
    """It need not be that of the forward: each reads the same `out` and log-sum-exp."""
    if query.is_cpu:
        return CPU
    return CUDNN if _cudnn_lse_dims and _is_cudnn_chosen(query, key, value, is_causal, scale) else FLASH


def _is_cudnn_chosen(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> bool:
    if _CUDNN_IS_RAGGED or query.shape[-1] > _CUDNN_MAX_HEAD_DIM:
        return False
    is_grouped = query.shape[1] != key.shape[1]
    chosen = torch._fused_sdp_choice(
        query, key, value, None, 0.0, is_causal, scale=scale, enable_gqa=is_grouped
    )
    return chosen == SDPBackend.CUDNN_ATTENTION.value


def _unused(query: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """In the place of the state of the random numbers, which nobody reads where there is no dropout."""
    return query.new_empty(shape, dtype=dtype)


def token_major_like(tensor: Tensor) -> Tensor:
    """[B, H, T, D] stored as [B, T, H, D]."""
    batch, heads, seqlen, head_dim = tensor.shape
    return tensor.new_empty((batch, seqlen, heads, head_dim)).transpose(1, 2)


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    found: Any = _ATEN._scaled_dot_product_flash_attention.default(
        query, key, value, 0.0, is_causal, False, scale=scale
    )
    return found[0], found[1]


def _flash_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:  # fmt: skip
    return _ATEN._scaled_dot_product_flash_attention_backward.default(
        grad_out, query, key, value, out, lse, None, None, query.shape[2], key.shape[2], 0.0, is_causal,
        _unused(query, torch.uint64, 2), _unused(query, torch.uint64), scale=scale,
    )  # fmt: skip


def _cudnn_forward(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    global _cudnn_lse_dims
    found: Any = _ATEN._scaled_dot_product_cudnn_attention.default(
        query, key, value, None, True, 0.0, is_causal, False, scale=scale
    )
    out, lse = found[0], found[1]
    _cudnn_lse_dims = lse.dim()
    return out, lse.view(query.shape[:3])


def _cudnn_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:  # fmt: skip
    if grad_out.stride() != out.stride():  # a plan that is kept may have been made for the strides of `out`
        grad_out = torch.empty_like(out).copy_(grad_out)
    return _ATEN._scaled_dot_product_cudnn_attention_backward.default(
        grad_out, query, key, value, out, lse.unsqueeze(-1) if _cudnn_lse_dims == 4 else lse,
        _unused(query, torch.int64), _unused(query, torch.int64), None, None, None, query.shape[2], key.shape[2],
        0.0, is_causal, scale=scale,
    )  # fmt: skip


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu.default(
        query, key, value, 0.0, is_causal, scale=scale
    )
    return out, lse.contiguous()


def _cpu_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:  # fmt: skip
    return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default(
        grad_out, query, key, value, out, lse, 0.0, is_causal, scale=scale
    )


FLASH = Vendor(_flash_forward, _flash_backward, token_major_like)
CUDNN = Vendor(_cudnn_forward, _cudnn_backward, torch.empty_like)
CPU = Vendor(_cpu_forward, _cpu_backward, torch.empty_like)
