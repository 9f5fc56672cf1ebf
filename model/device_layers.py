"""The next tokens of cached sequences through all layers on a GPU, in five or six launches a layer.

Composed of PyTorch's operators a layer takes 29. Norms, products, SwiGLU and residuals are launches of one Triton
kernel here (`zinit_kernels/few_rows.py`), and attention is the call that it is elsewhere. Where that kernel is not
proven, or not the faster one on this chip, the layers are called one by one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zinit_kernels import few_rows

from .layer_weights import LayerWeights, may_decode


class DeviceLayers(LayerWeights):
    """A model's weights, layer by layer."""

    BACKENDS = ("auto", "triton")

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.usable &= bool(self.weights) and not any(
            self.schemes
        )  # packed weights have products of their own
        size, count = len(few_rows.Weights._fields), len(model.layers) if self.usable else 0
        weights = [few_rows.Weights(*self.weights[size * i : size * (i + 1)]) for i in range(count)]
        self.layers = few_rows.Layers(weights, model.config.norm_eps)

    def takes(self, model: nn.Module, x: Tensor) -> bool:
        """Whether the kernel stands for the layers of x [M, C]. The first time it may be tried and timed."""
        named = {layer.self_attn.backend for layer in model.layers}
        return not self.layers.why_not(x, "triton" if named == {"triton"} else "auto")

    def run(self, model: nn.Module, x: Tensor, adapter: Any, layout: Any) -> Tensor:
        """The normed hidden states of x [B, T, C]; the cache is written, its lengths stay."""
        tokens, head_dim = x.shape[:2], model.config.head_dim
        flat = x.flatten(0, 1)
        for number, layer in enumerate(model.layers):
            attention = layer.self_attn
            prompt = None if adapter is None else adapter(attention)

            def attend(*projected: Tensor, attention: Any = attention, prompt: Any = prompt) -> Tensor:
                heads = (one.unflatten(0, tokens).unflatten(-1, (-1, head_dim)) for one in projected)
                return attention.attend(*heads, layout, prompt).flatten(0, 1).flatten(1).contiguous()

            flat = self.layers.run(flat, number, attend)
        normed: Tensor = model.norm(flat.view(x.shape))
        return normed


def decode(model: nn.Module, x: Tensor, adapter: Any, layout: Any) -> Tensor | None:
    """`DeviceLayers.run` of a model's next tokens; None for what the kernel does not take."""
    if not few_rows.runs_on(x.device) or not may_decode(x, layout.cache):
        return None
    layers = DeviceLayers.of(model, layout.cache)
    if not layers.usable or x.dtype != model.dtype or layers.is_hooked():
        return None
    x = x.contiguous()
    return layers.run(model, x, adapter, layout) if layers.takes(model, x.flatten(0, 1)) else None
