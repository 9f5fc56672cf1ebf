"""Zero-init attention for any transformers model that attends through AttentionInterface.

    model = add_zero_init_attention(AutoModelForCausalLM.from_pretrained(name))
    optimizer = AdamW(parameter_groups(model, learning_rate=9e-3))
    ...
    save_adapter(model, "adapter")

Each of the topmost layers gets learned prompts and one tanh gate per head (arXiv 2303.16199, equations 5 to 8), as a
submodule `zinit` of its attention. The base is frozen; at gate 0, how training starts, the model is the base.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import checkpoints
from .attention import NAME, attend_by_zinit, attention_forward
from .prompts import SPLIT, Projection, Prompts

_Model = TypeVar("_Model", bound=nn.Module)
_CONFIG = "adapter.json"
_batching: list[Any] = []  # for each context of continuous_batching, the "sdpa" that it found
_batching_lock = threading.Lock()


def _encoder_key_value(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return attention.key(hidden), attention.value(hidden)


def _gpt2_key_value(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    _, key, value = attention.c_attn(hidden).split(attention.split_size, dim=-1)
    return key, value


def _phi3_key_value(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    width = attention.num_key_value_heads * attention.head_dim
    queries = attention.config.num_attention_heads * attention.head_dim
    _, key, value = attention.qkv_proj(hidden).split([queries, width, width], dim=-1)
    return key, value


_NORMED = SPLIT._replace(key_norm="k_norm")
_ENCODER = Projection(_encoder_key_value, ("key", "value"))

# An attention class of transformers, and how it makes keys and values. Prompts take the same way, key norm included,
# but for the rotary embedding.
ARCHITECTURES: dict[str, Projection] = {
    "LlamaAttention": SPLIT,
    "MistralAttention": SPLIT,
    "Qwen2Attention": SPLIT,
    "Qwen3Attention": _NORMED,
    "Gemma2Attention": SPLIT,  # capped scores: never fused
    "Gemma3Attention": _NORMED,
    "Phi3Attention": Projection(_phi3_key_value, ("qkv_proj",)),
    "GPT2Attention": Projection(_gpt2_key_value, ("c_attn",)),
    "BertSelfAttention": _ENCODER,
    "RobertaSelfAttention": _ENCODER,
    "ViTAttention": SPLIT,
    "ViTSelfAttention": _ENCODER,  # the same layer before transformers 5
    "CLIPAttention": SPLIT,
}


class ZeroInitPrompts(nn.Module):
    """The prompts [P, C] and gates [Hq] of one attention layer."""

    def __init__(self, prompt: Tensor, gate: Tensor, gate_activation: str, projection: Projection):
        super().__init__()
        self.prompt = nn.Parameter(prompt)
        self.gate = nn.Parameter(gate)
        self.gate_activation = gate_activation
        self.projection = projection
        self.enabled = True

    def prompts(self, attention: nn.Module) -> Prompts | None:
        """What the attention function asks for; None while disabled."""
        if not self.enabled:
            return None
        return Prompts(self, (self.prompt,), (self.gate,), self.gate_activation, self.projection)

    def extra_repr(self) -> str:
        return f"{self.prompt.shape[0]} prompts, {self.gate.shape[0]} {self.gate_activation} gates"


class _Layer(NamedTuple):
    name: str
    stack: str  # the list of layers it stands in: "model.layers"
    place: int  # in that list
    attention: Any


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
    the fused kernels do not apply (a mask per query, dropout, Gemma 2's soft cap), transformers computes as before and
    the prompt branch is added.

    `state_dict` holds prompts and gates, as do the files of the model's own `save_pretrained`; `from_pretrained` knows
    no place for them and leaves them out with a warning: `save_adapter` and `load_adapter` are the way to keep them.

    Args:
        model: of one of `ARCHITECTURES`, e.g. Llama, Qwen3, Phi-3, GPT-2, RoBERTa, ViT, CLIP (both its encoders).
        prompt_length: P, 1 to 128. num_layers: L, counted from the top in each stack of layers; all where there are
            fewer. Defaults: the paper's.
        gate_activation: "tanh", or "identity".
        dtype: of prompts and gates, whatever the base's is; gradients and optimizer states follow it.
        generator: for the prompts, drawn from N(0, 1); gates start at 0.

    Raises:
        TypeError: no transformers model. ValueError: an unknown architecture, a model that has prompts already (its
            own or PEFT's), a size out of range, or a dtype without fractions.
    """
    if not isinstance(prompt_length, int) or not 1 <= prompt_length <= 128:
        raise ValueError(f"prompt_length must be 1 to 128, got {prompt_length!r}")
    if not isinstance(num_layers, int) or num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers!r}")
    if gate_activation not in ("tanh", "identity"):
        raise ValueError(f"gate_activation must be 'tanh' or 'identity', got {gate_activation!r}")
    if any(True for _ in _adapters(model)):
        raise ValueError(
            "the model has zero-init prompts already; remove_zero_init_attention(model) takes them away"
        )
    layers = _attention_layers(model)
    lengths = {layer.stack: layer.place + 1 for layer in layers}
    chosen = [layer for layer in layers if layer.place >= lengths[layer.stack] - num_layers]
    made = []
    for layer in chosen:
        heads, hidden_size = _sizes(layer.attention)
        prompt = torch.randn(prompt_length, hidden_size, generator=generator, dtype=torch.float32)
        made.append((layer, prompt, torch.zeros(heads)))
    _attach(model, made, gate_activation, dtype)
    return model


