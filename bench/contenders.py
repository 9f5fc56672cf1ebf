"""Whole models on the same frozen random weights: this project's adapter, PEFT's, LoRA, full fine-tuning, none.

The weights are shared, not copied, except where full fine-tuning writes to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.adapter import LlamaAdapter
from model.config import AdapterConfig, LlamaConfig
from model.llama import Llama
from model.loss import answer_loss

from .conditions import why_missing
from .shapes import PROMPTS

LORA_RANKS = (2, 4, 8, 16)

# The 7B's proportions: an eighth of its width, all of its 32 layers, 30 of them adapted; 105 million parameters.
EIGHTH = LlamaConfig(4000, 512, 1376, num_layers=32, num_heads_q=4, num_heads_kv=4, head_dim=128)
SEVEN_BILLION = LlamaConfig(32000, 4096, 11008, num_layers=32, num_heads_q=32, num_heads_kv=32, head_dim=128)
TINY = LlamaConfig(256, 64, 172, num_layers=4, num_heads_q=2, num_heads_kv=2, head_dim=32)
UNADAPTED_LAYERS = 2  # the paper adapts the topmost L - 2


@dataclass(frozen=True)
class Contender:
    """A way to fine-tune: `build` gives the trainable parameters and the loss of tokens [B, T]."""

    name: str
    build: Callable[[Llama], tuple[list[nn.Parameter], Callable[[Tensor], Tensor]]]
    needs: tuple[str, ...] = ()

    def why_not(self) -> str:
        return why_missing(*self.needs)


def random_base(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Llama:
    """A frozen LLaMA of random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Llama(config).to(dtype)
    return model.initialise().freeze()


def in_transformers(base: Llama) -> Any:
    """transformers' LLaMA on the same weights."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers_config(base.config)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {
        name if name == "lm_head.weight" else f"model.{name}": w for name, w in base.state_dict().items()
    }
    model.load_state_dict(weights, assign=True)
    with torch.device(base.device):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its frequencies are no weights
    return model.requires_grad_(False)


def transformers_config(config: LlamaConfig) -> Any:
    from transformers import LlamaConfig as TransformersConfig

    return TransformersConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads_q,
        num_key_value_heads=config.num_heads_kv,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        use_cache=False,
    )


def next_token_loss(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda tokens: model(input_ids=tokens, labels=tokens).loss


def our_adapter(base: Llama) -> LlamaAdapter:
    """The paper's setting, gates away from zero so that nothing is skipped."""
    layers = base.config.num_layers - UNADAPTED_LAYERS
    adapter = LlamaAdapter(base.config, AdapterConfig(prompt_length=PROMPTS, num_layers=layers)).to(
        base.device
    )
    nn.init.constant_(adapter.gates, 0.1)
    return adapter


def with_our_adapter(base: Llama) -> tuple[list[nn.Parameter], Callable[[Tensor], Tensor]]:
    adapter = our_adapter(base)

    def loss(tokens: Tensor) -> Tensor:
        hidden = base.hidden_states(tokens, adapter)
        return answer_loss(hidden[:, :-1], tokens[:, 1:], base.output_weight)

    return list(adapter.parameters()), loss


def peft_adapter(base: Llama) -> Any:
    """PEFT's adaption prompts on transformers' model; its one gate per layer away from zero."""
    from peft import AdaptionPromptConfig, get_peft_model

    layers = base.config.num_layers - UNADAPTED_LAYERS
    config = AdaptionPromptConfig(adapter_len=PROMPTS, adapter_layers=layers, task_type="CAUSAL_LM")
    model = get_peft_model(in_transformers(base), config)
    for name, parameter in model.named_parameters():
        if name.endswith("adaption_gate"):
            nn.init.constant_(parameter, 0.1)
    return model


def with_peft_adapter(base: Llama) -> tuple[list[nn.Parameter], Callable[[Tensor], Tensor]]:
    model = peft_adapter(base)
    return trainable(model), next_token_loss(model)


def with_lora(rank: int) -> Callable[[Llama], tuple[list[nn.Parameter], Callable[[Tensor], Tensor]]]:
    """LoRA on the query and value projections, as in the paper's comparison."""

    def build(base: Llama) -> tuple[list[nn.Parameter], Callable[[Tensor], Tensor]]:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(in_transformers(base), config)
        return trainable(model), next_token_loss(model)

    return build


def with_everything(base: Llama) -> tuple[list[nn.Parameter], Callable[[Tensor], Tensor]]:
    """Full fine-tuning of transformers' model, on a copy of the weights."""
    model = in_transformers(base)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model.requires_grad_(True)
    return trainable(model), next_token_loss(model)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


OURS, PEFT = "zinit adapter", "PEFT adaption prompt"
HF = ("transformers",)
CONTENDERS = (
    Contender(OURS, with_our_adapter),
    Contender(PEFT, with_peft_adapter, (*HF, "peft")),
    *(Contender(f"LoRA r = {rank}", with_lora(rank), (*HF, "peft")) for rank in LORA_RANKS),
    Contender("full fine-tuning", with_everything, HF),
)
