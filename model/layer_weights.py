"""The weights of a model's layers, for kernels that stand for the layers, and what those kernels cannot stand for."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from zinit_kernels.packed import PackedLinear

MOST_TOKENS = 32  # in one call; a prefill's products are faster beyond this
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip
_GLOBAL_HOOKS = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
_Own = TypeVar("_Own", bound="LayerWeights")


def _is_own(module: nn.Module) -> bool:
    """Whether a module is of a class of this package, as `llama` makes it, or a list of such."""
    own = __name__.rpartition(".")[0]
    return type(module) is nn.ModuleList or type(module).__module__ in (f"{own}.llama", f"{own}.layers")


def may_decode(x: Tensor, cache: Any) -> bool:
    """Whether kernels may stand for the layers now, of tokens [B, T, C] of a cache."""
    return x.shape[0] * x.shape[1] <= MOST_TOKENS and may_replace(x, cache)


def may_replace(x: Tensor, cache: Any) -> bool:
    """The same of any number of tokens."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled(x.device.type)
        or type(x) is not Tensor
        or x.dtype != cache.keys.dtype
    )


class LayerWeights:
    """A model's weights, looked up once, and again where one was replaced: the last norm's, and of each layer the
    norm's, query's, key's, value's and output's, and the norm's, gate's, up's and down's.

    usable: whether the kernels compute what the layers would.
    """

    BACKENDS: ClassVar[tuple[str, ...]]  # of attention, for which the kernels stand

    def __init__(self, model: nn.Module):
        self.places: list[tuple[dict[str, Any], str, Tensor]] = []  # where each weight was found
        self.modules: list[tuple[dict[str, Any], str, nn.Module]] = []  # and each module of the layers
        self.schemes: list[int] = []
        self.hooks: list[dict[int, Any]] = []  # of every module that the kernels stand for
        self.usable = self._collect(model)
        # They hold on to the memory: so an address below cannot belong to another tensor by the next call.
        self.norm, *self.weights = [tensor.detach() for _, _, tensor in self.places] or [torch.empty(0)]
        self._tensors = [tensor for _, _, tensor in self.places]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]

    def _collect(self, model: nn.Module) -> bool:
        dtype, device = model.dtype, model.device
        self.modules += [(model._modules, name, getattr(model, name)) for name in ("norm", "layers")]
        for module in model.layers.modules():
            self.modules += [(module._modules, name, child) for name, child in module.named_children()]
        for module in (model.norm, model.layers, *model.layers.modules()):
            # linear layers are looked at below; another class of any other module may compute anything
            if "forward" in vars(module) or not (
                isinstance(module, nn.Linear | PackedLinear) or _is_own(module)
            ):
                return False
            self.hooks += (module._forward_hooks, module._forward_pre_hooks)
        if dtype not in DTYPES or not self._add(model.norm, "_parameters", dtype, device):
            return False
        for layer in model.layers:
            if layer.self_attn.backend not in self.BACKENDS:
                return False
            if not self._add(layer.input_layernorm, "_parameters", dtype, device):
                return False
            for name in _LINEARS:
                if name == "mlp.gate_proj" and not self._add(
                    layer.post_attention_layernorm, "_parameters", dtype, device
                ):
                    return False
                parent, _, last = name.partition(".")
                if not self._add_linear(layer.get_submodule(parent), last, dtype, device):
                    return False
            if self.schemes[-3] != self.schemes[-2]:  # gate and up take turns over one stretch of channels
                return False
        return True

    def _add_linear(self, parent: nn.Module, name: str, dtype: torch.dtype, device: torch.device) -> bool:
        linear = getattr(parent, name)
        if type(linear) is PackedLinear and linear.dtype == dtype:
            self.schemes.append(linear.scheme.number)
            return self._add(linear, "_buffers", torch.uint8, device)
        if type(linear) is nn.Linear and linear.bias is None:
            self.schemes.append(0)
            return self._add(linear, "_parameters", dtype, device)
        return False  # a layer with deltas, or of another package

    def _add(self, module: nn.Module, held: str, dtype: torch.dtype, device: torch.device) -> bool:
        weight = module.__dict__[held].get("weight")
        if type(weight) not in (nn.Parameter, Tensor) or weight.dtype != dtype or not weight.is_contiguous():
            return False
        if weight.device != device:
            return False
        self.places.append((module.__dict__[held], "weight", weight))
        return True

    @classmethod
    def of(cls: type[_Own], model: nn.Module, cache: Any) -> _Own:
        """Those that the cache keeps for this model, made anew where a weight or a module was replaced."""
        kept: tuple[nn.Module, LayerWeights] | None = cache.decoder
        if kept is not None and kept[0] is model and type(kept[1]) is cls and kept[1].is_current():
            return kept[1]
        found = cls(model)
        cache.decoder = model, found
        return found

    def is_current(self) -> bool:
        """Whether the model still has these modules, they these tensors, and the tensors their memory. 45 us for 30
        layers."""
        for children, name, module in self.modules:
            if children.get(name) is not module:
                return False
        for (place, name, tensor), address in zip(self.places, self._addresses, strict=True):
            if place[name] is not tensor or tensor.data_ptr() != address:
                return False
        return True

    def is_hooked(self) -> bool:
        """Whether somebody wants to see, or change, what a module gives. 10 us for 30 layers."""
        return any(self.hooks) or any(_GLOBAL_HOOKS)
