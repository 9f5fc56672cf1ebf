"""What a LLaMA and its adapter are told: two dataclasses, read from Hugging Face's config.json or Meta's
params.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from .errors import UserError

ARCHITECTURES = ("llama", "mistral")
ROPE_KINDS = ("default", "linear", "llama3")
MAX_PROMPT_LENGTH = 128  # what zinit_kernels takes


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the length the model was first trained on.

    linear: every frequency is divided by `factor`. llama3: only wavelengths above original_max_seq_len /
    low_freq_factor are, those below original_max_seq_len / high_freq_factor are kept, and the band between is
    interpolated.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def to_hf(self) -> dict[str, Any]:
        """config.json's rope_scaling."""
        if self.kind == "linear":
            return {"rope_type": self.kind, "factor": self.factor}
        return {
            "rope_type": self.kind,
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_seq_len,
        }


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA. Mistral is the same network with a `sliding_window`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_seq_len: int = 2048
    tie_embeddings: bool = False
    sliding_window: int | None = None  # a query sees its own and the sliding_window - 1 tokens before
    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "max_seq_len")
        for name in (*sizes, "num_heads_q", "num_heads_kv", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a positive whole number, the configuration says {value!r}.")
        if self.num_heads_q % self.num_heads_kv:
            raise UserError(
                f"the {self.num_heads_q} query heads must be a multiple of the {self.num_heads_kv} "
                "key/value heads."
            )
        if self.head_dim % 2 or self.head_dim > 256:
            raise UserError(
                "head_dim must be even (rotary pairs) and at most 256, the configuration says "
                f"{self.head_dim}."
            )

    @property
    def window_left(self) -> int:
        """Keys before its own that a query sees; -1 = all."""
        return -1 if self.sliding_window is None else self.sliding_window - 1

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> LlamaConfig:
        """From a parsed config.json; the end-of-sequence ids from generation_config.json if there is one."""
        kind = config.get("model_type")
        if kind not in ARCHITECTURES:
            raise UserError(
                f"config.json says model_type {kind!r}, supported are {' and '.join(ARCHITECTURES)}."
            )
        for field, supported in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
            value = config.get(field, supported)
            if value != supported:
                raise UserError(f"config.json says {field} = {value!r}, only {supported!r} is supported.")
        number = partial(_number, config, "config.json")
        num_heads_q, hidden_size = number("num_attention_heads", int), number("hidden_size", int)
        max_seq_len = number("max_position_embeddings", int, 2048)
        # transformers 5 writes rope_parameters, before it rope_theta and rope_scaling
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise UserError(f"config.json must describe the rotary embedding by an object, it has {rope!r}.")
        eos = (generation or {}).get("eos_token_id", config.get("eos_token_id", 2))
        eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        if not all(isinstance(id, int) for id in eos_ids):
            raise UserError(f"eos_token_id must be a whole number or a list of them, it is {eos!r}.")
        windowed = kind == "mistral" and config.get("sliding_window") is not None
        return cls(
            vocab_size=number("vocab_size", int),
            hidden_size=hidden_size,
            intermediate_size=number("intermediate_size", int),
            num_layers=number("num_hidden_layers", int),
            num_heads_q=num_heads_q,
            num_heads_kv=number("num_key_value_heads", int, num_heads_q),
            head_dim=number("head_dim", int, hidden_size // num_heads_q),
            norm_eps=number("rms_norm_eps", float, 1e-6),
            rope_theta=_number(rope, "config.json", "rope_theta", float, number("rope_theta", float, 1e4)),
            rope_scaling=_rope_scaling(rope, max_seq_len),
            max_seq_len=max_seq_len,
            tie_embeddings=config.get("tie_word_embeddings", False),
            sliding_window=number("sliding_window", int) if windowed else None,
            bos_id=config.get("bos_token_id", 1),
            eos_ids=eos_ids,
        )

    @classmethod
    def from_meta(
        cls, params: Mapping[str, Any], vocab_size: int, tie_embeddings: bool = False
    ) -> LlamaConfig:
        """From a parsed params.json; vocab_size from the embedding, as LLaMA 1 and 2 write -1 there."""
        if params.get("moe_args") or params.get("vision_chunk_size", -1) not in (-1, 0, None):
            raise UserError(
                "params.json describes a mixture of experts or a vision model, only the dense text LLaMAs "
                "are supported."
            )
        number = partial(_number, params, "params.json")
        hidden_size, num_heads_q = number("dim", int), number("n_heads", int)
        if params.get("vocab_size", -1) not in (-1, vocab_size):
            raise UserError(
                f"params.json says vocab_size {params['vocab_size']}, tok_embeddings.weight has {vocab_size} "
                "rows."
            )
        scaling = None
        if params.get("use_scaled_rope"):
            scaling = RopeScaling(
                "llama3",
                number("rope_scaling_factor", float, 8.0),
                high_freq_factor=number("high_freq_factor", float, 4.0),
            )
        rope_theta = number("rope_theta", float, 10000.0)
        # The file does not say for how long a context the model was trained: 2048 is right or too careful
        context = 131072 if scaling else 8192 if rope_theta >= 500000 else 2048
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=_meta_intermediate_size(params, hidden_size),
            num_layers=number("n_layers", int),
            num_heads_q=num_heads_q,
            num_heads_kv=number("n_kv_heads", int, num_heads_q),
            head_dim=number("head_dim", int, hidden_size // num_heads_q),
            norm_eps=number("norm_eps", float, 1e-5),
            rope_theta=rope_theta,
            rope_scaling=scaling,
            max_seq_len=number("max_seq_len", int, context),
            tie_embeddings=tie_embeddings,
            bos_id=128000 if vocab_size == 128256 else 1,
            eos_ids=(128001, 128008, 128009) if vocab_size == 128256 else (2,),
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json that `from_hf` and transformers read this from."""
        mistral = self.sliding_window is not None
        config = {
            "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
            "model_type": "mistral" if mistral else "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads_q,
            "num_key_value_heads": self.num_heads_kv,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_seq_len,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None,
        }
        if mistral:
            config["sliding_window"] = self.sliding_window
        if self.rope_scaling is not None:
            config["rope_scaling"] = self.rope_scaling.to_hf()
        return config


@dataclass(frozen=True)
class AdapterConfig:
    """The paper's adapter: `prompt_length` learned prompts in each of the topmost `num_layers` layers, one
    gate per head.

    num_layers None = all but the lowest two (30 of 32 in the paper's 7B). gate_init "zero" is the method. Two
    ablations, to train on packed samples and compare: "random", gates drawn from a unit normal, and "none", no
    gates at all: the prompts join the tokens' softmax, at full strength from the start (the vanilla attention
    that zero-init attention replaces, section 3.2 of arXiv 2303.16199).
    """

    prompt_length: int = 10
    num_layers: int | None = None
    gate_activation: str = "tanh"
    gate_init: str = "zero"

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_length <= MAX_PROMPT_LENGTH:
            raise UserError(f"prompt_length must lie in 1 .. {MAX_PROMPT_LENGTH}, got {self.prompt_length}.")
        if self.gate_activation not in ("tanh", "identity"):
            raise UserError(f"gate_activation must be tanh or identity, got {self.gate_activation!r}.")
        if self.gate_init not in ("zero", "random", "none"):
            raise UserError(f"gate_init must be zero, random or none, got {self.gate_init!r}.")

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """The adapted layers of a model with `num_layers`, lowest first."""
        count = max(num_layers - 2, 1) if self.num_layers is None else self.num_layers
        if not 1 <= count <= num_layers:
            raise UserError(f"the adapter asks for {count} layers, the model has {num_layers}.")
        return tuple(range(num_layers - count, num_layers))


def _number(config: Mapping[str, Any], file: str, name: str, kind: type, default: Any = None) -> Any:
    """A positive number of a file, of the `kind` int or float; the default where it is absent or null."""
    value = default if config.get(name) is None else config[name]
    accepted = (int,) if kind is int else (int, float)
    if not isinstance(value, accepted) or isinstance(value, bool) or not 0 < value < math.inf:
        whole = "whole " if kind is int else ""
        raise UserError(f"{file} must have a positive {whole}number as {name}, it has {value!r}.")
    if kind is int and value >= 1 << 31:
        raise UserError(f"{file} must have a number below 2**31 as {name}, it has {value}.")
    return kind(value)


def _rope_scaling(rope: Mapping[str, Any], max_seq_len: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    number = partial(_number, rope, "config.json")
    if kind not in ROPE_KINDS:
        raise UserError(
            f"config.json asks for rotary scaling of type {kind!r}, supported are {', '.join(ROPE_KINDS)}."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            "config.json rotates only a part of each head (partial_rotary_factor), which is not supported."
        )
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind, number("factor", float))
    return RopeScaling(
        kind,
        number("factor", float),
        number("low_freq_factor", float),
        number("high_freq_factor", float),
        number("original_max_position_embeddings", int, max_seq_len),
    )


def _meta_intermediate_size(params: Mapping[str, Any], hidden_size: int) -> int:
    size = int(8 * hidden_size / 3)
    if params.get("ffn_dim_multiplier") is not None:
        size = int(_number(params, "params.json", "ffn_dim_multiplier", float) * size)
    multiple = _number(params, "params.json", "multiple_of", int, 256)
    return (size + multiple - 1) // multiple * multiple
