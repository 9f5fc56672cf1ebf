"""Quantised bases: a frozen model whose linear layers are kept in fewer bits, for decoding and for training on it.

    base = load_base(folder, quantise="int4")
    quantise(base, "int8")                     # or in place, of a base that is loaded

| format | where | kept by | what |
| --- | --- | --- | --- |
| int8, int4 | CPU | `zinit_kernels.packed` | linear layers, the embedding and the output (these in 8 bits) |
| int8, int4 | other devices | torchao | the linear layers of all layers |
| nf4, fp8 | everywhere | torchao | the linear layers of all layers |

Norms stay as they are. The weights stay quantised while an adapter or a LoRA is trained. The backward pass keeps a
layer's quantised weight alone and makes its numbers once more; torch's own formula for a linear layer would keep those
numbers, in full size, for every layer at once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from zinit_kernels.packed import Packed, PackedEmbedding, PackedLinear, PackedWeight
from zinit_kernels.packed import quantise as packed_codes

from .errors import UserError, is_out_of_memory
from .fingerprint import adapter_metadata, run_fingerprints
from .llama import Llama

FORMATS = ("int8", "int4", "nf4", "fp8")
PACKED = {"int8": 8, "int4": 4}  # the formats of packed weights -> bits of a weight
_EDGES = ("embed_tokens", "lm_head")  # 8 bits in either format: few weights, and they decide between tokens


def add_option(parser: argparse._ActionsContainer) -> None:
    """--quantise, with one meaning in every program."""
    parser.add_argument(
        "--quantise",
        choices=FORMATS,
        help="keep the base's weights in fewer bits: int8 and int4 by this package's kernels on a CPU, the others, "
        "and other devices, by torchao (default: as they are)",
    )


def is_packed_format(format: str | None, device: torch.device | str) -> bool:
    """Whether a base of this format is packed by `zinit_kernels.packed` on this device, and not by torchao."""
    return format in PACKED and torch.device(device).type == "cpu"


def quantise(base: Llama, format: str | None) -> Llama:
    """Quantises a base in place, one layer after the other; None leaves it as it is. What is packed already stays.

    The model keeps the fingerprints of the weights that it had. Raises UserError for weights that cannot be quantised,
    and where torchao cannot.
    """
    if format is None:
        return base
    if is_packed_format(format, base.device):
        base.fingerprints = adapter_metadata(base)
        _pack(base, format)
    else:
        base.fingerprints = adapter_metadata(base) | run_fingerprints(base)
        _quantise_by_torchao(base, format)
    return base


def put_packed(model: Llama, weights: Mapping[str, PackedWeight], dtype: torch.dtype) -> None:
    """Replaces the modules whose weights these are, by their names in the model's state."""
    for name, weight in weights.items():
        path = name.removesuffix(".weight")
        kind = PackedEmbedding if isinstance(model.get_submodule(path), nn.Embedding) else PackedLinear
        model.set_submodule(path, kind(weight, dtype))


def is_quantised(model: Llama) -> bool:
    """Whether some weight of the model is quantised."""
    return any(isinstance(module, (Packed, QuantisedLinear)) for module in model.modules())


def kept_as(model: Llama, format: str | None) -> str | None:
    """A format as checkpoints name it: packed weights are other numbers than torchao's of the same format."""
    return f"packed {format}" if is_packed_format(format, model.device) else format


def num_weights(model: Llama) -> int:
    """The numbers that the model's frozen weights stand for."""
    packed = sum(module.rows * module.columns for module in model.modules() if isinstance(module, Packed))
    return packed + sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)


def stored_weights(model: Llama) -> list[Tensor]:
    """The tensors in which the model's frozen weights are kept, those of packed layers as they are packed."""
    packed = [module.weight for module in model.modules() if isinstance(module, Packed)]
    return packed + [parameter for parameter in model.parameters() if not parameter.requires_grad]


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


def _pack(base: Llama, format: str) -> None:
    dtype = base.dtype
    for path, module in _plain_layers(base, nn.Linear, nn.Embedding):
        try:
            weight = packed_codes(module.weight, 8 if path in _EDGES else PACKED[format])
        except ValueError as error:
            raise UserError(f"--quantise {format}: {path}.weight cannot be quantised: {error}.") from error
        put_packed(base, {f"{path}.weight": weight}, dtype)


def _plain_layers(base: nn.Module, *kinds: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    """The modules of these kinds, by their paths, without the factors of a LoRA."""
    found = [(path, module) for path, module in base.named_modules() if isinstance(module, kinds)]
    return ((path, module) for path, module in found if "lora_" not in path)


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
    """The numbers that a weight of torchao's stands for."""
    if hasattr(weight, "get_original_weight"):  # nf4, whose `dequantize` looks up single values
        return weight.get_original_weight()
    return weight.dequantize()


def _quantise_by_torchao(base: Llama, format: str) -> None:
    config = _torchao_config(format)
    try:
        from torchao.quantization import quantize_

        for path, linear in _plain_layers(base.layers, nn.Linear):
            quantize_(linear, config(linear.weight))
            base.layers.set_submodule(path, QuantisedLinear(linear.weight))
    except (ImportError, RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")
        raise UserError(f"--quantise {format} cannot be done on {base.device.type}: {reason}.") from error


def _torchao_config(format: str) -> Callable[[Tensor], Any]:
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
