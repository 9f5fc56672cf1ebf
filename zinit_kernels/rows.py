"""What a LLaMA layer computes between its matrix products, row by row: norms, SwiGLU, rotary embedding, and the
cross-entropy of logits.

Each function computes values; the autograd functions that call them are in `model/layers.py` and `model/loss.py`. On a
CPU, tensors of float32, bfloat16 and float16 go through kernels that pass over the memory once (`csrc/cpu/rows.h`).
Other devices and dtypes, and builds without kernels, compute the same in PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import operators
from .backends import extension

NATIVE = extension.available("cpu")  # asked once: torch.compile cannot trace the question
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_RMS_NORM = operators.operator("rms_norm", "cpu")
_RMS_NORM_BACKWARD = operators.operator("rms_norm_backward", "cpu")
_SWIGLU, _SWIGLU_BACKWARD = operators.operator("swiglu", "cpu"), operators.operator("swiglu_backward", "cpu")
_ROTATE, _CROSS_ENTROPY = operators.operator("rotate", "cpu"), operators.operator("cross_entropy", "cpu")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) * weight over the last dimension in x's dtype, and 1 / rms(x) [..., 1] in float32 (or float64).

    x / rms(x) is rounded to x's dtype before it is multiplied by the weight, as in transformers.
    """
    if _is_native(x):
        return _RMS_NORM(x.contiguous(), weight.to(x.dtype), eps)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x))
    rstd = torch.rsqrt(norm.square() / x.shape[-1] + eps)
    return (x * rstd).to(x.dtype).mul_(weight.to(x.dtype)), rstd


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of `rms_norm` with respect to x."""
    if _is_native(x):
        return _RMS_NORM_BACKWARD(grad.to(x.dtype).contiguous(), x.contiguous(), weight.float(), rstd)
    normed = x * rstd
    grad_normed = grad * weight.to(normed.dtype)
    along = (grad_normed * normed).mean(-1, keepdim=True)
    return grad_normed.sub_(normed.mul_(along)).mul_(rstd).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, with silu(gate) rounded to its dtype."""
    if _is_native(gate) and gate.dtype == up.dtype:
        return _SWIGLU(gate.contiguous(), up.contiguous())
    return F.silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `swiglu` with respect to gate and up."""
    if _is_native(gate) and grad.dtype == gate.dtype == up.dtype:
        return _SWIGLU_BACKWARD(grad.contiguous(), gate.contiguous(), up.contiguous())
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, backwards: bool = False) -> Tensor:
    """Turns x [..., H, D] by the angles of cos, sin [..., 1, D/2] (by the opposite ones with `backwards`), in the
    half-split convention."""
    if _is_native(x) and cos.dtype == sin.dtype == torch.float32 and _one_row_for_a_token(x, cos):
        half = x.shape[-1] // 2
        return _ROTATE(x.contiguous(), cos.reshape(-1, half), sin.reshape(-1, half), backwards)
    if backwards:
        sin = -sin
    first, second = x.to(_wide(x)).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def cross_entropy_(logits: Tensor, targets: Tensor, wants_gradient: bool) -> Tensor:
    """-log p(target) [N] of logits [N, V], float32. With wants_gradient the logits become their gradient, in place:
    softmax - onehot.

    targets: int64 [N], each in 0 .. V - 1.
    """
    if _is_native(logits):
        return _CROSS_ENTROPY(logits, targets, wants_gradient)
    targets = targets[:, None]
    wide = logits.to(_wide(logits))
    lse = wide.logsumexp(-1, keepdim=True)
    loss = (lse - wide.gather(-1, targets))[:, 0].float()
    if wants_gradient:
        grad = wide.sub_(lse).exp_()
        grad.scatter_add_(-1, targets, grad.new_full((), -1.0).expand_as(targets))
        if grad is not logits:
            logits.copy_(grad)
    return loss


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _one_row_for_a_token(x: Tensor, cos: Tensor) -> bool:
    """Whether cos is [T, 1, D/2] for x [..., T, H, D] with whole heads, or has all of x's leading dimensions."""
    leading = cos.shape[:-2]
    return (
        x.dim() >= 3
        and cos.dim() >= 3
        and cos.shape[-2] == 1
        and 2 * cos.shape[-1] == x.shape[-1]
        and x.shape[-2] > 0
        and leading == x.shape[-2 - len(leading) : -2]
    )


def _is_native(x: Tensor) -> bool:
    """Whether the kernels take this tensor."""
    return NATIVE and x.device.type == "cpu" and x.dtype in _FLOATS and x.shape[-1] > 0
