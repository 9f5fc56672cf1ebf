"""Tiny models with PEFT's adaption prompts, and a step of one against a step of another."""

import copy

import torch
from peft import AdaptionPromptConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=8),
    "llama-gqa": LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama3-rope": LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=LLAMA3_ROPE),
    "mistral-window": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8),
}
# what PEFT itself cannot run, or gets wrong
NEMO = MistralConfig(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=None)
BIASED = LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True)
PROMPTS = AdaptionPromptConfig(adapter_len=4, adapter_layers=3, task_type="CAUSAL_LM")


def base_model(config, seed=0, **options):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def adapted(config, gates=0.5, base=None, adapters=("default",)):
    """A PEFT model whose gates are drawn with this standard deviation."""
    model = get_peft_model(base or base_model(config), copy.deepcopy(PROMPTS)).eval()
    for name in adapters[1:]:
        model.add_adapter(name, copy.deepcopy(PROMPTS))
    generator = torch.Generator().manual_seed(7)
    for name in adapters:
        model.set_adapter(name)
        for key, parameter in model.named_parameters():
            if key.endswith("adaption_gate"):
                parameter.data.copy_(gates * torch.randn(1, generator=generator))
    model.set_adapter(adapters[0])
    return model


def batch(kind, rows=3, tokens=20):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 128, (rows, tokens), generator=generator)
    inputs = {"input_ids": ids, "labels": ids.clone()}
    if kind.endswith("padded"):
        mask = torch.ones_like(ids)
        for row in range(rows):
            mask[row, : 4 * row] = 0
        mask = mask if kind.startswith("left") else mask.flip(1)
        inputs["attention_mask"] = mask
        inputs["labels"][mask == 0] = -100
    if kind == "packed":
        positions = torch.cat([torch.arange(7), torch.arange(tokens - 7)])
        inputs = {
            "input_ids": ids[:1],
            "labels": ids[:1],
            "position_ids": positions[None],
            "use_cache": False,
        }
    return inputs


def step(model, inputs):
    """Logits, and the gradients by name."""
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model, other, inputs):
    logits, gradients = step(model, inputs)
    expected, expected_gradients = step(other, inputs)
    seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    assert (logits - expected)[seen].abs().max() <= 1e-5
    assert gradients.keys() == expected_gradients.keys() and len(gradients) == 6
    for name, gradient in gradients.items():
        error = (gradient - expected_gradients[name]).norm() / expected_gradients[name].norm()
        assert expected_gradients[name].norm() > 0 and error <= 1e-4, (name, error)
