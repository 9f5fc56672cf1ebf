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

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from peft.tuners.adaption_prompt.layer import AdaptedAttention
from peft.tuners.adaption_prompt.model import AdaptionPromptModel
from torch import Tensor, nn

from .attention import NAME, attend_by_zinit
from .prompts import SPLIT, Prompts

_BASE = "__base__"  # PEFT's name for a row without an adapter
_Model = TypeVar("_Model", bound=nn.Module)


class FusedAdaptedAttention(AdaptedAttention):
    """PEFT's layer with its parameters; where the model attends by "zinit", the base's forward with prompts."""

    def forward(self, **kwargs: Any) -> tuple[Tensor, ...]:
        attention = self.model
        if attention.config._attn_implementation != NAME:
            return super().forward(**kwargs)
        prompts = Prompts(self, (self.adaption_prompt,), (self.adaption_gate,), "identity", SPLIT)
        return attention(**kwargs, zinit_prompts=prompts)


class MixedAdaptedAttention(nn.Module):
    """Stands in for one call where the rows of a batch have different adapters."""

    def __init__(self, attention: nn.Module, adapted: list[AdaptedAttention], index: Tensor):
        super().__init__()
        self.model = attention
        self.adapted = adapted
        self.index = index

    def forward(self, **kwargs: Any) -> tuple[Tensor, ...]:
        prompts = [layer.adaption_prompt for layer in self.adapted]
        gates = [layer.adaption_gate for layer in self.adapted]
        mixed = Prompts(self.adapted[0], prompts, gates, "identity", SPLIT, self.index)
        return self.model(**kwargs, zinit_prompts=mixed)


class _Turns:
    """A lock that a copied or unpickled model gets anew."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[type[_Turns], tuple[()]]:
        return _Turns, ()


class FusedAdaptionPromptModel(AdaptionPromptModel):
    """PEFT's tuner; new adapters are fused too, and `adapter_names` is obeyed, by one such call at a time."""

    _turns: _Turns

    def _create_adapted_attentions(self, config: Any, parents: list[nn.Module]) -> None:
        super()._create_adapted_attentions(config, parents)
        for parent in parents:
            getattr(parent, config.target_modules).__class__ = FusedAdaptedAttention

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names needs the model in eval mode; call model.eval() first")
        if self.model.config._attn_implementation != NAME:
            raise ValueError(
                f"adapter_names needs the attention implementation {NAME!r}, which accelerate() sets; the model has "
                f"{self.model.config._attn_implementation!r}"
            )
        with self._turns.lock:
            replaced = []
            try:
                for parent, target, layer in self._mixed_layers(adapter_names):
                    replaced.append((parent, target, getattr(parent, target)))
                    setattr(parent, target, layer)
                yield
            finally:
                for parent, target, layer in replaced:
                    setattr(parent, target, layer)

    def _mixed_layers(self, names: list[str]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
        """What stands in for each adapted attention; the base's own where only the active adapter has prompts."""
        known = {*self.peft_config, _BASE}
        if not isinstance(names, (list, tuple)) or not names:
            raise ValueError(f"adapter_names must be a list of one name for each row, got {names!r}")
        if unknown := sorted(set(names) - known):
            raise ValueError(f"adapter_names holds {unknown}; this model has {sorted(known)}")
        used = [name for name in self.peft_config if name in names]
        lengths = {name: self.peft_config[name].adapter_len for name in used}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"adapters of one batch must have one adapter_len, got {lengths}")
        for parent in {parent: None for name in (*used, *self._live()) for parent in self._parents[name]}:
            rows = [name for name in used if parent in self._parents[name]]
            target = self.peft_config[rows[0] if rows else self._active_adapter].target_modules
            if not rows:
                yield parent, target, getattr(parent, target).model
                continue
            adapted = [self._layers(name)[self._parents[name].index(parent)] for name in rows]
            order = {name: row for row, name in enumerate(rows)}
            index = torch.tensor([order.get(name, -1) for name in names], dtype=torch.int32)
            layer = MixedAdaptedAttention(adapted[0].model, adapted, index).train(False)
            yield parent, target, layer

    def _live(self) -> list[str]:
        return [self._active_adapter] if self._enabled and self._active_adapter else []

    def _layers(self, name: str) -> list[AdaptedAttention]:
        if name in self._cached_adapters:
            return self._cached_adapters[name]
        target = self.peft_config[name].target_modules
        return [getattr(parent, target) for parent in self._parents[name]]


def accelerate(peft_model: _Model) -> _Model:
    """Makes an existing AdaptionPromptConfig model attend through zinit_kernels, in place, and returns it.

    State dict, set_adapter, disable_adapter, saving, loading, generate, gradient checkpointing, padding and quantised
    bases work as before; every adapter of the model is included, and those added later. The attention implementation
    becomes "zinit": where the fused kernels do not apply, and in layers without prompts, that is `sdpa`. Setting
    another one with `set_attn_implementation` gives PEFT's own computation back, until `accelerate` is called again.

    Args:
        peft_model: what `get_peft_model(base, AdaptionPromptConfig(...))` returned, on a Llama or Mistral base.

    Raises:
        TypeError: not a model with adaption prompts.
        ValueError: a GPT-2 base: PEFT adds its prompts behind the output projection, unprojected, which is not the
            paper's formula; `integrations.transformers.add_zero_init_attention` adapts GPT-2 by it. A base that does
            not take its attention from AttentionInterface. The model is then as it was.
    """
    tuner = _tuner(peft_model)
    model_type = tuner.model.config.model_type
    layers = _adapted_layers(tuner)
    if not all(type(layer) in (AdaptedAttention, FusedAdaptedAttention) for layer in layers):
        raise ValueError(
            f"PEFT's adaption prompts on {model_type!r} are added behind the output projection, which one attention "
            "call cannot do; add_zero_init_attention of zinit_kernels.integrations.transformers adapts this model by "
            "the paper's formula"
        )
    before = attend_by_zinit(tuner.model, (layer.model for layer in layers))
    if before != NAME or not isinstance(tuner, FusedAdaptionPromptModel):
        tuner._attention_before = before
    if not isinstance(tuner, FusedAdaptionPromptModel):
        tuner._turns = _Turns()
    tuner.__class__ = FusedAdaptionPromptModel
    for layer in layers:
        layer.__class__ = FusedAdaptedAttention
    return peft_model


def restore(peft_model: _Model) -> _Model:
    """Undoes `accelerate`, in place: PEFT's classes and the attention implementation from before."""
    tuner = _tuner(peft_model)
    if isinstance(tuner, FusedAdaptionPromptModel):
        for layer in _adapted_layers(tuner):
            layer.__class__ = AdaptedAttention
        tuner.__class__ = AdaptionPromptModel
        if tuner.model.config._attn_implementation == NAME:
            tuner.model.set_attn_implementation(tuner._attention_before)
        del tuner._attention_before, tuner._turns
    return peft_model


def _tuner(peft_model: nn.Module) -> AdaptionPromptModel:
    tuner = getattr(peft_model, "base_model", None)
    if not isinstance(tuner, AdaptionPromptModel):
        raise TypeError(
            "expected a PeftModel with adaption prompts (AdaptionPromptConfig), got "
            f"{type(peft_model).__name__} over {type(tuner).__name__}"
        )
    return tuner


def _adapted_layers(tuner: AdaptionPromptModel) -> list[nn.Module]:
    """Those in the model and those of the adapters that wait outside it."""
    live = [module for module in tuner.modules() if hasattr(module, "adaption_gate")]
    return live + [layer for layers in tuner._cached_adapters.values() for layer in layers]
