"""Small GGUF files, written by the gguf package as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd", "lm_head": "output", "layers.": "blk.",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """llama.cpp's name of a transformers weight."""
    if name == "model.norm.weight":
        return "output_norm.weight"
    name = name.removeprefix("model.")
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name


def interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k in the order of Meta and llama.cpp: rotary pairs beside each other."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def model_fields(config: Any) -> dict[str, Any]:
    """The header's fields of a transformers LLaMA."""
    return {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
    }


def byte_level_fields(tokenizer_json: Path, pre: str = "gpt-2") -> dict[str, Any]:
    """The header's fields of a byte-level tokenizer.json."""
    content = json.loads(tokenizer_json.read_text())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    special = {token["content"] for token in content["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
        "tokenizer.ggml.add_bos_token": True,
    }


def write_gguf(
    path: Path,
    fields: dict[str, Any],
    tensors: dict[str, np.ndarray],
    type: str = "F32",
    architecture: str = "llama",
) -> None:
    """Writes a file. Matrices get the type, vectors stay F32; None as a field's value leaves it out."""
    writer = gguf.GGUFWriter(str(path), architecture)
    for name, value in fields.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_string(name, value)
    quantised = gguf.GGMLQuantizationType[type]
    for name, tensor in tensors.items():
        kind = quantised if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(model: Any) -> dict[str, np.ndarray]:
    """The weights of a transformers LLaMA by llama.cpp's names and in its order of rows."""
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, model.config.head_dim)
        tensors[gguf_name(name)] = weight.float().contiguous().numpy()
    return tensors


def write_model(path: Path, model: Any, type: str = "F32", fields: dict[str, Any] | None = None) -> None:
    """Writes a transformers LLaMA; `fields` are added to the header or replace fields of it."""
    write_gguf(path, model_fields(model.config) | (fields or {}), gguf_tensors(model), type)
