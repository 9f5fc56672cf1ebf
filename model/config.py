"""The configurations of a LLaMA and of its adapter. The LLaMA's comes from Hugging Face's config.json or Meta's
params.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zinit_kernels.console import shown

from .errors import UserError
from .fields import LARGEST_SIZE
from .hf_config import read_hf_config
from .meta_config import read_meta_config
from .rope_scaling import RopeScaling

MAX_PROMPT_LENGTH = 128  # what zinit_kernels takes


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
            if not isinstance(value, int) or not 1 <= value < LARGEST_SIZE:
                raise UserError(
                    f"{name} must be a positive whole number below 2**31, the configuration says {shown(value)}."
                )
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
        return cls(**read_hf_config(config, generation))

    @classmethod
    def from_meta(
        cls, params: Mapping[str, Any], vocab_size: int, tie_embeddings: bool = False
    ) -> LlamaConfig:
        """From a parsed params.json; vocab_size from the embedding, as LLaMA 1 and 2 write -1 there."""
        return cls(**read_meta_config(params, vocab_size, tie_embeddings))

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
