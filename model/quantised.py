"""A frozen base in fewer bits, by torchao: int8, int4, nf4 or fp8, while an adapter or a LoRA is trained on it.

    quantise(base, "int8")

The linear layers of all layers are quantised; the embedding, the output projection and the norms stay as they are. What
the backward pass keeps of a layer is its quantised weight: torch's own formula for a linear layer would keep the weight
that was made of it, in full size, for every layer at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .errors import UserError
from .llama import Llama

FORMATS = ("int8", "int4", "nf4", "fp8")


class QuantisedLinear(nn.Module):
    """y = W x for a frozen W that torchao quantised."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.out_features, self.in_features = weight.shape  # PEFT asks
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight)


class _Linear(torch.autograd.Function):
    """Saves the quantised weight alone, which is the base's own and alive anyway."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad @ dequantised(ctx.weight).to(grad.dtype), None


def dequantised(weight: Tensor) -> Tensor:
    """The numbers that a quantised weight stands for."""
    if hasattr(weight, "get_original_weight"):  # nf4, whose `dequantize` looks up single values
        return weight.get_original_weight()
    return weight.dequantize()


def quantise(base: Llama, format: str | None) -> Llama:
    """Quantises the base's layers in place; None leaves it as it is. Raises UserError where torchao cannot."""
    if format is None:
        return base
    config = _config(format)
    try:
        from torchao.quantization import quantize_

        for layer in base.layers:
            for name, linear in list(layer.named_modules()):
                if isinstance(linear, nn.Linear) and "lora_" not in name:
                    quantize_(linear, config(linear.weight))
                    layer.set_submodule(name, QuantisedLinear(linear.weight))
    except (ImportError, RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")
        raise UserError(f"--quantise {format} cannot be done on {base.device.type}: {reason}.") from error
    return base


def stored_bytes(tensor: Tensor) -> int:
    """Bytes in memory; of a quantised weight, those of the tensors that it consists of."""
    parts: Callable[[], Any] | None = getattr(tensor, "__tensor_flatten__", None)
    if parts is None or type(tensor) in (Tensor, nn.Parameter):
        return tensor.numel() * tensor.element_size()
    return sum(
        stored_bytes(getattr(tensor, name))
        for name in parts()[0]
        if isinstance(getattr(tensor, name), Tensor)
    )


def _config(format: str) -> Callable[[Tensor], Any]:
    """torchao's configuration for a weight."""
    try:
        if format == "nf4":
            from torchao.prototype._nf4tensor_api import NF4WeightOnlyConfig

            def nf4(weight: Tensor) -> Any:
                config = NF4WeightOnlyConfig()
                # 64 weights share a scale, and up to 256 scales are quantised together
                config.block_size, config.scaler_block_size = 64, math.gcd(256, weight.numel() // 64)
                return config

            return nf4
        from torchao import quantization
    except ImportError:
        raise UserError(
            f"--quantise {format} needs torchao 0.15 or newer, which is not installed: pip install "
            "'zinit-kernels[quantise]'."
        ) from None
    if format == "int4":
        return lambda weight: quantization.Int4WeightOnlyConfig(group_size=32)
    name = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}[format]
    return lambda weight: getattr(quantization, name)()
