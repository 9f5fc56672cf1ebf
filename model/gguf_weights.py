"""Base models from GGUF files. Quantised weights become numbers again when they are loaded, or stay as they are."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zinit_kernels.console import shortened, shown
from zinit_kernels.packed import PackedWeight

from .config import LlamaConfig
from .errors import UserError
from .fields import number, refuse_unknown
from .gguf_blocks import BLOCKS, packed_blocks
from .gguf_file import GGUF, find_gguf, gguf_package, read_gguf
from .layers import rotary_frequencies
from .meta_weights import to_half_split
from .rope_scaling import RopeScaling

NAMES = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_ROPE_FACTORS = "rope_freqs.weight"  # by what each rotary frequency is divided
_DERIVED = re.compile(
    r"blk\.\d+\.attn_rot_embd(\.weight)?"
)  # a table that old files carry and that is computed here
_ARCHITECTURE = "llama"
_READ = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "attention.sliding_window", "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length",
)  # fmt: skip
_HARMLESS = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def read(path: Path, dtype: torch.dtype | None = None) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """`read_packed` with every weight as numbers."""
    config, weights, _ = read_packed(path, dtype, keep=False)
    return config, weights


def read_packed(
    path: Path, dtype: torch.dtype | None = None, keep: bool = True
) -> tuple[LlamaConfig, dict[str, Tensor], dict[str, PackedWeight]]:
    """The configuration and the weights of a GGUF file, or of the one in a folder, by our names.

    F32, F16 and BF16 tensors stay mapped. keep: matrices of Q8_0, Q4_0 and Q4_1 blocks come apart from the others,
    with the very codes and scales of the file. Other quantised ones become `dtype` one after the other (None: float32,
    which holds every value of a quantised weight exactly).

    Raises UserError: damaged, another architecture than llama, or a tensor that a LLaMA does not have.
    """
    file = find_gguf(path)
    if file is None:
        raise UserError(f"{path} is no GGUF file, and no folder with one.")
    gguf = read_gguf(file)
    names = _our_names(gguf)
    config = LlamaConfig(**read_gguf_config(gguf))
    weights: dict[str, Tensor] = {}
    kept: dict[str, PackedWeight] = {}
    for name, ours in names.items():
        blocks = keep and gguf.tensors[name].type.name in BLOCKS and len(gguf.tensors[name].shape) == 2
        weight = (
            torch.empty(gguf.tensors[name].shape, device="meta") if blocks else _tensor(gguf, name, dtype)
        )
        if ours.endswith(("q_proj.weight", "k_proj.weight")):
            if weight.dim() != 2 or weight.shape[0] % config.head_dim:
                raise UserError(
                    f"{file}: {name} must have a multiple of head_dim {config.head_dim} rows, its shape is "
                    f"{tuple(weight.shape)}."
                )
            order = to_half_split(torch.arange(len(weight))[:, None], config.head_dim)[:, 0]
            if blocks:
                kept[ours] = packed_blocks(gguf, name, order)
                continue
            weight = weight[order]
        if blocks:
            kept[ours] = packed_blocks(gguf, name)
        else:
            weights[ours] = weight
    return config, weights, kept


def read_gguf_config(gguf: GGUF) -> dict[str, Any]:
    """`LlamaConfig`'s fields from a file's header. Raises UserError."""
    prefix, file = f"{_ARCHITECTURE}.", str(gguf.path)
    ours = {name: value for name, value in gguf.fields.items() if name.startswith(prefix)}
    refuse_unknown(ours, file, [prefix + name for name in (*_READ, *_HARMLESS)])
    read = partial(number, {name.removeprefix(prefix): value for name, value in ours.items()}, file)
    num_heads_q, hidden_size = read("attention.head_count", int), read("embedding_length", int)
    head_dim = read("attention.key_length", int, hidden_size // num_heads_q)
    for name, what in (
        ("attention.value_length", "values of another size than its keys"),
        ("rope.dimension_count", "a rotary embedding of a part of each head"),
    ):
        if read(name, int, head_dim) != head_dim:
            raise UserError(
                f"{file} has {what} ({name} {read(name, int)}, head_dim {head_dim}): not supported."
            )
    rope_theta = read("rope.freq_base", float, 10000.0)
    windowed = bool(ours.get(f"{prefix}attention.sliding_window"))
    return {
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": read("feed_forward_length", int),
        "num_layers": read("block_count", int),
        "num_heads_q": num_heads_q,
        "num_heads_kv": read("attention.head_count_kv", int, num_heads_q),
        "head_dim": head_dim,
        "norm_eps": read("attention.layer_norm_rms_epsilon", float),
        "rope_theta": rope_theta,
        "rope_scaling": _rope_scaling(gguf, rope_theta, head_dim),
        "max_seq_len": read("context_length", int),
        "tie_embeddings": "output.weight" not in gguf.tensors,
        "sliding_window": read("attention.sliding_window", int) if windowed else None,
        **_special_ids(gguf),
    }


def _our_names(gguf: GGUF) -> dict[str, str]:
    """The file's name of each weight -> ours. Raises UserError for what is no LLaMA."""
    fields, path = gguf.fields, gguf.path
    if fields.get("split.count") not in (None, 0, 1):
        raise UserError(
            f"{path} is one of {shown(fields['split.count'])} parts: join them first (llama-gguf-split --merge)."
        )
    architecture = fields.get("general.architecture")
    if architecture != _ARCHITECTURE:
        raise UserError(
            f"{path} holds a model of the architecture {shown(architecture)}, supported is {_ARCHITECTURE!r}, which "
            "Mistral and SmolLM have too."
        )
    if fields.get("general.type", "model") != "model":
        raise UserError(f"{path} holds no model: its general.type is {shown(fields['general.type'])}.")
    names = {}
    for name in gguf.tensors:
        if name == _ROPE_FACTORS or _DERIVED.fullmatch(name):
            continue
        match = re.fullmatch(r"blk\.(0|[1-9]\d{0,4})\.(\w+)\.weight", name)
        if name in NAMES:
            names[name] = NAMES[name]
        elif match and match[2] in LAYER_NAMES:
            names[name] = f"layers.{match[1]}.{LAYER_NAMES[match[2]]}.weight"
        else:
            raise UserError(f"{path} holds {shortened(name)}, which a LLaMA does not have.")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{path} lacks a matrix token_embd.weight, so it is no LLaMA.")
    return names


