"""A linear layer of a few rows with what a LLaMA layer has around it: its formula in PyTorch, and the Triton kernel.

    y = x, or x / rms(x) * norm                     rms(x) = sqrt(mean(x^2) + eps)
    out = y W^T for each of up to three weights, or residual + y W^T, or silu(y W1^T) * (y W2^T)

x [M, K], norm [K], weights [N, K], residual [M, N], all of one dtype. The Triton kernel (`triton/few_rows.py`) takes
one launch for it and reads each weight once, for up to 32 rows of float32, bfloat16 or float16.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import rows
from . import fused, triton

MOST_ROWS = 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_COLUMNS = 1 << 24  # 64 rows of a weight stay within int32


class Product(NamedTuple):
    """What is multiplied. gated: SwiGLU of the two weights' products."""

    x: Tensor
    weights: tuple[Tensor, ...]
    norm: Tensor | None = None
    eps: float = 0.0
    residual: Tensor | None = None
    gated: bool = False

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Product:
        """With other tensors."""
        fields = self._asdict() | {"weights": tuple(change(weight) for weight in self.weights)}
        fields |= {name: change(one) for name, one in fields.items() if isinstance(one, Tensor)}
        return Product(**fields)


def composed(product: Product) -> tuple[Tensor, ...]:
    """One result for each weight, or one in all with `gated`: in PyTorch's operators, in any dtype, on any device."""
    x, weights, norm, eps, residual, gated = product
    if norm is not None:
        x, _ = rows.rms_norm(x, norm, eps)
    results = tuple(F.linear(x, weight) for weight in weights)
    if gated:
        return (rows.swiglu(*results),)
    return results if residual is None else tuple(residual + result for result in results)


def launched(product: Product) -> tuple[Tensor, ...]:
    """`composed` by one launch of the Triton kernel. The results lie side by side in one tensor [M, all N]."""
    x, weights, norm, eps, residual, gated = product
    first, second, third = (*weights, None, None)[:3]
    out = _launch()(x, norm, first, second, third, residual, float(eps), gated)
    return (out,) if len(weights) == 1 or gated else out.split([len(weight) for weight in weights], 1)


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """The reason why the kernel runs on no tensor of a device and dtype; '' where it does."""
    if triton.UNAVAILABLE:
        return triton.UNAVAILABLE
    if dtype not in DTYPES:
        return f"the kernel multiplies float32, bfloat16 and float16, got {dtype}"
    if device.type == "cpu" and triton.INTERPRETED:
        return ""
    return fused.why_not_on_chip(device)


def fits(num_rows: int, columns: int) -> bool:
    """Whether the kernel takes so many rows and columns of x."""
    return 0 < num_rows <= MOST_ROWS and 0 < columns <= _LARGEST_COLUMNS


@functools.cache
def _launch() -> Callable[..., Tensor]:
    """Imports Triton."""
    found: Callable[..., Tensor] = importlib.import_module(".triton.few_rows_launch", __package__).few_rows
    return found