def remove_zero_init_attention(model: _Model) -> _Model:
    """Takes prompts and gates away again, in place; the base's parameters stay frozen.

    The attention implementation is again that of before, unless another one than "zinit" was set since.
    """
    for layer, _ in list(_adapters(model)):
        del layer.attention.zinit
    before = vars(model).pop("_attention_before_zinit", None)
    if before is not None and model.config._attn_implementation == NAME:  # type: ignore[union-attr]
        model.set_attn_implementation(before)  # type: ignore[operator]
    return model


@contextmanager
def disable_zero_init_attention(model: nn.Module) -> Iterator[None]:
    """The base model, for as long as the context lasts."""
    adapters = [adapter for _, adapter in _adapters(model)]
    before = [adapter.enabled for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.enabled = False
        yield
    finally:
        for adapter, enabled in zip(adapters, before, strict=True):
            adapter.enabled = enabled


@contextmanager
def continuous_batching(model: Any) -> Iterator[None]:
    """For `model.generate_batch` and transformers' other paged serving, which takes attention by a list of names.

    Within it "sdpa" is this package's attention function, which hands modules without prompts to transformers' own.
    Contexts of several models may overlap.

    Raises:
        ValueError: no prompts in the model.
    """
    _required_adapters(model)
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    with _batching_lock:
        _batching.append(ALL_ATTENTION_FUNCTIONS["sdpa"])
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention_forward
    try:
        yield
    finally:
        # whoever leaves last puts back what the first one found
        with _batching_lock:
            if len(_batching) == 1:
                ALL_ATTENTION_FUNCTIONS["sdpa"] = _batching[0]
            _batching.pop()
        model.set_attn_implementation(before)


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    gate_learning_rate: float | None = None,
    weight_decay: float = 0.02,
) -> list[dict[str, Any]]:
    """Two groups for an optimizer: the prompts, and the gates, which are never decayed (towards 0 they switch off).

    Args:
        learning_rate: the paper's is 9e-3; gate_learning_rate: the same unless given.
        weight_decay: of the prompts; default the paper's.

    Raises:
        ValueError: no prompts in the model.
    """
    adapters = _required_adapters(model)
    return [
        {"params": [a.prompt for _, a in adapters], "lr": learning_rate, "weight_decay": weight_decay},
        {
            "params": [a.gate for _, a in adapters],
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
    """tanh(gate) of every adapted layer: all 0 means the adapter does nothing yet."""
    rows = Summary()
    for layer, adapter in _adapters(model):
        gate = adapter.gate.detach().float()
        gate = gate.tanh() if adapter.gate_activation == "tanh" else gate
        rms = float(adapter.prompt.detach().float().square().mean().sqrt())
        rows.append(LayerSummary(layer.name, adapter.prompt.shape[0], gate.tolist(), rms))
    return rows


def save_adapter(model: Any, folder: str | Path) -> None:
    """Writes prompts and gates alone: a safetensors file per stack of layers (`zinit_kernels.checkpoints`'s own format)
    and adapter.json, which says what they belong to.

    Raises:
        ValueError: no prompts in the model.
    """
    adapters = _required_adapters(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, str | None] = {}
    lengths = {layer.stack: layer.place + 1 for layer in _attention_layers(model)}
    for stack in lengths:
        rows = [(layer, adapter) for layer, adapter in adapters if layer.stack == stack]
        if not rows:  # prompts were added to a part of the model only
            files[stack] = None
            continue
        checkpoint = checkpoints.AdapterCheckpoint(
            prompts=torch.stack([adapter.prompt.detach() for _, adapter in rows]),
            gates=torch.stack([adapter.gate.detach() for _, adapter in rows]),
            gate_activation=rows[0][1].gate_activation,
            layers=tuple(layer.place for layer, _ in rows),
            num_layers=lengths[stack],
            num_heads=rows[0][1].gate.shape[0],
        )
        name = "adapter.safetensors" if len(lengths) == 1 else f"adapter.{stack}.safetensors"
        checkpoints.save_adapter(folder / name, checkpoint)
        files[stack] = name
    config = {"model_type": model.config.model_type, "stacks": files}
    checkpoints.write_atomically(folder / _CONFIG, json.dumps(config, indent=2).encode() + b"\n")


def load_adapter(
    model: _Model, source: str | Path, *, dtype: torch.dtype = torch.float32, **options: Any
) -> _Model:
    """Gives the model the prompts and gates of a folder of `save_adapter`, in the place of those it has.

    Args:
        source: the folder; or, for a model with one stack of layers, an adapter file of any format that
            `zinit_kernels.checkpoints` reads, official LLaMA-Adapter and PEFT included.
        dtype: of the parameters. options: `zinit_kernels.checkpoints.load_adapter`'s.

    Raises:
        CheckpointError: in one sentence: damaged, or of another base. ValueError: a dtype without fractions, a model
            with PEFT's prompts. OSError where a file cannot be read. The model is then as it was.
    """
    source = Path(source)
    layers = _attention_layers(model)
    by_stack: dict[str, list[_Layer]] = {}
    for layer in layers:
        by_stack.setdefault(layer.stack, []).append(layer)
    made: list[tuple[_Layer, Tensor, Tensor]] = []
    activations = set()
    for stack, path in _adapter_files(source, model, list(by_stack)).items():
        rows = by_stack[stack]
        heads, hidden_size = _sizes(rows[0].attention)
        checkpoint = checkpoints.load_adapter(path, **options).check_base(hidden_size, len(rows), heads)
        activations.add(checkpoint.gate_activation)
        for row, index in enumerate(checkpoint.layers):
            gate = checkpoint.gates[row].expand(heads).clone()
            made.append((rows[index], checkpoint.prompts[row], gate))
    if len(activations) != 1:
        raise checkpoints.CheckpointError(f"{source}: the stacks differ in their gates' activation")
    _attach(model, made, activations.pop(), dtype)
    return model


def _adapter_files(source: Path, model: Any, stacks: list[str]) -> dict[str, Path]:
    """The file of every stack that has prompts, of a source that belongs to this model."""
    own_type = model.config.model_type
    if (source / _CONFIG).is_file():
        try:
            config = json.loads((source / _CONFIG).read_text())
            model_type, files = config["model_type"], dict(config["stacks"].items())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise checkpoints.CheckpointError(f"{source / _CONFIG} is damaged ({error})") from error
    elif len(stacks) == 1:
        return {stacks[0]: source}
    else:
        raise checkpoints.CheckpointError(
            f"{source} is one adapter, and this model has several stacks of layers: {', '.join(stacks)}"
        )
    if files.keys() != set(stacks):
        raise checkpoints.CheckpointError(
            f"{source} is for layers {', '.join(sorted(files)) or 'none'}; this model has {', '.join(stacks)}"
        )
    if model_type != own_type:
        raise checkpoints.CheckpointError(
            f"{source} is for a model of the type {model_type!r}; this one is a {own_type!r}"
        )
    found = {stack: source / str(name) for stack, name in files.items() if name is not None}
    if not found:
        raise checkpoints.CheckpointError(f"{source} holds no prompts")
    return found


def _attach(
    model: Any, made: list[tuple[_Layer, Tensor, Tensor]], gate_activation: str, dtype: torch.dtype
) -> None:
    """Gives the layers their prompts, in the place of all that the model has; what may fail comes first."""
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point one, got {dtype}")
    if any("adaption_gate" in module._parameters for module in model.modules()):
        raise ValueError(
            "the model has PEFT's adaption prompts: accelerate(model) of zinit_kernels.integrations.peft is for those"
        )
    adapters = []
    for layer, prompt, gate in made:
        device = next(layer.attention.parameters()).device
        projection = ARCHITECTURES[type(layer.attention).__name__]
        adapter = ZeroInitPrompts(
            prompt.to(device, dtype), gate.to(device, dtype), gate_activation, projection
        )
        adapters.append((layer.attention, adapter.train(layer.attention.training)))
    before = attend_by_zinit(model, (attention for attention, _ in adapters))
    if before != NAME:
        model._attention_before_zinit = before
    model.requires_grad_(False)
    for layer, _ in list(_adapters(model)):
        del layer.attention.zinit
    for attention, adapter in adapters:
        attention.zinit = adapter


def _sizes(attention: Any) -> tuple[int, int]:
    """(heads, hidden size)."""
    return attention.config.num_attention_heads, attention.config.hidden_size


def _attention_layers(model: nn.Module) -> list[_Layer]:
    """Every self-attention of a known architecture, bottom to top in each stack."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    layers = []
    for name, module in model.named_modules():
        projection = ARCHITECTURES.get(type(module).__name__)
        if projection is None or getattr(module, "is_cross_attention", False):
            continue
        if all(part in module._modules for part in projection.modules):
            found = re.match(r"(.*?)\.?\b(\d+)\.", f"{name}.")
            layers.append(_Layer(name, found[1] if found else "", int(found[2]) if found else 0, module))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no attention of a known architecture ({', '.join(ARCHITECTURES)}); a row in "
            "zinit_kernels.integrations.transformers.ARCHITECTURES adds one"
        )
    return layers


def _adapters(model: nn.Module) -> Iterator[tuple[_Layer, ZeroInitPrompts]]:
    for layer in _attention_layers(model):
        adapter = layer.attention._modules.get("zinit")
        if isinstance(adapter, ZeroInitPrompts):
            yield layer, adapter


def _required_adapters(model: nn.Module) -> list[tuple[_Layer, ZeroInitPrompts]]:
    adapters = list(_adapters(model))
    if not adapters:
        raise ValueError("the model has no zero-init prompts; call add_zero_init_attention(model) first")
    return adapters
