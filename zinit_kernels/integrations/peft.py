"""PEFT's adaption prompts through the fused attention: the same model, adapters and files.

    peft_model = get_peft_model(base, AdaptionPromptConfig(adapter_len=10, adapter_layers=30))
    accelerate(peft_model)

PEFT runs q_proj and o_proj of an adapted layer twice and projects its prompts for every decoded token. Here they run
once, and prompts are projected once per generation. Right here where PEFT is not (0.21):

- an output projection's bias counts once (PEFT adds it twice, so that gate 0 is not the base);
- head_dim * heads need not be the hidden size (PEFT raises);
- `adapter_names` gives every row of a batch its own adapter (PEFT ignores it without a word);
- float32 prompts go on a half-precision base without autocast (PEFT raises).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

# At the end of its import transformers puts another module in its own place. A thread that waited for that import is
# given the first module, which lacks most names; the next `import` finds the second one. So this line waits.
import transformers  # noqa: F401
from peft.tuners.adaption_prompt.layer import AdaptedAttention
from peft.tuners.adaption_prompt.model import AdaptionPromptModel
from torch import nn

from .architectures import SPLIT
from .attention import NAME, attend_by_zinit, mixed
from .layers import disabled, served_without
from .prompts import Prompts
from .recomputation import remember_blocks
from .scope import new_token
from .serving import attends_by_zinit, serving
from .usage import begin, ignored, take_used

_BASE = "__base__"  # PEFT's name for a row without an adapter
_Model = TypeVar("_Model", bound=nn.Module)


class FusedAdaptedAttention(AdaptedAttention):
    """PEFT's layer with its parameters; where the model attends by "zinit", the base's forward with prompts."""

    attends_by_zinit = True
    token: int  # by which disable_zero_init_attention names the layer; nn.DataParallel's replica has the same one

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.token = new_token()  # a copy is a layer of its own

    def forward(self, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        attention = self.model
        without = disabled.values(getattr(self, "_is_replica", False))
        if kwargs.get("cache") is not None:  # of continuous batching, which computes in a thread of its own
            without = (*without, *served_without)
        if any(self.token in tokens for tokens in without):
            return attention(**kwargs)
        if not attends_by_zinit(attention.config._attn_implementation):
            return super().forward(**kwargs)
        for layers in mixed.values():
            if attention in layers:  # the attention function takes them from there
                return attention(**kwargs)
        # each process would have the gradient of its own heads alone
        heads = attention.config.num_attention_heads
        prompts = Prompts((self.adaption_prompt,), (self.adaption_gate,), "identity", SPLIT, heads=heads)
        begin()
        output = attention(**kwargs, zinit_prompts=prompts)
        if take_used() is not attention:
            raise ignored(attention)
        return output


class FusedAdaptionPromptModel(AdaptionPromptModel):
    """PEFT's tuner; new adapters are fused too, `adapter_names` is obeyed, and continuous batching works."""

    def _create_adapted_attentions(self, config: Any, parents: list[nn.Module]) -> None:
        super()._create_adapted_attentions(config, parents)
        for parent in parents:
            _become(getattr(parent, config.target_modules), FusedAdaptedAttention)

    def generate_batch(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """transformers' own, which knows attention implementations by a list of names."""
        if adapter_names is not None:  # transformers would take any argument, and leave this one out
            raise ValueError(
                "adapter_names is not supported by generate_batch, whose requests share their batches: call generate, "
                "or set_adapter and generate_batch for the requests of each adapter"
            )
        with serving(self):
            return self.model.generate_batch(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names needs the model in eval mode; call model.eval() first")
        if getattr(self, "_is_replica", False):
            raise ValueError(
                "adapter_names is not supported under nn.DataParallel: use DistributedDataParallel, or one device"
            )
        if not attends_by_zinit(self.model.config._attn_implementation):
            raise ValueError(
                f"adapter_names needs the attention implementation {NAME!r}, which accelerate() sets; the model has "
                f"{self.model.config._attn_implementation!r}"
            )
        layers = self._mixed_layers(adapter_names)
        if any(self.zinit_tokens() & tokens for tokens in disabled.values()):
            layers = dict.fromkeys(layers, _no_prompts)
        remember_blocks(self)
        with mixed.holding(layers):
            yield

    def zinit_tokens(self) -> frozenset[int]:
        """Of the layers of every adapter, those that wait outside the model included."""
        return frozenset(layer.token for layer in _adapted_layers(self))

    def _mixed_layers(self, names: list[str]) -> dict[nn.Module, Callable[[], Prompts | None]]:
        """For every attention that some adapter of this call, or the active one, has prompts for: the call's own."""
        known = {*self.peft_config, _BASE}
        if not isinstance(names, (list, tuple)) or not names:
            raise ValueError(f"adapter_names must be a list of one name for each row, got {names!r}")
        if unknown := sorted(set(names) - known):
            raise ValueError(f"adapter_names holds {unknown}; this model has {sorted(known)}")
        used = [name for name in self.peft_config if name in names]
        lengths = {name: self.peft_config[name].adapter_len for name in used}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"adapters of one batch must have one adapter_len, got {lengths}")
        layers: dict[nn.Module, dict[str, AdaptedAttention]] = {}
        for name in dict.fromkeys((*used, *self._live())):
            for layer in self._layers(name):
                layers.setdefault(layer.model, {})[name] = layer
        return {attention: partial(_mix, adapted, used, names) for attention, adapted in layers.items()}

    def _live(self) -> list[str]:
        return [self._active_adapter] if self._enabled and self._active_adapter else []

    def _layers(self, name: str) -> list[AdaptedAttention]:
        if name in self._cached_adapters:
            return self._cached_adapters[name]
        target = self.peft_config[name].target_modules
        return [getattr(parent, target) for parent in self._parents[name]]


def _no_prompts() -> None:
    return None


def _mix(adapted: dict[str, AdaptedAttention], used: list[str], names: list[str]) -> Prompts | None:
    """One layer's prompts for rows of these names; None where no row has any there.

    Made when the layer is called: Accelerate loads an offloaded layer's parameters for the time of its forward.
    """
    rows = [name for name in used if name in adapted]
    if not rows:
        return None
    order = {name: row for row, name in enumerate(rows)}
    index = torch.tensor([order.get(name, -1) for name in names], dtype=torch.int32)
    prompts = [adapted[name].adaption_prompt for name in rows]
    gates = [adapted[name].adaption_gate for name in rows]
    heads = adapted[rows[0]].model.config.num_attention_heads
    return Prompts(prompts, gates, "identity", SPLIT, index, heads=heads)


def accelerate(peft_model: _Model) -> _Model:
    """Makes an existing AdaptionPromptConfig model attend through zinit_kernels, in place, and returns it.

    State dict, set_adapter, disable_adapter, saving, loading, generate, generate_batch, gradient checkpointing, padding
    and quantised bases work as before; every adapter of the model is included, and those added later. The attention
    implementation becomes "zinit": where the fused kernels do not apply, and in layers without prompts, that is `sdpa`.
    Setting another one with `set_attn_implementation` gives PEFT's own computation back, until `accelerate` is called
    again. `continuous_batching`, `disable_zero_init_attention`, `summary` and `parameter_groups` of
    `integrations.transformers` know these models too.

    Args:
        peft_model: what `get_peft_model(base, AdaptionPromptConfig(...))` returned, on a Llama or Mistral base.

    Raises:
        TypeError: not a model with adaption prompts.
        ValueError: a GPT-2 base: PEFT adds its prompts behind the output projection, unprojected, which is not the
            paper's formula; `integrations.transformers.add_zero_init_attention` adapts GPT-2 by it. A base that does
            not take its attention from AttentionInterface, one that is divided by tensor parallelism, or one whose
            layers have other classes by now (call `accelerate` before `fully_shard`). The model is then as it was.
    """
    tuner = _tuner(peft_model)
    layers = _adapted_layers(tuner)
    for layer in layers:
        _check_class(layer, tuner.model.config.model_type)
    before = attend_by_zinit(tuner.model, (layer.model for layer in layers))
    if before != NAME or not isinstance(tuner, FusedAdaptionPromptModel):
        tuner._attention_before = before
    tuner.__class__ = FusedAdaptionPromptModel
    for layer in layers:
        _become(layer, FusedAdaptedAttention)
    return peft_model


def restore(peft_model: _Model) -> _Model:
    """Undoes `accelerate`, in place: PEFT's classes and the attention implementation from before.

    Raises:
        TypeError: not a model with adaption prompts. ValueError: one that was sharded since, by FSDP2 for example.
    """
    tuner = _tuner(peft_model)
    if isinstance(tuner, FusedAdaptionPromptModel):
        layers = _adapted_layers(tuner)
        for layer in layers:
            _check_class(layer, tuner.model.config.model_type)
        for layer in layers:
            _become(layer, AdaptedAttention)
        tuner.__class__ = AdaptionPromptModel
        if tuner.model.config._attn_implementation == NAME:
            tuner.model.set_attn_implementation(tuner._attention_before)
        del tuner._attention_before
    return peft_model


def _check_class(layer: nn.Module, model_type: str) -> None:
    """ValueError unless the layer's class can be exchanged for another one."""
    if type(layer) in (AdaptedAttention, FusedAdaptedAttention):
        return
    if isinstance(layer, AdaptedAttention):
        raise ValueError(
            f"the class of a layer is {type(layer).__name__}, which something else put in the place of PEFT's "
            "AdaptedAttention (FSDP2's fully_shard, a parametrisation): call accelerate before it, and restore not "
            "after it"
        )
    raise ValueError(
        f"PEFT's adaption prompts on {model_type!r} are added behind the output projection, which one attention "
        "call cannot do; add_zero_init_attention of zinit_kernels.integrations.transformers adapts this model by "
        "the paper's formula"
    )


def _become(layer: nn.Module, kind: type[AdaptedAttention]) -> None:
    """Exchanges the layer's class, and the forward that Accelerate's hooks call, which they keep in the layer."""
    layer.__class__ = kind
    if kind is FusedAdaptedAttention:
        layer.__dict__.setdefault("token", new_token())
    else:
        layer.__dict__.pop("token", None)
    if "_old_forward" in vars(layer):
        layer._old_forward = types.MethodType(kind.forward, layer)  # type: ignore[assignment]


def _tuner(peft_model: nn.Module) -> AdaptionPromptModel:
    tuner = getattr(peft_model, "base_model", None)
    if not isinstance(tuner, AdaptionPromptModel):
        raise TypeError(
            "expected a PeftModel with adaption prompts (AdaptionPromptConfig), got "
            f"{type(peft_model).__name__} over {type(tuner).__name__}"
        )
    return tuner


def _adapted_layers(tuner: AdaptionPromptModel) -> list[Any]:
    """Those in the model and those of the adapters that wait outside it."""
    live = [module for module in tuner.modules() if hasattr(module, "adaption_gate")]
    return live + [layer for layers in tuner._cached_adapters.values() for layer in layers]
