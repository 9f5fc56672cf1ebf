"""Tiny models of every architecture with a row, adapted or not, their inputs, and a step of one."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
from zinit_kernels.integrations import transformers as zinit  # noqa: E402

FIVE = int(transformers.__version__.split(".")[0]) >= 5
VOCABULARY, HEADS, LAYERS, PROMPTS, ADAPTED = 96, 4, 3, 5, 2
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
TEXT = SIZES | {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
DECODER = TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 128}
ENCODER = TEXT | {
    "max_position_embeddings": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCABULARY, "n_positions": 128}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": None}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GEMMA = DECODER | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}
CLIP_TEXT = TEXT | {"max_position_embeddings": 128, "eos_token_id": VOCABULARY - 1}
SIGLIP_TEXT = CLIP_TEXT | {"projection_size": 32}
STACKS = ("text_model.encoder.layers", "vision_model.encoder.layers")  # CLIP's
VISION = SIZES | {"image_size": 12, "patch_size": 4}


def of(model, config, **sizes):
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**sizes))


def clip():
    config = transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION, projection_dim=16)
    return transformers.CLIPModel(config)


def siglip():
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=SIGLIP_TEXT, vision_config=VISION))


MODELS = {
    "Llama": of("LlamaForCausalLM", "LlamaConfig", **DECODER, attention_bias=True),
    "Mistral": of("MistralForCausalLM", "MistralConfig", **DECODER, head_dim=16, sliding_window=8),
    "Qwen2": of("Qwen2ForCausalLM", "Qwen2Config", **DECODER),
    "Qwen3": of("Qwen3ForCausalLM", "Qwen3Config", **DECODER, head_dim=16),
    "Gemma 2": of("Gemma2ForCausalLM", "Gemma2Config", **GEMMA, attn_logit_softcapping=2.0),
    "Gemma 3": of("Gemma3ForCausalLM", "Gemma3TextConfig", **GEMMA),
    "Phi-3": of("Phi3ForCausalLM", "Phi3Config", **DECODER),
    "Mixtral": of("MixtralForCausalLM", "MixtralConfig", **DECODER, num_local_experts=4),
    "Qwen3-MoE": of(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", **DECODER, **EXPERTS, head_dim=16, num_experts=4
    ),
    "GPT-OSS": of(
        "GptOssForCausalLM", "GptOssConfig", **DECODER, head_dim=16, sliding_window=8, num_local_experts=4
    ),
    "Granite": of("GraniteForCausalLM", "GraniteConfig", **DECODER, attention_multiplier=0.2),
    "StarCoder2": of("Starcoder2ForCausalLM", "Starcoder2Config", **DECODER, residual_dropout=0.0),
    "SmolLM3": of("SmolLM3ForCausalLM", "SmolLM3Config", **DECODER, no_rope_layer_interval=2),
    "OLMo 2": of("Olmo2ForCausalLM", "Olmo2Config", **DECODER),
    "Cohere": of("CohereForCausalLM", "CohereConfig", **DECODER, use_qk_norm=True),
    "GPT-2": of("GPT2LMHeadModel", "GPT2Config", **GPT2, scale_attn_by_inverse_layer_idx=True),
    "BERT": of("BertForMaskedLM", "BertConfig", **ENCODER),
    "RoBERTa": of("RobertaForTokenClassification", "RobertaConfig", **ENCODER),
    "ViT": of("ViTForImageClassification", "ViTConfig", **VISION, hidden_dropout_prob=0.0, num_labels=3),
    "DINOv2": of(
        "Dinov2ForImageClassification", "Dinov2Config", **VISION, hidden_dropout_prob=0.0, num_labels=3
    ),
    "CLIP": clip,
    "SigLIP": siglip,
}
ENCODERS = ("BERT", "RoBERTa", "ViT", "DINOv2", "CLIP", "SigLIP")
GENERATE = tuple(name for name in MODELS if name not in ENCODERS)
# where it is not fused, their token branch is transformers' eager formula, which has capped scores and attention sinks
EAGER = ("Gemma 2", "GPT-OSS")
# before transformers 5 these do not take their attention from AttentionInterface
FIVE_ONLY = ("BERT", "RoBERTa")
AVAILABLE = [name for name in MODELS if FIVE or name not in FIVE_ONLY]
CONTINUOUS = ("Llama", "Qwen3")


def base_model(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias") or "norm" in key:
            torch.nn.init.normal_(parameter, mean=0.0 if key.endswith("bias") else 1.0, std=0.3)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def frozen(model):
    """As an adapter leaves the base: SigLIP's nn.MultiheadAttention takes another path when nothing wants gradients."""
    return model.requires_grad_(False)


def adapted(name, gates=0.5, **options):
    model = zinit.add_zero_init_attention(base_model(name), PROMPTS, ADAPTED, **options)
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if key.endswith("zinit.gate"):
            parameter.data.copy_(gates * torch.randn(parameter.shape, generator=generator))
    return model


def inputs_of(name, kind="whole", rows=3, tokens=14):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(rows, 3, 12, 12, generator=generator)
    if name in ("ViT", "DINOv2"):
        return {"pixel_values": pixels}
    ids = torch.randint(2, VOCABULARY - 1, (rows, tokens), generator=generator)
    inputs = {"input_ids": ids}
    ids[:, -4] = VOCABULARY - 1  # where CLIP takes the whole text's features
    if kind != "whole":
        mask = torch.ones_like(ids)
        for row in range(rows):
            mask[row, : 3 * row] = 0
        inputs["attention_mask"] = mask if kind == "left-padded" else mask.flip(1)
    return inputs | ({"pixel_values": pixels} if name in ("CLIP", "SigLIP") else {})


def outputs(model, inputs):
    """Every output that prompts reach, at the places that are no padding."""
    out = model(**inputs)
    if hasattr(out, "image_embeds"):
        return torch.cat([out.text_embeds.flatten(), out.image_embeds.flatten()])
    if out.logits.dim() == 3 and "attention_mask" in inputs:
        return out.logits[inputs["attention_mask"].bool()]
    return out.logits


def step(model, inputs):
    model.zero_grad()
    out = outputs(model, inputs)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
