"""Zero-init attention for any transformers model that attends through AttentionInterface.

    model = add_zero_init_attention(AutoModelForCausalLM.from_pretrained(name))
    optimizer = AdamW(parameter_groups(model, learning_rate=9e-3))
    ...
    save_adapter(model, "adapter")

Each of the topmost layers gets learned prompts and one tanh gate per head (arXiv 2303.16199, equations 5 to 8), as a
submodule `zinit` of its attention. The base is frozen; at gate 0, how training starts, the model is the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from . import reload_note  # noqa: F401, it has transformers' warning of lost prompts say how to read them
from .adapter_folder import load_adapter, save_adapter
from .added_prompts import refuse_served, serving_added
from .architectures import ARCHITECTURES, ENCODER, NORMED, SPLIT, Projection
from .layers import (
    ZeroInitPrompts,
    adapters,
    attach,
    attention_layers,
    detach,
    disabled,
    peft_layers,
    required_adapters,
    sizes,
    tokens_of,
    values_of,
)
from .per_sample import per_sample_prompts
from .recomputation import remember_blocks
from .serving import serving

__all__ = [
    "ARCHITECTURES",
    "ENCODER",
    "NORMED",
    "SPLIT",
    "LayerSummary",
    "Projection",
    "Summary",
    "ZeroInitPrompts",
    "add_zero_init_attention",
    "continuous_batching",
    "disable_zero_init_attention",
    "load_adapter",
    "parameter_groups",
    "per_sample_prompts",
    "remove_zero_init_attention",
    "save_adapter",
    "summary",
]

_Model = TypeVar("_Model", bound=nn.Module)


def add_zero_init_attention(
    model: _Model,
    prompt_length: int = 10,
    num_layers: int = 30,
    *,
    gate_activation: str = "tanh",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> _Model:
    """Gives the topmost layers of a transformers model prompts and gates of their own, in place, and returns it.

    Everything else is frozen, and the attention implementation becomes "zinit": in layers without prompts, and where
    the fused kernels do not apply (a mask per query, dropout), transformers
    computes as before and the prompt branch is added. A pass of an adapted layer by another implementation, which would
    leave the prompts out, is a RuntimeError. `output_attentions` gives the token branch's weights.

    `state_dict` holds prompts and gates, as do the files of the model's own `save_pretrained` and of Trainer's
    checkpoints. `from_pretrained` knows no place for them and leaves them out, with a warning about unexpected keys:
    `load_adapter(model, folder)` then reads them back. `save_adapter` writes them alone.

    Args:
        model: of one of `ARCHITECTURES`, e.g. Llama, Qwen3, Phi-3, GPT-2, RoBERTa, ViT, CLIP (both its encoders).
        prompt_length: P, 1 to 128. num_layers: L, counted from the top in each stack of layers; all where there are
            fewer. Defaults: the paper's.
        gate_activation: "tanh", or "identity".
        dtype: of prompts and gates, whatever the base's is; gradients and optimizer states follow it.
        generator: for the prompts, drawn from N(0, 1); gates start at 0.

    Raises:
        TypeError: no transformers model. ValueError: an unknown architecture (the message shows the row to write), a
            model that has prompts already (its own or PEFT's), one that is divided by tensor parallelism, a size out of
            range, or a dtype without fractions.
    """
    if not isinstance(prompt_length, int) or not 1 <= prompt_length <= 128:
        raise ValueError(f"prompt_length must be 1 to 128, got {prompt_length!r}")
    if not isinstance(num_layers, int) or num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers!r}")
    if gate_activation not in ("tanh", "identity"):
        raise ValueError(f"gate_activation must be 'tanh' or 'identity', got {gate_activation!r}")
    layers = attention_layers(model)
    if any(True for _ in adapters(model)):
        raise ValueError(
            "the model has zero-init prompts already; remove_zero_init_attention(model) takes them away"
        )
    lengths = {layer.stack: layer.place + 1 for layer in layers}
    chosen = [layer for layer in layers if layer.place >= lengths[layer.stack] - num_layers]
    made = []
    for layer in chosen:
        heads, hidden_size = sizes(layer.attention)
        prompt = torch.randn(prompt_length, hidden_size, generator=generator, dtype=torch.float32)
        made.append((layer, prompt, torch.zeros(heads)))
    attach(model, made, gate_activation, dtype)
    return model


def remove_zero_init_attention(model: _Model) -> _Model:
    """Takes prompts and gates away again, in place; the base's parameters stay frozen.

    The attention implementation is again that of before, unless another one than "zinit" was set since.

    Raises:
        ValueError: the prompts are PEFT's.
    """
    if any(True for _ in peft_layers(model)):
        required_adapters(model)
    detach(model)
    return model


@contextmanager
def disable_zero_init_attention(model: nn.Module) -> Iterator[None]:
    """The base model, for the calls in this block.

    That is for those of the thread, or asyncio task, that entered it: other threads go on with the prompts, those
    started within the block too. Enter it in the thread that calls the model. Models of `integrations.peft.accelerate`
    can be disabled too. What is computed again for backward (gradient checkpointing) is the base's or not as it was
    the first time, also when the block has ended.

    Raises:
        ValueError: PEFT's adaption prompts that were not accelerated; a block within `continuous_batching`, which
            serves what it has begun with.
    """
    if any(not getattr(type(layer), "attends_by_zinit", False) for _, layer in peft_layers(model)):
        raise ValueError(
            "the model has PEFT's adaption prompts: call accelerate(model) of zinit_kernels.integrations.peft first, "
            "or use PEFT's own model.disable_adapter()"
        )
    tokens = tokens_of(model)
    refuse_served("disable_zero_init_attention", tokens - frozenset().union(*disabled.values()))
    remember_blocks(model)
    with disabled.holding(tokens):
        yield


@contextmanager
def continuous_batching(model: Any) -> Iterator[None]:
    """For `model.generate_batch` and transformers' other paged serving, which takes attention by a list of names.

    Within it the model attends by "sdpa", and "sdpa" is this package's attention function, which hands modules without
    prompts to transformers' own. Contexts of one model or of several may overlap. Models of
    `integrations.peft.accelerate` are served too. A context that is entered in a block of
    `disable_zero_init_attention` serves the base, and one in a block of `per_sample_prompts` its one entry.

    Raises:
        ValueError: no prompts in the model; another context of it that has not ended yet, and serves other prompts: the
            model cannot serve both.
    """
    if not any(getattr(module, "attends_by_zinit", False) for module in model.modules()):
        required_adapters(model)
    with serving_added(tokens_of(model)), serving(model):
        yield


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    gate_learning_rate: float | None = None,
    weight_decay: float = 0.02,
) -> list[dict[str, Any]]:
    """Two groups for an optimizer: the prompts, and the gates, which are never decayed (towards 0 they switch off).

    PEFT's adaption prompts are found too.

    Args:
        learning_rate: the paper's is 9e-3; gate_learning_rate: the same unless given.
        weight_decay: of the prompts; default the paper's.

    Raises:
        ValueError: no prompts in the model.
    """
    prompts = [layer.adaption_prompt for _, layer in peft_layers(model)]
    gates = [layer.adaption_gate for _, layer in peft_layers(model)]
    if not prompts:
        found = required_adapters(model)
        prompts, gates = [a.prompt for _, a in found], [a.gate for _, a in found]
    return [
        {"params": prompts, "lr": learning_rate, "weight_decay": weight_decay},
        {
            "params": gates,
            "lr": learning_rate if gate_learning_rate is None else gate_learning_rate,
            "weight_decay": 0.0,
        },
    ]


class LayerSummary(NamedTuple):
    layer: str
    prompt_length: int
    gates: list[float]  # as the attention applies them, after the activation
    prompt_rms: float


class Summary(list[LayerSummary]):
    """One entry per adapted layer; prints as a table."""

    def __str__(self) -> str:
        width = max((len(row.layer) for row in self), default=5)
        lines = [f"{'layer':<{width}}   P   gate: mean      min      max   prompts: rms"]
        for row in self:
            mean = sum(row.gates) / len(row.gates)
            lines.append(
                f"{row.layer:<{width}} {row.prompt_length:3}   {mean:+10.4f} {min(row.gates):+8.4f} "
                f"{max(row.gates):+8.4f}   {row.prompt_rms:12.4f}"
            )
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """tanh(gate) of every adapted layer: all 0 means the adapter does nothing yet.

    PEFT's adaption prompts, those of the active adapter, are listed too; PEFT applies their one gate as it is.
    """
    rows = Summary()
    for name, peft_layer in peft_layers(model):
        prompt, gate = values_of(peft_layer, "adaption_prompt", "adaption_gate")
        rows.append(_row(name, prompt[0], gate, "identity"))
    for layer, adapter in adapters(model):
        rows.append(_row(layer.name, *values_of(adapter), adapter.gate_activation))
    return rows


def _row(name: str, prompt: torch.Tensor, gate: torch.Tensor, gate_activation: str) -> LayerSummary:
    gate = gate.detach().float()
    gate = gate.tanh() if gate_activation == "tanh" else gate
    return LayerSummary(
        name, prompt.shape[0], gate.tolist(), float(prompt.detach().float().square().mean().sqrt())
    )
