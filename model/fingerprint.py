"""Fingerprints: short strings that tell whether a base or a data set is the one that something was made with."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import partial

import torch
from torch import Tensor

from zinit_kernels.packed import Packed

from .data import Sample
from .llama import Llama

_CHUNK = 1 << 22  # elements that are converted and summed at once
# What changes the numbers that a base computes and is no weight
_FACTS = ("num_heads_q", "num_heads_kv", "head_dim", "norm_eps", "rope_theta", "sliding_window")
# The fields that the first version's fingerprint holds, in its order
_FIRST_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads_q", "num_heads_kv", "head_dim",
    "norm_eps", "rope_theta", "rope_scaling", "max_seq_len", "tie_embeddings", "sliding_window", "bos_id", "eos_ids",
)  # fmt: skip


def base_fingerprint(base: Llama, dtype: torch.dtype | None = None) -> str:
    """16 hexadecimal digits that change with any bit of any weight, and with what the network does to them.

    dtype: weights are rounded to it first, so that with bfloat16 a base has one fingerprint in float32, bfloat16 and
    (from float16 files) float16. None: as they are.

    A CRC-32 of each weight, all of them hashed by SHA-256. Weights are read at 4.2 GB per second and thread (SHA-256 of
    their bytes: 1.8), so 7 billion bfloat16 numbers take 1.7 s on two cores.
    """
    digest = hashlib.sha256()
    for name in _FACTS:
        digest.update(f"{name} {getattr(base.config, name)}\n".encode())
    scaling = base.config.rope_scaling
    digest.update(f"rope_scaling {None if scaling is None else astuple(scaling)}\n".encode())
    weights = _weights(base)

    def line_of(name: str) -> str:
        # with a dtype, the numbers count and not how they are packed
        weight = weights[name] if dtype is None else plain(base, name, weights[name])
        return f"{name} {tuple(weight.shape)} {checksum(weight, dtype):08x}\n"

    with ThreadPoolExecutor(max(torch.get_num_threads(), 1)) as pool:
        for line in pool.map(line_of, weights):
            digest.update(line.encode())
    return digest.hexdigest()[:16]


def plain(base: Llama, name: str, weight: Tensor) -> Tensor:
    """A weight of the model's state as numbers: a packed one unpacked, in float32, which holds them all exactly."""
    if weight.dtype != torch.uint8:  # LoRA's layers have other names than the weights in them
        return weight
    module = base.get_submodule(name.rpartition(".")[0])
    return module.packed.unpack(torch.float32) if isinstance(module, Packed) else weight


def data_fingerprint(samples: Sequence[Sample], digests: Mapping[str, str] | None = None) -> str:
    """16 hexadecimal digits of the samples, as the tokenizer made them. digests: of each image file, its content's."""
    digest = hashlib.sha256(b"[")
    for number, sample in enumerate(samples):
        facts = (sample.tokens, sample.prompt_length, *((digests or {})[path] for path in sample.images))
        facts += (sample.answers,) if sample.answers else ()
        digest.update(f"{', ' if number else ''}{facts!r}".encode())
    digest.update(b"]")
    return digest.hexdigest()[:16]


def first_fingerprint(base: Llama, dtype: torch.dtype = torch.float32) -> str:
    """The fingerprint of adapters and checkpoints that have no `base_fingerprint`: the first and last two rows of
    every weight."""
    facts = ", ".join(f"{name}={getattr(base.config, name)!r}" for name in _FIRST_FIELDS)
    digest = hashlib.sha256(f"LlamaConfig({facts})".encode())
    for name, kept in _weights(base).items():
        weight = plain(base, name, kept)
        rows = torch.cat([weight[:2], weight[-2:]]).to(dtype).float().cpu()
        digest.update(name.encode() + rows.numpy().tobytes())
    return digest.hexdigest()[:16]


def _weights(base: Llama) -> dict[str, Tensor]:
    """The base's own weights by their names, without what LoRA puts into its layers."""
    found = {name.replace(".base_layer.", "."): weight for name, weight in base.state_dict().items()}
    return {name: weight for name, weight in found.items() if ".lora_" not in name}


def adapter_metadata(base: Llama) -> dict[str, str]:
    """What an adapter file keeps of the base that it was trained on. Rounded to bfloat16, so that the base is known
    again in another dtype; the first version's fingerprint too, for programs that read that one.

    Of a model that was quantised when it was loaded, they are of the weights in its files: an adapter fits a base
    whether it is quantised or not.
    """
    if base.fingerprints is not None:
        return {name: base.fingerprints[name] for name in ("base", "base_fingerprint")}
    return {
        "base": first_fingerprint(base, torch.bfloat16),
        "base_fingerprint": base_fingerprint(base, torch.bfloat16),
    }


def run_fingerprints(base: Llama) -> dict[str, str]:
    """What a checkpoint keeps of the base: a run goes on only with the very same weights. Of a base that torchao
    quantised, they are of the weights before."""
    if base.fingerprints is not None and "base weights" in base.fingerprints:
        return {name: base.fingerprints[name] for name in ("base model", "base weights")}
    # checkpoints of the first version have "base model" alone
    return {"base model": first_fingerprint(base), "base weights": base_fingerprint(base)}


def is_of_base(metadata: Mapping[str, str], base: Llama) -> bool:
    """Whether an adapter file with this metadata was trained on the base. True if it does not say."""
    if base.fingerprints is not None:
        known: dict[str, Callable[[], str]] = {
            name: partial(base.fingerprints.__getitem__, name) for name in base.fingerprints
        }
    else:
        known = {
            "base_fingerprint": partial(base_fingerprint, base, torch.bfloat16),
            "base": partial(first_fingerprint, base, torch.bfloat16),
        }
    for name in ("base_fingerprint", "base"):
        if name in metadata:
            return metadata[name] == known[name]()
    return True


def checksum(weight: Tensor, dtype: torch.dtype | None = None) -> int:
    """CRC-32 of a weight's bytes, rounded to dtype first if it is one of floating-point numbers."""
    result = 0
    for part in weight.detach().reshape(-1).split(_CHUNK):
        if dtype is not None and part.is_floating_point():
            part = part.to(dtype)
        result = zlib.crc32(part.cpu().contiguous().view(torch.uint8).numpy(), result)
    return result
