"""Other programs' models on this project's weights: transformers, PEFT (as it is and accelerated), litgpt, Liger.

The weights are shared wherever the other program keeps them in the same tensors. Gates are away from zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from model.config import LlamaConfig
from model.llama import Llama

from .shapes import PROMPTS

UNADAPTED_LAYERS = 2  # the paper adapts the topmost L - 2
GATE = 0.1


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
        rope_theta=config.rope_theta,
        use_cache=False,
    )


def with_liger(model: Any) -> Any:
    """Liger's kernels in this one of transformers' models: norms, MLPs, and the loss fused with the last projection.

    Its rotary embedding would replace transformers' for every model of the process, so it stays out.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    theirs = dict(vars(modeling_llama))
    apply_liger_kernel_to_llama(rope=False, model=model)
    vars(modeling_llama).update(theirs)  # the classes it replaced for models yet to be made
    return model


def in_peft(base: Llama) -> Any:
    """PEFT's adaption prompts on transformers' model."""
    from peft import AdaptionPromptConfig, get_peft_model

    layers = base.config.num_layers - UNADAPTED_LAYERS
    config = AdaptionPromptConfig(adapter_len=PROMPTS, adapter_layers=layers, task_type="CAUSAL_LM")
    return with_gates_set(get_peft_model(in_transformers(base), config), "adaption_gate")


def in_peft_accelerated(base: Llama) -> Any:
    """The same model through this package's attention."""
    from zinit_kernels.integrations.peft import accelerate

    return accelerate(in_peft(base))


def in_lora(base: Llama, rank: int, liger: bool = False) -> Any:
    """LoRA on the query and value projections, as in the paper's comparison."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = in_transformers(base)
    # in the base's dtype, as PEFT's adaption prompts are: by itself PEFT makes LoRA's matrices float32
    return get_peft_model(with_liger(model) if liger else model, config, autocast_adapter_dtype=False)


def in_litgpt(base: Llama) -> Any:
    """litgpt's adapter; its query, key and value weights are one tensor, so these are copies."""
    from litgpt import adapter

    config = base.config
    with torch.device("meta"):
        model = adapter.GPT(
            adapter.Config(
                block_size=config.max_seq_len, padded_vocab_size=config.vocab_size, n_layer=config.num_layers,
                n_head=config.num_heads_q, n_query_groups=config.num_heads_kv, n_embd=config.hidden_size,
                head_size=config.head_dim, intermediate_size=config.intermediate_size, norm_eps=config.norm_eps,
                rope_base=int(config.rope_theta), rotary_percentage=1.0, bias=False, norm_class_name="RMSNorm",
                mlp_class_name="LLaMAMLP", parallel_residual=False, adapter_prompt_length=PROMPTS,
                adapter_start_layer=UNADAPTED_LAYERS,
            )
        )  # fmt: skip
    model.load_state_dict(litgpt_weights(base), assign=True, strict=False)
    with torch.device(base.device):
        model.cos, model.sin = model.rope_cache(device=base.device)
        for layer in model.transformer.h[UNADAPTED_LAYERS:]:
            layer.attn.adapter_wte = nn.Embedding(PROMPTS, config.hidden_size, dtype=base.dtype)
            layer.attn.gating_factor = nn.Parameter(
                torch.zeros(1, 1, config.num_heads_q, 1, dtype=base.dtype)
            )
    adapter.mark_only_adapter_as_trainable(model)
    return with_gates_set(model, "gating_factor")


def litgpt_weights(base: Llama) -> dict[str, torch.Tensor]:
    """The base's weights under litgpt's names."""
    ours = base.state_dict()
    found = {
        "lm_head.weight": base.output_weight,
        "transformer.wte.weight": ours["embed_tokens.weight"],
        "transformer.ln_f.weight": ours["norm.weight"],
    }
    names = {
        "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
    }  # fmt: skip
    for layer in range(base.config.num_layers):
        here, there = f"layers.{layer}", f"transformer.h.{layer}"
        found |= {f"{there}.{theirs}.weight": ours[f"{here}.{mine}.weight"] for theirs, mine in names.items()}
        parts = [ours[f"{here}.self_attn.{name}_proj.weight"] for name in "qkv"]
        found[f"{there}.attn.qkv.weight"] = torch.cat(parts)
    return found


def with_gates_set(model: Any, name: str) -> Any:
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(name):
            nn.init.constant_(parameter, GATE)
    return model


def forget_projected_prompts(model: Any) -> None:
    """litgpt keeps the prompts of its first pass, graph and all: a second training step raises without this."""
    for layer in model.transformer.h[UNADAPTED_LAYERS:]:
        layer.attn.adapter_kv_cache = None
