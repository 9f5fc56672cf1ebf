"""The attention layers of a transformers model, and the prompts in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .architectures import Projection, architecture_of, is_adaptable, missing_row
from .attention import NAME, NEEDS_KWARGS, attend_by_zinit
from .recomputation import forget_blocks
from .scope import Scope, new_token
from .usage import mark_used, unwatch, watch

# what wraps a model or a part of it gives the layers' names these parts, which say nothing about the model
_WRAPPERS = re.compile(
    r"^(base_model\.model\.|module\.)+|\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)

# The adapters (by token) that calls in a block of `disable_zero_init_attention` do without.
disabled: Scope[frozenset[int]] = Scope("zinit_disabled_adapters")

# Those that continuous batching, which computes in a thread of its own, does without: it was entered in such a block.
served_without: list[frozenset[int]] = []


class ZeroInitPrompts(nn.Module):
    """The prompts [P, C] and gates [Hq] of one attention layer. Calling it returns both, or None while disabled."""

    def __init__(self, prompt: Tensor, gate: Tensor, gate_activation: str, projection: Projection):
        super().__init__()
        self.prompt = nn.Parameter(prompt)
        self.gate = nn.Parameter(gate)
        if gate_activation == "identity":  # a mark in the state dict, which would not say it otherwise
            self.register_buffer("identity_gate", torch.ones(()))
        self.gate_activation = gate_activation
        self.projection = projection
        self.enabled = True  # for every call; `disable_zero_init_attention` is for those of one thread
        self.attention_before: str | None = None  # the implementation that the layer attended by
        self.token = new_token()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # a copy is an adapter of its own, where nn.DataParallel's replica is the same one
        self.token = new_token()

    def __getattr__(self, name: str) -> Any:
        if name == "prompt":  # somebody else's attention function may read it too, and use it
            mark_used(self)
        return super().__getattr__(name)

    def forward(self, served: bool = False) -> tuple[Tensor, Tensor] | None:
        """served: for continuous batching."""
        if not self.is_on or (served and any(self.token in tokens for tokens in served_without)):
            return None
        mark_used(self)
        own = self._parameters  # past __getattr__: 2 us a layer and token
        prompt, gate = own.get("prompt"), own.get("gate")
        if prompt is None or gate is None:  # a replica's, or parametrised
            return self.prompt, self.gate
        return prompt, gate

    @property
    def is_on(self) -> bool:
        """Whether the calling code gets these prompts."""
        if not self.enabled:
            return False
        return not any(
            self.token in tokens for tokens in disabled.values(getattr(self, "_is_replica", False))
        )

    def extra_repr(self) -> str:
        return f"{self.prompt.shape[0]} prompts, {self.gate.shape[0]} {self.gate_activation} gates"


class Layer(NamedTuple):
    name: str
    stack: str  # the list of layers it stands in, without wrappers: "model.layers"
    place: int  # in that list
    attention: Any


def used_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules, without the copies that a wrapper of PEFT's (modules_to_save) keeps beside the one in use."""
    unused: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in unused:
            unused.update(module.children())
            continue
        yield name, module
        if {"original_module", "modules_to_save"} <= module._modules.keys():
            wrapper: Any = module
            copies = dict(wrapper.modules_to_save.items())
            active = None if wrapper.disable_adapters else next(iter(wrapper.active_adapters), None)
            used = copies.get(active, wrapper.original_module)
            unused.update(part for part in (wrapper.original_module, *copies.values()) if part is not used)


def attention_layers(model: nn.Module) -> list[Layer]:
    """Every self-attention of a known architecture, bottom to top in each stack.

    Raises:
        TypeError: no module. ValueError: no attention that has a row in ARCHITECTURES, with the row to write.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    layers = [_layer(name, module) for name, module in used_modules(model) if is_adaptable(module)]
    if not layers:
        raise ValueError(missing_row(model))
    return layers


def adapters(model: nn.Module) -> Iterator[tuple[Layer, ZeroInitPrompts]]:
    """The layers with prompts, and the prompts in use there."""
    for name, module in used_modules(model):
        if "zinit" in module._modules and (adapter := _in_use(module._modules["zinit"])) is not None:
            yield _layer(name, module), adapter


def required_adapters(model: nn.Module) -> list[tuple[Layer, ZeroInitPrompts]]:
    found = list(adapters(model))
    if not found and any(True for _ in peft_layers(model)):
        raise ValueError(
            "the model has PEFT's adaption prompts, which are PEFT's to save and to take away: save_pretrained, "
            "delete_adapter"
        )
    if not found:
        raise ValueError(
            "the model has no zero-init prompts; call add_zero_init_attention(model) first, or load_adapter(model, "
            "folder), where some were saved"
        )
    return found


def peft_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with PEFT's adaption prompts (of its active adapter), accelerated or not."""
    for name, module in used_modules(model):
        if "adaption_gate" in module._parameters:
            yield name, module


