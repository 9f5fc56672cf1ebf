"""The published multi-modal LLaMA-Adapter V2 (BIAS-7B, LORA-BIAS-7B, CAPTION-7B and v2.1), whole.

    model, adapter = open_official_v2(path, checkpoint, base)
    hidden = model.hidden_states(tokens, adapter.with_images(features, images), cu_seqlens=cu_seqlens)

    F = LayerNorm(Linear(CLIP's tokens, after its last norm and projection))       clip_proj, clip_proj_norm
    X = blocks([visual_query, F])[:Q]                                              visual_query, visual_blocks
    V = LayerNorm(Linear(X))                                                       visual_proj, visual_proj_norm
    prompts of layer l = adapter_query[l] + V, through the layer's plain k and v projections
    out = softmax(q k) v + tanh(gate) new_gate softmax(q pk) pv                    new_gate: with LoRA only

The linear layers of the LLaMA have biases and LoRA factors beside their weights, in all layers, and its norms are
trained. The base keeps its own weights: what the file changes stands beside them (`model.deltas`). The file's queries
and keys pair neighbouring channels for the rotary embedding, as Meta's do; biases and factors are permuted to halves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from zinit_kernels.checkpoints import AdapterCheckpoint
from zinit_kernels.checkpoints.adapter import some
from zinit_kernels.console import shortened

from ..adapter import LlamaAdapter
from ..adapter_files import check_checkpoint, fill_adapter
from ..deltas import Delta, with_deltas
from ..errors import UserError
from ..llama import Llama
from ..meta_weights import to_half_split
from .adapter import VisualAdapter
from .config import FeatureConfig, VisualConfig
from .projection import make_projection

EXTRAS_FORMAT = "official-v2"
HEADS = 16  # of the visual blocks; the file does not say
# All of CLIP's tokens, and colours as OpenCV reads them: the published training never turned BGR to RGB
FEATURES = FeatureConfig(tokens="all", projected=True, channel_order="bgr")
_LINEARS = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_VISUAL = {  # of the file -> of model.vision.projection.Queries
    "visual_query.weight": "query",
    "clip_proj.": "tokens.",
    "clip_proj_norm.": "tokens_norm.",
    "visual_blocks.": "blocks.",
    "visual_proj.": "out.",
    "visual_proj_norm.": "out_norm.",
}
_IN_BLOCKS = {"attn.qkv.": "qkv.", "attn.proj.": "proj.", "mlp.fc1.": "fc1.", "mlp.fc2.": "fc2."}
_DELTA = re.compile(
    r"llama\.layers\.(\d{1,4})\.(attention|feed_forward)\.(?:(w\w)\.bias|lora_(w\w)_l([12])\.weight)"
)
_NORM = re.compile(r"llama\.layers\.(\d{1,4})\.(attention_norm|ffn_norm)\.weight")
_READ = re.compile(r"llama\.layers\.\d+\.attention\.(gate|new_gate)")  # in the checkpoint's gates already


def open_official_v2(
    path: str | Path, checkpoint: AdapterCheckpoint, base: Llama
) -> tuple[Llama, LlamaAdapter]:
    """The base with the file's biases, factors and norms, and the adapter: a `VisualAdapter` if it has a visual part.

    Raises UserError for a file that lacks a part, has an unknown one, or does not fit the base.
    """
    plain = replace(checkpoint, extras={}, extras_format="")
    config = check_checkpoint(path, plain, base.config)
    deltas: dict[str, dict[str, Tensor]] = {}
    norms, visual, unknown = {}, {}, []
    for name, tensor in checkpoint.extras.items():
        _check_numbers(path, name, tensor)
        if (found := _DELTA.fullmatch(name)) and f"{found[2]}.{found[3] or found[4]}" in _LINEARS:
            linear = f"layers.{int(found[1])}.{_LINEARS[f'{found[2]}.{found[3] or found[4]}']}"
            part = "bias" if found[3] else "down" if found[5] == "1" else "up"
            deltas.setdefault(linear, {})[part] = tensor
        elif found := _NORM.fullmatch(name):
            norms[f"layers.{int(found[1])}.{_NORMS[found[2]]}"] = tensor
        elif name == "llama.norm.weight":
            norms["norm"] = tensor
        elif ours := _visual_name(name):
            visual[ours] = tensor
        elif not _READ.fullmatch(name):
            unknown.append(name)
    if unknown:
        raise UserError(f"{path} holds {some(unknown)}, which no published LLaMA-Adapter V2 has.")
    linears = {linear: _delta(path, base, linear, parts) for linear, parts in deltas.items()}
    for name, weight in norms.items():
        _check_shape(path, name, weight, (base.config.hidden_size,))
        _module(path, base, name)
    model = with_deltas(base, linears, norms)
    if not visual:
        adapter = LlamaAdapter(base.config, config, torch.Generator())
    else:
        visual_config = _visual_config(path, visual)
        _check_visual(path, visual, visual_config, base, config.prompt_length)
        adapter = VisualAdapter(base.config, config, visual_config, FEATURES, torch.Generator())
        adapter.projection.load_state_dict(visual)
    fill_adapter(adapter, plain)
    return model, adapter


def _visual_name(name: str) -> str:
    """The name in `Queries` of a tensor of the visual part; "" for any other tensor."""
    for theirs, ours in _VISUAL.items():
        if name.startswith(theirs):
            rest = name.removeprefix(theirs)
            for inner, plain in _IN_BLOCKS.items():
                rest = rest.replace(inner, plain)
            return ours + rest
    return ""


def _visual_config(path: str | Path, visual: Mapping[str, Tensor]) -> VisualConfig:
    """The sizes of the visual part, as its tensors have them."""
    needed = ("query", "tokens.weight", "out.weight")
    if lacking := [name for name in needed if name not in visual or visual[name].dim() != 2]:
        raise UserError(f"{path} has a visual part without {some(lacking)}.")
    width = visual["query"].shape[1]
    blocks = [int(found[1]) for name in visual if (found := re.match(r"blocks\.(\d{1,4})\.", name))]
    hidden = visual.get("blocks.0.fc1.weight")
    try:
        return VisualConfig(
            "queries", visual["tokens.weight"].shape[1], width, blocks=max(blocks, default=-1) + 1, heads=HEADS,
            mlp_ratio=4.0 if hidden is None else hidden.shape[0] / width, blank_image=True,
        )  # fmt: skip
    except UserError as error:
        raise UserError(
            f"{path}: its visual part is of no published size ({str(error).rstrip('.')})."
        ) from None


def _check_visual(
    path: str | Path, visual: Mapping[str, Tensor], config: VisualConfig, base: Llama, prompt_length: int
) -> None:
    """Raises UserError unless these are the tensors of such a visual part."""
    with torch.device("meta"):  # sizes of a file are compared before anything is allocated
        expected = make_projection(config, base.config.hidden_size, prompt_length).state_dict()
    if expected.keys() != visual.keys():
        lacking, unknown = expected.keys() - visual.keys(), visual.keys() - expected.keys()
        what = f"lacks {some(lacking)}" if lacking else f"holds unknown {some(unknown)}"
        raise UserError(f"{path}: the visual part {what}.")
    for name, tensor in visual.items():
        _check_shape(path, name, tensor, tuple(expected[name].shape))


def _delta(path: str | Path, base: Llama, linear: str, parts: Mapping[str, Tensor]) -> Delta:
    """The delta of one linear layer, its rows in the order of the base's."""
    weight = _module(path, base, linear).weight
    rank = parts["down"].shape[0] if "down" in parts and parts["down"].dim() == 2 else 0
    if ("down" in parts) != ("up" in parts):
        raise UserError(f"{path}: {linear} has one LoRA factor without the other.")
    shapes = {"bias": weight.shape[:1], "down": (rank, weight.shape[1]), "up": (weight.shape[0], rank)}
    for name, tensor in parts.items():
        _check_shape(path, f"{linear} ({name})", tensor, tuple(shapes[name]))
    if linear.endswith(("q_proj", "k_proj")):
        head_dim = base.config.head_dim
        parts = {
            name: tensor if name == "down" else to_half_split(tensor, head_dim)
            for name, tensor in parts.items()
        }
    return Delta(**parts)


def _module(path: str | Path, base: Llama, name: str) -> torch.nn.Module:
    try:
        return base.get_submodule(name)
    except AttributeError:
        raise UserError(f"{path} changes {shortened(name)}, which the base does not have.") from None


def _check_numbers(path: str | Path, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
        raise UserError(f"{path}: {shortened(name)} holds what are no finite floating-point numbers.")


def _check_shape(path: str | Path, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise UserError(
            f"{path}: {shortened(name)} has shape {tuple(tensor.shape)}, and {expected} is expected for this base."
        )
