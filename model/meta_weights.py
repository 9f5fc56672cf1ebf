"""Meta's folders: params.json beside consolidated.00.pth, consolidated.01.pth, ..."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zinit_kernels.checkpoints.adapter import some
from zinit_kernels.checkpoints.json_files import read_json
from zinit_kernels.checkpoints.tensor_files import open_tensors

from .config import LlamaConfig
from .errors import UserError

# Meta's name -> ours, and the dimension along which its shards are cut (None: every shard holds the whole)
_NAMES = {
    "tok_embeddings.weight": ("embed_tokens.weight", 1),  # LLaMA 3 cuts dimension 0: told from the shape
    "norm.weight": ("norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
}
_LAYER_NAMES = {
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}
_DERIVED = ("rope.freqs",)  # a table that some files carry and that is computed here


def read(directory: Path, dtype: torch.dtype | None = None) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """The configuration, and the weights by our names, with the rotary pairs in our order, in the files' dtype."""
    params = read_json(directory / "params.json")
    shards = [open_tensors(path) for path in _shards(directory)]
    names = [name for name in shards[0] if name not in _DERIVED]
    _check_shards(shards, names, params, directory)
    embedding = shards[0]["tok_embeddings.weight"]
    embedding_dim = 0 if embedding.shape[1] == params.get("dim") else 1
    vocab_size = embedding.shape[0] * (len(shards) if embedding_dim == 0 else 1)
    config = LlamaConfig.from_meta(params, vocab_size, tie_embeddings="output.weight" not in names)
    weights = {}
    for name in names:
        ours, dim = _our_name(name)
        dim = embedding_dim if name == "tok_embeddings.weight" else dim
        parts = [shard[name] for shard in shards]
        weight = parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)
        if ours.endswith(("q_proj.weight", "k_proj.weight")):
            if weight.shape[0] % config.head_dim:
                raise UserError(
                    f"{directory}: {name} has {weight.shape[0]} rows, no multiple of head_dim {config.head_dim}."
                )
            weight = to_half_split(weight, config.head_dim)
        weights[ours] = weight
    return config, weights


def _shards(directory: Path) -> list[Path]:
    shards = sorted(directory.glob("consolidated.*.pth"))
    expected = [f"consolidated.{index:02d}.pth" for index in range(len(shards))]
    if not shards or [shard.name for shard in shards] != expected:
        found = ", ".join(shard.name for shard in shards) or "none"
        raise UserError(
            f"{directory} must hold consolidated.00.pth and the shards that follow it, found {found}."
        )
    return shards


def _check_shards(
    shards: Sequence[Mapping[str, Tensor]], names: Sequence[str], params: Mapping[str, Any], directory: Path
) -> None:
    """UserError unless the shards hold the same tensors, cut alike, and all of them are there."""
    for index, shard in enumerate(shards):
        if differing := shard.keys() ^ shards[0].keys():
            raise UserError(
                f"{directory}: shard {index} holds other tensors than shard 0: {some(differing)}."
            )
    if "tok_embeddings.weight" not in names:
        raise UserError(
            f"{directory}: the shards hold no tok_embeddings.weight, so this is no LLaMA checkpoint."
        )
    for name in names:
        shapes = {tuple(shard[name].shape) for shard in shards}
        if len({shard[name].dtype for shard in shards}) > 1:
            raise UserError(f"{directory}: {name} must have one dtype in all shards.")
        if _our_name(name)[1] is not None and (len(shapes) > 1 or len(min(shapes)) != 2 or 0 in min(shapes)):
            raise UserError(
                f"{directory}: {name} must be a matrix of one shape in all shards, it has {shapes}."
            )
    rows = params.get("dim")
    if isinstance(params.get("head_dim"), int) and isinstance(params.get("n_heads"), int):
        rows = params["head_dim"] * params["n_heads"]
    if "layers.0.attention.wq.weight" in names and isinstance(rows, int):
        share = shards[0]["layers.0.attention.wq.weight"].shape[0]
        if share * len(shards) != rows:
            raise UserError(f"{directory} holds {len(shards)} of {rows / share:g} shards.")


def _our_name(name: str) -> tuple[str, int | None]:
    """Our name, and the dimension that is cut. A name that is not LLaMA's stays as it is: the key check reports it."""
    if match := re.fullmatch(r"(layers\.\d+)\.(.+)", name):
        ours, dim = _LAYER_NAMES.get(match[2], (match[2], None))
        return f"{match[1]}.{ours}", dim
    return _NAMES.get(name, (name, None))


def to_half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k from Meta's interleaved rotary pairs (0, 1), (2, 3), ... to pairs (i, i + D/2)."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
