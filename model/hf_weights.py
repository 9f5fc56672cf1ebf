"""Hugging Face folders: config.json beside safetensors, or beside the .bin files of torch.save, whole or in shards."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from zinit_kernels.checkpoints.adapter import CheckpointError, some
from zinit_kernels.checkpoints.files import read_index
from zinit_kernels.checkpoints.json_files import read_json
from zinit_kernels.checkpoints.tensor_files import open_tensors

from .config import LlamaConfig
from .errors import UserError

_DERIVED = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq)$"
)  # a table that some files carry and that is computed here


def read(directory: Path, dtype: torch.dtype | None = None) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """The configuration, and the weights by their names without "model.". They keep the files' dtype."""
    generation = directory / "generation_config.json"
    config = LlamaConfig.from_hf(
        read_json(directory / "config.json"), read_json(generation) if generation.is_file() else None
    )
    weights: dict[str, Tensor] = {}
    for shard, names in _shards(directory).items():
        tensors = open_tensors(shard)
        if names is not None and (missing := sorted(names - set(tensors))):
            raise CheckpointError(f"{shard} lacks {some(missing)}, which the index places there")
        for name in tensors if names is None else names:
            if _DERIVED.search(name):
                continue
            ours = name.removeprefix("model.")
            if ours in weights:
                raise UserError(f"{directory} holds {some([ours])} twice.")
            weights[ours] = tensors[name]
    if config.tie_embeddings and "lm_head.weight" in weights:
        output = weights.pop("lm_head.weight")
        if not torch.equal(output, weights.get("embed_tokens.weight", output)):
            raise UserError(
                f"{directory} says tie_word_embeddings = true, and its lm_head.weight is not its embedding: versions "
                "of transformers differ in which one they use. Write false, or take lm_head.weight out."
            )
    return config, weights


def _shards(directory: Path) -> dict[Path, set[str] | None]:
    """Each file of weights, and the names to take from it: None = all."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        # of both, transformers reads the single file
        if (directory / single).is_file():
            return {directory / single: None}
        index = directory / f"{single}.index.json"
        if index.is_file():
            return dict(read_index(index))
    raise UserError(
        f"{directory} has neither model.safetensors nor model.safetensors.index.json; convert other formats with "
        "transformers' save_pretrained."
    )