def _tensor(gguf: GGUF, name: str, dtype: torch.dtype | None) -> Tensor:
    info = gguf.tensors[name]
    content = gguf.bytes_of(name)
    if info.type.name in _DTYPES:
        return torch.from_numpy(content).view(_DTYPES[info.type.name]).view(info.shape)
    if info.type.name[0] == "I" and info.type.name[1:].isdecimal():
        raise UserError(
            f"{gguf.path}: {shortened(name)} holds whole numbers ({info.type.name}), which no weight is."
        )
    try:
        with np.errstate(all="ignore"):  # a damaged scale; generation says that the logits are no numbers
            numbers = gguf_package().quants.dequantize(content.reshape(*info.shape[:-1], -1), info.type)
    except NotImplementedError:
        raise UserError(
            f"{gguf.path}: {shortened(name)} is quantised as {info.type.name}, which the installed gguf package "
            "cannot undo: pip install --upgrade gguf."
        ) from None
    return torch.from_numpy(numbers).to(dtype or torch.float32)


def _rope_scaling(gguf: GGUF, rope_theta: float, head_dim: int) -> RopeScaling | None:
    """How the file stretches the rotary frequencies.

    Llama 3.1 and later are told by a tensor of divisors, one for each frequency. Meta's numbers, all but the factor,
    are the same for every release, so the divisors must be those of their formula.
    """
    file, prefix = str(gguf.path), f"{_ARCHITECTURE}.rope.scaling."
    kind = gguf.fields.get(f"{prefix}type")
    factor = gguf.fields.get(f"{prefix}factor")
    if kind not in (None, "none", "linear"):
        raise UserError(
            f"{file} asks for rotary scaling of type {shown(kind)}, supported are none and linear."
        )
    linear = kind != "none" and factor not in (None, 0, 1)
    if _ROPE_FACTORS not in gguf.tensors:
        return RopeScaling("linear", number(gguf.fields, file, f"{prefix}factor", float)) if linear else None
    divisors = _tensor(gguf, _ROPE_FACTORS, None).float()
    if divisors.shape != (head_dim // 2,) or not 1 <= divisors.max() < float("inf") or linear:
        raise UserError(
            f"{file} has {_ROPE_FACTORS} that do not fit its heads, or a second scaling beside them."
        )
    scaling = RopeScaling("llama3", float(divisors.max()))
    plain = rotary_frequencies(head_dim, rope_theta, None)
    if not torch.allclose(plain / rotary_frequencies(head_dim, rope_theta, scaling), divisors, rtol=1e-4):
        if torch.equal(divisors, torch.ones_like(divisors)):
            return None
        raise UserError(
            f"{file} divides the rotary frequencies by other numbers than Llama 3 does ({_ROPE_FACTORS}), which is not "
            "supported."
        )
    return scaling


def _special_ids(gguf: GGUF) -> dict[str, Any]:
    """The ids that begin a text and those that end an answer: of a text, and of a turn in a conversation."""
    ids = {}
    for kind in ("bos", "eos", "eot", "eom"):
        id = gguf.fields.get(f"tokenizer.ggml.{kind}_token_id")
        if id is not None and (not isinstance(id, int) or isinstance(id, bool)):
            raise UserError(f"{gguf.path} must have a whole number as {kind}_token_id, it has {shown(id)}.")
        ids[kind] = id
    if ids["eos"] is None and gguf.fields.get("tokenizer.ggml.model") == "llama":
        ids["eos"] = 2  # sentencepiece's, which old files leave out
    ends = (ids[kind] for kind in ("eos", "eot", "eom"))
    return {"bos_id": ids["bos"], "eos_ids": tuple(dict.fromkeys(id for id in ends if id is not None))}
