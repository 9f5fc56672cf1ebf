"""What a LLaMA and its adapter are told: two dataclasses, read from Hugging Face's config.json or Meta's
params.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
        num_heads_q, hidden_size = _field(config, "num_attention_heads"), _field(config, "hidden_size")
        max_seq_len = config.get("max_position_embeddings", 2048)
        # transformers 5 writes rope_parameters, before it rope_theta and rope_scaling
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        eos = (generation or {}).get("eos_token_id", config.get("eos_token_id", 2))
        return cls(
            vocab_size=_field(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_field(config, "intermediate_size"),
            num_layers=_field(config, "num_hidden_layers"),
            num_heads_q=num_heads_q,
            num_heads_kv=config.get("num_key_value_heads") or num_heads_q,
            head_dim=config.get("head_dim") or hidden_size // num_heads_q,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            rope_scaling=_rope_scaling(rope, max_seq_len),
            max_seq_len=max_seq_len,
            tie_embeddings=config.get("tie_word_embeddings", False),
            sliding_window=config.get("sliding_window") if kind == "mistral" else None,
            bos_id=config.get("bos_token_id", 1),
            eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        )

    @classmethod
    def from_meta(
        cls, params: Mapping[str, Any], vocab_size: int, tie_embeddings: bool = False
    ) -> LlamaConfig:
        """From a parsed params.json; vocab_size from the embedding, as LLaMA 1 and 2 write -1 there."""
        if params.get("moe_args") or params.get("vision_chunk_size", -1) > 0:
            raise UserError(
                "params.json describes a mixture of experts or a vision model, only the dense text LLaMAs "
                "are supported."
            )
        hidden_size, num_heads_q = (_field(params, name, "params.json") for name in ("dim", "n_heads"))
        if params.get("vocab_size", -1) not in (-1, vocab_size):
            raise UserError(
                f"params.json says vocab_size {params['vocab_size']}, tok_embeddings.weight has {vocab_size} "
                "rows."
            )
        scaling = None
        if params.get("use_scaled_rope"):
            scaling = RopeScaling(
                "llama3",
                float(params.get("rope_scaling_factor") or 8.0),
                high_freq_factor=float(params.get("high_freq_factor") or 4.0),
            )
        rope_theta = float(params.get("rope_theta") or 10000.0)
        # The file does not say for how long a context the model was trained: 2048 is right or too careful
        context = 131072 if scaling else 8192 if rope_theta >= 500000 else 2048
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=_meta_intermediate_size(params, hidden_size),
            num_layers=_field(params, "n_layers", "params.json"),
            num_heads_q=num_heads_q,
            num_heads_kv=params.get("n_kv_heads") or num_heads_q,
            head_dim=params.get("head_dim") or hidden_size // num_heads_q,
            norm_eps=params.get("norm_eps", 1e-5),
            rope_theta=rope_theta,
            rope_scaling=scaling,
            max_seq_len=params.get("max_seq_len", context),
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

    num_layers None = all but the lowest two (30 of 32 in the paper's 7B). gate_init "zero" is the method,
    "random" its ablation (figure 5 of arXiv 2303.16199): gates drawn from a unit normal.
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
        if self.gate_init not in ("zero", "random"):
            raise UserError(f"gate_init must be zero or random, got {self.gate_init!r}.")

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """The adapted layers of a model with `num_layers`, lowest first."""
        count = max(num_layers - 2, 1) if self.num_layers is None else self.num_layers
        if not 1 <= count <= num_layers:
            raise UserError(f"the adapter asks for {count} layers, the model has {num_layers}.")
        return tuple(range(num_layers - count, num_layers))


def _field(config: Mapping[str, Any], name: str, file: str = "config.json") -> Any:
    value = config.get(name)
    if not isinstance(value, (int, float)):
        raise UserError(f"{file} must have a number as {name}, it has {value!r}.")
    return value


def _rope_scaling(rope: Mapping[str, Any], max_seq_len: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
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
        return RopeScaling(kind, float(_field(rope, "factor")))
    return RopeScaling(
        kind,
        float(_field(rope, "factor")),
        float(_field(rope, "low_freq_factor")),
        float(_field(rope, "high_freq_factor")),
        int(rope.get("original_max_position_embeddings", max_seq_len)),
    )


def _meta_intermediate_size(params: Mapping[str, Any], hidden_size: int) -> int:
    size = int(8 * hidden_size / 3)
    if params.get("ffn_dim_multiplier") is not None:
        size = int(params["ffn_dim_multiplier"] * size)
    multiple = params.get("multiple_of", 256)
    return (size + multiple - 1) // multiple * multiple
