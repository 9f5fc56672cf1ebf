"""The parts of a LLaMA layer between its matrix products: autograd functions that save as little as possible for the
backward pass.

A frozen linear layer saves only its weight, and attention saves what its kernel needs. So the activations that a layer
keeps in memory are those that these functions save. torch's own compositions save up to three times as much.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zinit_kernels import rows

from .config import LlamaConfig
from .rope_scaling import RopeScaling


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32, in x's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """Saves x, which is the residual stream and alive anyway, and one float per row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, rstd = rows.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, rstd = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * (x * rstd)).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = rows.rms_norm_backward(grad, x, weight, rstd)
        return grad_x, grad_weight, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Saves gate and up; the backward pass computes silu(gate) again."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return rows.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return rows.swiglu_backward(grad, *ctx.saved_tensors)


class Rotary(torch.autograd.Function):
    """Rotary embedding of [..., H, D] by cos, sin [..., 1, D/2], in the half-split convention. Saves nothing of x: the
    gradient is rotated by the opposite angle.
    """

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rows.rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return rows.rotate(grad, *ctx.saved_tensors, backwards=True), None, None


def rotary_frequencies(
    head_dim: int, rope_theta: float, scaling: RopeScaling | None, device: torch.device | str = "cpu"
) -> Tensor:
    """The angle by which each pair of a head's numbers turns from one position to the next, float32 [D/2]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequency = 1.0 / rope_theta**exponent
    if scaling is None:
        return frequency
    stretched = frequency / scaling.factor
    if scaling.kind == "linear":
        return stretched
    # full turns within the original context
    turns = scaling.original_max_seq_len * frequency / (2 * torch.pi)
    band = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / band).clamp(0, 1)
    return (1 - keep) * stretched + keep * frequency


def rotary_table(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, float32 [..., D/2] for positions [...]."""
    frequency = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, positions.device)
    angle = positions.float()[..., None] * frequency
    return angle.cos(), angle.sin()


def prepend(prompts: Tensor, tokens: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Puts prompts [P, H, D] before each sequence of packed tokens [total, H, D]. Returns [total + B P, H, D] and its
    cu_seqlens.
    """
    length = len(prompts)
    longer = cu_seqlens + length * torch.arange(
        len(cu_seqlens), device=cu_seqlens.device, dtype=cu_seqlens.dtype
    )
    sequence = torch.repeat_interleave(longer.diff())
    within = torch.arange(len(sequence), device=sequence.device) - longer[sequence]
    rows = torch.where(
        within < length, within, within + cu_seqlens[sequence]
    )  # of the prompts and the tokens
    return torch.cat([prompts, tokens])[rows], longer