def tokens_of(model: nn.Module) -> frozenset[int]:
    """Of every adapter, those not in use included: a call might switch to one."""
    tokens: set[int] = set()
    for module in model.modules():
        if isinstance(module, ZeroInitPrompts):
            tokens.add(module.token)
        elif hasattr(type(module), "zinit_tokens"):  # an accelerated PEFT model
            own: Any = module
            tokens |= own.zinit_tokens()
    return frozenset(tokens)


def disabled_here(model: nn.Module) -> frozenset[int]:
    """Of the adapters of the model that the calling code does without."""
    return tokens_of(model) & frozenset().union(*disabled.values())


def values_of(layer: nn.Module, prompt: str = "prompt", gate: str = "gate") -> tuple[Tensor, Tensor]:
    """The parameters of these names.

    Offloaded ones are loaded for this, by the hook that Accelerate put there. Sharded ones (FSDP2) are gathered: all
    processes have to take part.
    """
    hook: Any = getattr(layer, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(layer)
    try:
        return _whole(getattr(layer, prompt)), _whole(getattr(layer, gate))
    finally:
        if hook is not None:
            hook.post_forward(layer, None)


def is_sharded(adapter: ZeroInitPrompts) -> bool:
    """Whether every process holds a part of the prompts alone."""
    return hasattr(adapter.prompt, "full_tensor")


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.detach()
    return whole.full_tensor() if hasattr(whole, "full_tensor") else whole


def sizes(attention: Any) -> tuple[int, int]:
    """(heads, hidden size)."""
    return attention.config.num_attention_heads, attention.config.hidden_size


def attach(
    model: Any, made: list[tuple[Layer, Tensor, Tensor]], gate_activation: str, dtype: torch.dtype
) -> None:
    """Gives the layers their prompts, in the place of all that the model has; what may fail comes first."""
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point one, got {dtype}")
    if any(True for _ in peft_layers(model)):
        raise ValueError(
            "the model has PEFT's adaption prompts: accelerate(model) of zinit_kernels.integrations.peft is for those"
        )
    new = []
    for layer, prompt, gate in made:
        device = _device(layer.attention)
        found = architecture_of(layer.attention)
        assert found is not None  # the layer comes from attention_layers
        adapter = ZeroInitPrompts(prompt.to(device, dtype), gate.to(device, dtype), gate_activation, found[1])
        adapter.attention_before = layer.attention.config._attn_implementation
        new.append((layer.attention, adapter.train(layer.attention.training)))
    before = {id(layer.attention): adapter.attention_before for layer, adapter in adapters(model)}
    attend_by_zinit(model, (attention for attention, _ in new))
    model.requires_grad_(False)
    _detach(model)
    for attention, adapter in new:
        adapter.attention_before = before.get(id(attention), adapter.attention_before)
        attention.zinit = adapter
        watch(attention, with_kwargs=NEEDS_KWARGS)


def detach(model: Any) -> None:
    """Takes all prompts away; the attention implementations are again those of before, unless others were set since."""
    before = [(layer.attention.config, adapter.attention_before) for layer, adapter in adapters(model)]
    _detach(model)
    if before and hasattr(model, "set_attn_implementation") and model.config._attn_implementation == NAME:
        model.set_attn_implementation(before[0][1])
        for config, implementation in before:  # a model of several parts may have had several
            config._attn_implementation = implementation


def _detach(model: nn.Module) -> None:
    forget_blocks(model)
    for module in list(model.modules()):
        if "zinit" in module._modules:
            del module.zinit
            unwatch(module)


def plain_name(name: str) -> str:
    """A module's name without the wrappers around the model and its parts."""
    return _WRAPPERS.sub("", name)


def _layer(name: str, attention: nn.Module) -> Layer:
    found = re.match(r"(.*?)\.?\b(\d+)\.", f"{plain_name(name)}.")
    return Layer(name, found[1] if found else "", int(found[2]) if found else 0, attention)


def _in_use(child: nn.Module | None) -> ZeroInitPrompts | None:
    """The prompts that a call of `child` gives: its own, or, in a wrapper (PEFT's modules_to_save), the active ones."""
    parts = used_modules(child) if child is not None else ()
    return next((module for _, module in parts if isinstance(module, ZeroInitPrompts)), None)


def _device(attention: nn.Module) -> torch.device:
    """Where the layer computes: that of its parameters, or, while these are offloaded, that of Accelerate's hooks."""
    devices = [parameter.device for parameter in attention.parameters()]
    for device in devices:
        if device.type != "meta":
            return device
    for module in attention.modules():
        execution_device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if execution_device is not None:
            return torch.device(execution_device)
    return devices[0]
