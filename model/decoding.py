"""The next tokens of cached sequences through all layers in one call of the CPU kernels.

A decoded token reads every weight once. In a model of 135 million parameters that takes 5 ms, and the 400 calls that
its layers are made of would take 2 ms more. The operator `decode_layers` does them in one: norm, query, key and value
products, rotary embedding, cache, attention with its gated prompts, output product and residual, norm, SwiGLU and its
products, for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zinit_kernels import operators
from zinit_kernels.packed import NATIVE, PackedLinear
from zinit_kernels.projected import Stamp, stamp

MOST_TOKENS = 32  # in one call; the operator takes 64, but a prefill's products are faster beyond this
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DECODE = operators.operator("decode_layers", "cpu")
_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip


_GLOBAL_HOOKS = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)


def _is_own(module: nn.Module) -> bool:
    """Whether a module is of a class of this package, as `llama` makes it, or a list of such."""
    own = __name__.rpartition(".")[0]
    return type(module) is nn.ModuleList or type(module).__module__ in (f"{own}.llama", f"{own}.layers")


class Prompts(NamedTuple):
    """What an adapter adds to all layers, as the operator takes it."""

    tensors: list[Tensor]  # key [N, P, Hkv, D], value, gate [N or 1, Hq] of each adapted layer
    layers: list[int]
    index: Tensor | None
    tanh: bool


class Decoder:
    """A model's weights in the order of the operator. They are looked up once, and again where one was replaced.

    So are the prompts of an adapter that says what they are made of (`LlamaAdapter.made_of`). Asking it for the prompts
    of 30 layers takes 0.5 ms a token, as much as a tenth of the weights' read at 4 bits.
    """

    def __init__(self, model: nn.Module):
        self.places: list[tuple[dict[str, Any], str, Tensor]] = []  # where each weight was found
        self.schemes: list[int] = []
        self.hooks: list[dict[int, Any]] = []  # of every module that the operator stands for
        self.usable = self._collect(model)
        # They hold on to the memory: so an address below cannot belong to another tensor by the next call.
        self.norm, *self.weights = [tensor.detach() for _, _, tensor in self.places] or [torch.empty(0)]
        self._tensors = [tensor for _, _, tensor in self.places]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._kept: tuple[Callable[[Any], Any], Stamp, Prompts] | None = None

    def _collect(self, model: nn.Module) -> bool:
        """Whether the operator computes what the layers would."""
        dtype = model.dtype
        for module in (model.norm, model.layers, *model.layers.modules()):
            # linear layers are looked at below; another class of any other module may compute anything
            if "forward" in vars(module) or not (
                isinstance(module, nn.Linear | PackedLinear) or _is_own(module)
            ):
                return False
            self.hooks += (module._forward_hooks, module._forward_pre_hooks)
        if dtype not in _DTYPES or not self._add_norm(model.norm, dtype):
            return False
        for layer in model.layers:
            if not self._add_norm(layer.input_layernorm, dtype) or layer.self_attn.backend not in (
                "auto",
                "cpu",
            ):
                return False
            for name in _LINEARS:
                if name == "mlp.gate_proj" and not self._add_norm(layer.post_attention_layernorm, dtype):
                    return False
                parent, _, last = name.partition(".")
                if not self._add_linear(layer.get_submodule(parent), last, dtype):
                    return False
            if self.schemes[-3] != self.schemes[-2]:  # gate and up take turns over one stretch of channels
                return False
        return True

    def _add_norm(self, norm: nn.Module, dtype: torch.dtype) -> bool:
        return self._add(norm, "_parameters", dtype)

    def _add_linear(self, parent: nn.Module, name: str, dtype: torch.dtype) -> bool:
        linear = getattr(parent, name)
        if type(linear) is PackedLinear and linear.dtype == dtype:
            self.schemes.append(linear.scheme.number)
            return self._add(linear, "_buffers", torch.uint8)
        if type(linear) is nn.Linear and linear.bias is None:
            self.schemes.append(0)
            return self._add(linear, "_parameters", dtype)
        return False  # a layer with deltas, or of another package

    def _add(self, module: nn.Module, held: str, dtype: torch.dtype) -> bool:
        weight = module.__dict__[held].get("weight")
        if type(weight) not in (nn.Parameter, Tensor) or weight.dtype != dtype or not weight.is_contiguous():
            return False
        if weight.device.type != "cpu":
            return False
        self.places.append((module.__dict__[held], "weight", weight))
        return True

    @classmethod
    def of(cls, model: nn.Module, cache: Any) -> Decoder:
        """The one that the cache keeps for this model, made anew where a weight was replaced."""
        kept: tuple[nn.Module, Decoder] | None = cache.decoder
        if kept is None or kept[0] is not model or not kept[1].is_current():
            cache.decoder = kept = model, cls(model)
        return kept[1]

    def is_current(self) -> bool:
        """Whether the modules still hold these tensors, and the tensors their memory. 20 us for 30 layers."""
        for (place, name, tensor), address in zip(self.places, self._addresses, strict=True):
            if place[name] is not tensor or tensor.data_ptr() != address:
                return False
        return True

    def prompts(self, model: nn.Module, adapter: Callable[[Any], Any] | None) -> Prompts | None:
        """The prompts of all layers; None for an adapter whose prompts the operator cannot take together."""
        if adapter is None:
            return _NO_PROMPTS
        made_of = getattr(adapter, "made_of", None)
        settings, own = (None, None) if made_of is None else made_of()
        if own is None:
            return _prompts(model, adapter)
        sources = [*own, *self._tensors[3::9], *self._tensors[4::9]]  # key and value weights
        if self._kept is not None:
            owner, state, prompts = self._kept
            if owner is adapter and state.is_current(settings, sources):
                return prompts
        state_now = stamp(settings, sources)  # before the prompts: a change meanwhile is then noticed
        found = _prompts(model, adapter)
        self._kept = None if found is None or state_now is None else (adapter, state_now, found)
        return found

    def is_hooked(self) -> bool:
        """Whether somebody wants to see, or change, what a module gives. 10 us for 30 layers."""
        return any(self.hooks) or any(_GLOBAL_HOOKS)

    def run(self, model: nn.Module, x: Tensor, prompts: Prompts, cache: Any) -> Tensor:
        """The normed hidden states of x [B, T, C]; the cache is written, its lengths stay."""
        config = model.config
        return _DECODE(
            x, self.weights, self.schemes, self.norm, config.norm_eps, config.num_heads_q,
            config.num_heads_kv, config.intermediate_size, cache.keys, cache.values, cache.lengths, cache.cos,
            cache.sin, prompts.tensors, prompts.layers, prompts.index, config.head_dim**-0.5, config.window_left,
            prompts.tanh,
        )  # fmt: skip


def decode(model: nn.Module, x: Tensor, adapter: Callable[[Any], Any] | None, cache: Any) -> Tensor | None:
    """`Decoder.run` of a model's next tokens; None for what the operator does not take."""
    if (
        x.device.type != "cpu"
        or x.shape[0] * x.shape[1] > MOST_TOKENS
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or type(x) is not Tensor
        or x.dtype != cache.keys.dtype
        or not NATIVE
    ):
        return None
    decoder = Decoder.of(model, cache)
    if not decoder.usable or x.dtype != model.dtype or decoder.is_hooked():
        return None
    prompts = decoder.prompts(model, adapter)
    return None if prompts is None else decoder.run(model, x.contiguous(), prompts, cache)


_NO_PROMPTS = Prompts([], [], None, True)


def _prompts(model: nn.Module, adapter: Callable[[Any], Any]) -> Prompts | None:
    tensors: list[Tensor] = []
    layers: list[int] = []
    seen: set[tuple[Any, ...]] = set()
    for layer in model.layers:
        prompt = adapter(layer.self_attn)
        if prompt is None:
            continue
        if prompt.gate is None or prompt.key.dtype not in _DTYPES:
            return None
        key, value = (t if t.dim() == 4 else t[None] for t in (prompt.key, prompt.value))
        gate = prompt.gate if prompt.gate.dim() == 2 else prompt.gate[None]
        tensors += (key, value, gate.detach().float().contiguous())
        layers.append(layer.self_attn.layer_index)
        seen.add((prompt.gate_activation, None if prompt.index is None else id(prompt.index)))
        index = prompt.index
    if not layers:
        return _NO_PROMPTS
    if len(seen) > 1:
        return None
    return Prompts(tensors, layers, index, prompt_activation(seen))


def prompt_activation(seen: set[tuple[Any, ...]]) -> bool:
    """Whether the one gate activation of all layers is tanh."""
    ((activation, _),) = seen
    return bool(activation == "tanh")
