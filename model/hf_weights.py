"""Hugging Face folders: config.json beside safetensors, or beside the .bin files of torch.save, whole or in shards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from zinit_kernels.checkpoints.adapter import CheckpointError, some
from zinit_kernels.checkpoints.files import read_index
from zinit_kernels.checkpoints.json_files import read_json
from zinit_kernels.checkpoints.tensor_files import open_tensors
from zinit_kernels.packed import PackedWeight

from .config import LlamaConfig
from .errors import UserError
from .hf_quantised import read_matrices

_DERIVED = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq)$"
)  # a table that some files carry and that is computed here


def read(directory: Path, dtype: torch.dtype | None = None) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """`read_packed` with every weight as numbers."""
    config, weights, _ = read_packed(directory, dtype, keep=False)
    return config, weights


def read_packed(
    directory: Path, dtype: torch.dtype | None = None, keep: bool = True
) -> tuple[LlamaConfig, dict[str, Tensor], dict[str, PackedWeight]]:
    """The configuration, and the weights by their names without "model.". They keep the files' dtype.

    keep: quantised matrices that can stay packed come apart from the others. The rest of them become `dtype` (None: the
    embedding's).
    """
    generation = directory / "generation_config.json"
    content = read_json(directory / "config.json")
    config = LlamaConfig.from_hf(content, read_json(generation) if generation.is_file() else None)
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
    kept: dict[str, PackedWeight] = {}
    if (settings := content.get("quantization_config")) is not None:
        dtype = dtype or embedding_dtype(weights)
        weights, kept = read_matrices(settings, weights, str(directory / "config.json"), dtype, keep)
    if config.tie_embeddings and "lm_head.weight" in weights:
        output = weights.pop("lm_head.weight")
        if not torch.equal(output, weights.get("embed_tokens.weight", output)):
            raise UserError(
                f"{directory} says tie_word_embeddings = true, and its lm_head.weight is not its embedding: versions "
                "of transformers differ in which one they use. Write false, or take lm_head.weight out."
            )
    return config, weights, kept


def embedding_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The embedding's dtype; bfloat16 where the embedding is quantised."""
    embedding = weights.get("embed_tokens.weight")
    is_plain = embedding is not None and embedding.is_floating_point() and embedding.element_size() > 1
    return embedding.dtype if is_plain else torch.bfloat16


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
