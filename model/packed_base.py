"""Quantised bases: a model whose linear layers and embedding are packed when it is loaded.

The adapter trains on such a base as it is: gradients pass through the packed weights, which are not trained.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zinit_kernels.packed import Packed, PackedEmbedding, PackedLinear, PackedWeight, quantise

from .errors import UserError
from .fingerprint import adapter_metadata
from .llama import Llama

QUANTISE = {"int8": 8, "int4": 4}  # --quantise -> bits of a weight
_EDGES = ("embed_tokens", "lm_head")  # 8 bits in either: they are read and written as tokens, and few


def put_packed(model: Llama, weights: Mapping[str, PackedWeight], dtype: torch.dtype) -> None:
    """Replaces the modules whose weights these are, by their names in the model's state."""
    for name, weight in weights.items():
        path = name.removesuffix(".weight")
        kind = PackedEmbedding if isinstance(model.get_submodule(path), nn.Embedding) else PackedLinear
        model.set_submodule(path, kind(weight, dtype))


def quantise_base(model: Llama, how: str) -> Llama:
    """Packs every linear layer and the embedding that are not packed yet, one after the other, in place.

    how: "int8", or "int4": 4 bits in groups of 32, and 8 in the embedding and the output. Norms stay as they are. The
    model keeps the fingerprints of the weights that it had. Raises UserError for weights that cannot be quantised.
    """
    dtype = model.dtype
    model.fingerprints = adapter_metadata(model)
    for path, module in list(model.named_modules()):
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        bits = 8 if path in _EDGES else QUANTISE[how]
        try:
            weight = quantise(module.weight, bits)
        except ValueError as error:
            raise UserError(f"--quantise {how}: {path}.weight cannot be quantised: {error}.") from error
        put_packed(model, {f"{path}.weight": weight}, dtype)
    return model


def is_quantised(model: Llama) -> bool:
    """Whether some weight of the model is packed."""
    return any(isinstance(module, Packed) for module in model.modules())


def num_weights(model: Llama) -> int:
    """The numbers that the model's frozen weights stand for."""
    packed = sum(module.rows * module.columns for module in model.modules() if isinstance(module, Packed))
    return packed + sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)


def stored_weights(model: Llama) -> list[Tensor]:
    """The tensors in which the model's frozen weights are kept, those of packed layers as they are packed."""
    packed = [module.weight for module in model.modules() if isinstance(module, Packed)]
    return packed + [parameter for parameter in model.parameters() if not parameter.requires_grad]
