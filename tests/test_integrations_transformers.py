"""Prompts added to transformers models: by the formula at gates away from 0, the base bit for bit at 0.

The formula is written here once more, from the equations, and takes every architecture's weights by itself.
"""

import contextlib
import copy
import importlib.util
import json
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
from transformers import AttentionInterface  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface  # noqa: E402

from zinit_kernels import checkpoints  # noqa: E402
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
GEMMA = DECODER | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}
CLIP_TEXT = TEXT | {"max_position_embeddings": 128, "eos_token_id": VOCABULARY - 1}
STACKS = ("text_model.encoder.layers", "vision_model.encoder.layers")  # CLIP's
VISION = SIZES | {"image_size": 12, "patch_size": 4}


def of(model, config, **sizes):
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**sizes))


def clip():
    config = transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION, projection_dim=16)
    return transformers.CLIPModel(config)


MODELS = {
    "Llama": of("LlamaForCausalLM", "LlamaConfig", **DECODER, attention_bias=True),
    "Mistral": of("MistralForCausalLM", "MistralConfig", **DECODER, head_dim=16, sliding_window=8),
    "Qwen2": of("Qwen2ForCausalLM", "Qwen2Config", **DECODER),
    "Qwen3": of("Qwen3ForCausalLM", "Qwen3Config", **DECODER, head_dim=16),
    "Gemma 2": of("Gemma2ForCausalLM", "Gemma2Config", **GEMMA, attn_logit_softcapping=2.0),
    "Gemma 3": of("Gemma3ForCausalLM", "Gemma3TextConfig", **GEMMA),
    "Phi-3": of("Phi3ForCausalLM", "Phi3Config", **DECODER),
    "GPT-2": of("GPT2LMHeadModel", "GPT2Config", **GPT2, scale_attn_by_inverse_layer_idx=True),
    "BERT": of("BertForMaskedLM", "BertConfig", **ENCODER),
    "RoBERTa": of("RobertaForTokenClassification", "RobertaConfig", **ENCODER),
    "ViT": of("ViTForImageClassification", "ViTConfig", **VISION, hidden_dropout_prob=0.0, num_labels=3),
    "CLIP": clip,
}
GENERATE = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3", "Phi-3", "GPT-2")
# before transformers 5 these do not take their attention from AttentionInterface
FIVE_ONLY = ("BERT", "RoBERTa")
AVAILABLE = [name for name in MODELS if FIVE or name not in FIVE_ONLY]
CONTINUOUS = ("Llama", "Qwen3")
FEATURES = {  # a column of the table in docs/transformers.md -> the architectures whose test runs
    "outputs, gradients, padding": MODELS,
    "gate 0 is the base": MODELS,
    "generate: dynamic, static, beams": GENERATE,
    "`generate_batch`": CONTINUOUS,
    "checkpointing": MODELS,
    "`torch.compile`": MODELS,
    "bfloat16 base": MODELS,
    "save, load": MODELS,
}


def base_model(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias") or "norm" in key:
            torch.nn.init.normal_(parameter, mean=0.0 if key.endswith("bias") else 1.0, std=0.3)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


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
    if name == "ViT":
        return {"pixel_values": pixels}
    ids = torch.randint(2, VOCABULARY - 1, (rows, tokens), generator=generator)
    inputs = {"input_ids": ids}
    ids[:, -4] = VOCABULARY - 1  # where CLIP takes the whole text's features
    if kind != "whole":
        mask = torch.ones_like(ids)
        for row in range(rows):
            mask[row, : 3 * row] = 0
        inputs["attention_mask"] = mask if kind == "left-padded" else mask.flip(1)
    return inputs | ({"pixel_values": pixels} if name == "CLIP" else {})


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


def weights_of(attention, prompt):
    """Keys and values of the prompts, from the weights themselves: [P, Hkv * D] each."""
    kind = type(attention).__name__
    if kind == "GPT2Attention":
        made = prompt @ attention.c_attn.weight + attention.c_attn.bias
        return made.split(made.shape[1] // 3, -1)[1:]
    if kind == "Phi3Attention":
        made = F.linear(prompt, attention.qkv_proj.weight)
        width = attention.config.num_key_value_heads * attention.head_dim
        return made[:, -2 * width : -width], made[:, -width:]
    key, value = (
        (attention.key, attention.value)
        if hasattr(attention, "key")
        else (attention.k_proj, attention.v_proj)
    )
    return F.linear(prompt, key.weight, key.bias), F.linear(prompt, value.weight, value.bias)


def the_formula(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Equations 5 to 8: one row of scores over prompts and tokens, each part softmaxed by itself."""
    heads, queries, head_dim = query.shape[1:]
    repeat, cap = heads // key.shape[1], kwargs.get("softcap")

    scaling = head_dim**-0.5 if scaling is None else scaling

    def scores(keys):
        found = query @ keys.mT * scaling
        return cap * torch.tanh(found / cap) if cap else found

    token_scores = scores(key.repeat_interleave(repeat, 1))
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is not None and attention_mask.is_floating_point():  # CLIP before transformers 5
        token_scores = token_scores + attention_mask
    elif attention_mask is not None:
        token_scores = token_scores.masked_fill(~attention_mask, torch.finfo(query.dtype).min)
    elif causal and queries > 1:
        hidden = torch.ones(queries, key.shape[2], dtype=torch.bool).triu(1)
        token_scores = token_scores.masked_fill(hidden, -torch.inf)
    out = token_scores.softmax(-1) @ value.repeat_interleave(repeat, 1)
    if "zinit" in module._modules:
        own = module.zinit
        prompt_key, prompt_value = (t.unflatten(-1, (-1, head_dim)) for t in weights_of(module, own.prompt))
        if hasattr(module, "k_norm"):
            prompt_key = module.k_norm(prompt_key)
        prompt_key, prompt_value = (
            t.transpose(0, 1).repeat_interleave(repeat, 0) for t in (prompt_key, prompt_value)
        )
        gate = own.gate.tanh()[:, None, None]
        out = out + gate * (scores(prompt_key).softmax(-1) @ prompt_value)
    return out.transpose(1, 2), None


AttentionInterface.register("formula", the_formula)
AttentionMaskInterface.register("formula", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextlib.contextmanager
def by_the_formula(model):
    model.set_attn_implementation("formula")
    yield model
    model.set_attn_implementation("zinit")


@pytest.mark.parametrize("kind", ["whole", "left-padded", "right-padded"])
@pytest.mark.parametrize("name", AVAILABLE)
def test_outputs_and_gradients_are_the_formulas(name, kind):
    model, inputs = adapted(name), inputs_of(name, kind)
    out, gradients = step(model, inputs)
    with by_the_formula(model):
        expected, expected_gradients = step(model, inputs)
    assert (out - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    stacks = 2 if name == "CLIP" else 1
    assert gradients.keys() == expected_gradients.keys() and len(gradients) == 2 * ADAPTED * stacks
    for key, gradient in gradients.items():
        size = expected_gradients[key].norm()
        assert size > 0 and (gradient - expected_gradients[key]).norm() <= 1e-4 * size, key
    with zinit.disable_zero_init_attention(model):
        assert (outputs(model, inputs) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["whole", "left-padded"])
@pytest.mark.parametrize("name", AVAILABLE)
def test_at_gate_0_it_is_the_base_bit_for_bit(name, kind):
    base, inputs = base_model(name), inputs_of(name, kind)
    if name == "Gemma 2":
        base.set_attn_implementation("eager")  # sdpa has no soft cap
    expected = outputs(base, inputs)
    model = zinit.add_zero_init_attention(base, PROMPTS, ADAPTED)
    out, gradients = step(model, inputs)
    assert torch.equal(out, expected)
    for key, gradient in gradients.items():
        assert bool(gradient.any()) == key.endswith("zinit.gate"), key
    with torch.no_grad():
        assert torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("kind", ["whole", "left-padded"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}],
    ids=["dynamic", "beams", "static", "no cache"],
)
@pytest.mark.parametrize("name", GENERATE)
def test_generate(name, kind, options):
    model, inputs = adapted(name, gates=3.0), inputs_of(name, kind, tokens=7)
    options = {"max_new_tokens": 10, "do_sample": False} | options
    tokens = model.generate(**inputs, **options)
    with by_the_formula(model):
        assert tokens.tolist() == model.generate(**inputs, **options).tolist()
    if kind == "whole":
        with zinit.disable_zero_init_attention(model):
            assert tokens.tolist() != model.generate(**inputs, **options).tolist()


@pytest.mark.parametrize("name", AVAILABLE)
def test_gradient_checkpointing(name):
    model, inputs = adapted(name).train(), inputs_of(name)
    model.config.use_cache = False  # transformers 4 would make a mask for the one pass and not for the other
    expected, expected_gradients = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    out, gradients = step(model, inputs)
    assert torch.equal(out, expected)
    assert all(torch.equal(gradients[key], expected_gradients[key]) for key in expected_gradients)


@pytest.mark.parametrize("name", AVAILABLE)
def test_torch_compile(name):
    model, inputs = adapted(name), inputs_of(name)
    expected, expected_gradients = step(model, inputs)
    torch._dynamo.reset()
    # transformers' own losses and warnings break graphs of some models: the attention modules must be whole
    compiled = torch.compile(model, backend="aot_eager")
    out, gradients = step(compiled, inputs)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected_gradients[key.removeprefix("_orig_mod.")], rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("name", AVAILABLE)
def test_float32_adapter_on_a_bfloat16_base(name):
    model, inputs = adapted(name), inputs_of(name)
    exact = outputs(model, inputs).detach()
    for key, parameter in model.named_parameters():
        if "zinit" not in key:
            parameter.data = parameter.data.bfloat16()
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    out, gradients = step(model, inputs)
    assert out.dtype == torch.bfloat16 and (out.float() - exact).norm() < 0.1 * exact.norm()
    assert gradients and all(
        g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients.values()
    )


@pytest.mark.parametrize("name", AVAILABLE)
def test_saved_adapters_are_loaded(name, tmp_path):
    model, inputs = adapted(name), inputs_of(name)
    expected = outputs(model, inputs)
    zinit.save_adapter(model, tmp_path / "adapter")
    loaded = zinit.load_adapter(base_model(name), tmp_path / "adapter")
    assert torch.equal(outputs(loaded, inputs), expected)
    assert {p for p, q in loaded.named_parameters() if q.requires_grad} == {
        p for p, _ in model.named_parameters() if ".zinit." in p
    }
    again = zinit.load_adapter(zinit.add_zero_init_attention(base_model(name), 2, 1), tmp_path / "adapter")
    assert torch.equal(outputs(again, inputs), expected)


@pytest.mark.parametrize("name", AVAILABLE)
def test_removed_it_is_the_base_again(name):
    base, inputs = base_model(name), inputs_of(name)
    before, expected = base.config._attn_implementation, outputs(base, inputs)
    keys = list(base.state_dict())
    model = zinit.add_zero_init_attention(base, PROMPTS, ADAPTED)
    assert model is base and model.config._attn_implementation == "zinit"
    assert zinit.remove_zero_init_attention(model) is base
    assert base.config._attn_implementation == before and list(base.state_dict()) == keys
    assert torch.equal(outputs(base, inputs), expected)


def test_removing_keeps_an_implementation_chosen_later():
    model = adapted("Llama")
    model.set_attn_implementation("eager")
    assert zinit.remove_zero_init_attention(model).config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "config, message",
    [
        ({"stacks": {}}, "is for layers none; this model has text_model.encoder.layers, vision_model.enc"),
        ({"stacks": {STACKS[0]: "0"}}, "is for layers text_model.encoder.layers; this model has text_model"),
        ({"stacks": dict.fromkeys(STACKS)}, "holds no prompts"),
        ({"model_type": "siglip"}, "is for a model of the type 'siglip'; this one is a 'clip'"),
        ({"model_type": None}, "is for a model of the type None; this one is a 'clip'"),
    ],
    ids=["no stack", "one of two", "no prompts", "another type", "no type"],
)
def test_a_folder_that_does_not_fit_leaves_the_adapter_in_place(config, message, tmp_path):
    model = adapted("CLIP")
    expected = outputs(model, inputs_of("CLIP"))
    zinit.save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter.json").read_text())
    (tmp_path / "adapter.json").write_text(json.dumps(written | config))
    with pytest.raises(checkpoints.CheckpointError, match=message):
        zinit.load_adapter(model, tmp_path)
    assert torch.equal(outputs(model, inputs_of("CLIP")), expected)


def test_a_dtype_without_fractions_leaves_the_adapter_in_place(tmp_path):
    model = adapted("Llama")
    expected = outputs(model, inputs_of("Llama"))
    zinit.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="dtype must be a floating-point one, got torch.int8"):
        zinit.load_adapter(model, tmp_path, dtype=torch.int8)
    assert torch.equal(outputs(model, inputs_of("Llama")), expected)


@pytest.mark.skipif(not FIVE, reason="an encoder of transformers 4's CLIP is no model of its own")
def test_one_of_two_stacks_is_saved_and_loaded(tmp_path):
    model = base_model("CLIP")
    zinit.add_zero_init_attention(model.text_model, PROMPTS, ADAPTED)
    zinit.save_adapter(model, tmp_path)
    loaded = zinit.load_adapter(base_model("CLIP"), tmp_path)
    assert [row.layer for row in zinit.summary(loaded)] == [row.layer for row in zinit.summary(model)]
    assert len(zinit.summary(loaded)) == ADAPTED


def test_every_official_adapter_fits_a_llama(tmp_path):
    heads = torch.randn(ADAPTED, HEADS)
    made = checkpoints.AdapterCheckpoint(torch.randn(ADAPTED, 10, 32), heads, "tanh", (1, 2), LAYERS, HEADS)
    checkpoints.save_adapter(tmp_path / "v1.pth", made, "official-v1")
    model = zinit.load_adapter(base_model("Llama"), tmp_path / "v1.pth")
    assert torch.equal(torch.tensor([row.gates for row in zinit.summary(model)]), heads.tanh())
    raw = zinit.load_adapter(base_model("Llama"), tmp_path / "v1.pth", gate_activation="identity")
    assert torch.equal(torch.tensor([row.gates for row in zinit.summary(raw)]), heads)


def test_what_does_not_fit_is_told_and_touches_nothing(tmp_path):
    zinit.save_adapter(adapted("Llama"), tmp_path / "llama")
    wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER | {"hidden_size": 64}))
    with pytest.raises(
        checkpoints.CheckpointError, match="hidden size 32, 3 layers and 4 heads; this base has hidden"
    ):
        zinit.load_adapter(wide, tmp_path / "llama")
    with pytest.raises(
        checkpoints.CheckpointError, match="is for layers model.layers; this model has transformer.h"
    ):
        zinit.load_adapter(base_model("GPT-2"), tmp_path / "llama")
    with pytest.raises(
        checkpoints.CheckpointError, match="has several stacks of layers: text_model.encoder.layers"
    ):
        zinit.load_adapter(base_model("CLIP"), tmp_path / "llama" / "adapter.safetensors")
    (tmp_path / "llama" / "adapter.json").write_text("{}")
    with pytest.raises(checkpoints.CheckpointError, match="adapter.json is damaged"):
        zinit.load_adapter(wide, tmp_path / "llama")
    assert wide.config._attn_implementation == "sdpa" and all(p.requires_grad for p in wide.parameters())

    model = adapted("Llama")
    for call, message in (
        (lambda: zinit.add_zero_init_attention(model), "has zero-init prompts already"),
        (lambda: zinit.add_zero_init_attention(wide, 129), "prompt_length must be 1 to 128, got 129"),
        (lambda: zinit.add_zero_init_attention(wide, num_layers=0), "num_layers must be at least 1, got 0"),
        (
            lambda: zinit.add_zero_init_attention(wide, gate_activation="relu"),
            "must be 'tanh' or 'identity', got 'relu'",
        ),
        (
            lambda: zinit.add_zero_init_attention(torch.nn.Linear(2, 2)),
            "Linear has no attention of a known architecture",
        ),
        (lambda: zinit.parameter_groups(wide, 1e-3), r"call add_zero_init_attention\(model\) first"),
        (lambda: model(**inputs_of("Llama"), output_attentions=True), "output_attentions is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.skipif(FIVE, reason="transformers 5 has them on AttentionInterface")
@pytest.mark.parametrize("name", ["BERT", "RoBERTa"])
def test_models_without_attention_interface_are_told(name):
    with pytest.raises(ValueError, match="AttentionInterface|no attention of a known architecture"):
        zinit.add_zero_init_attention(base_model(name))


def test_summary_and_parameter_groups():
    model = adapted("Qwen3")
    rows = zinit.summary(model)
    assert [row.layer for row in rows] == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    gate = model.model.layers[2].self_attn.zinit.gate.detach().tanh()
    assert rows[1].gates == gate.tolist() and f"{float(gate.min()):+8.4f}" in str(rows)
    prompts, gates = zinit.parameter_groups(model, 9e-3, gate_learning_rate=1e-2)
    assert (prompts["lr"], prompts["weight_decay"], gates["lr"], gates["weight_decay"]) == (
        9e-3,
        0.02,
        1e-2,
        0.0,
    )
    assert {id(p) for group in (prompts, gates) for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    deep = zinit.add_zero_init_attention(base_model("Llama"))
    assert len(zinit.summary(deep)) == LAYERS and len(zinit.summary(deep)[0].gates) == HEADS


def test_dropout_concerns_the_tokens_alone():
    model = adapted("Llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    inputs = inputs_of("Llama")
    torch.manual_seed(5)
    first = outputs(model, inputs)
    torch.manual_seed(5)
    assert torch.equal(outputs(model, inputs), first) and not torch.equal(outputs(model, inputs), first)


def test_packed_sequences_see_the_prompts_each():
    model = adapted("Llama")
    ids = inputs_of("Llama")["input_ids"][:1]
    positions = torch.cat([torch.arange(6), torch.arange(8)])[None]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(input_ids=ids[:, :6]).logits, model(input_ids=ids[:, 6:]).logits], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


@pytest.mark.skipif(not FIVE, reason="generate_batch of transformers 4 needs a GPU")
@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_batching(name):
    model = adapted(name, gates=3.0)
    prompts = [row[: 4 + 3 * i].tolist() for i, row in enumerate(inputs_of(name)["input_ids"])]
    config = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    with zinit.continuous_batching(model):
        assert model.config._attn_implementation == "sdpa"
        found = model.generate_batch(prompts, config, room)
    assert model.config._attn_implementation == "zinit"
    found = sorted((tuple(out.prompt_ids), out.generated_tokens) for out in found.values())
    expected = []
    for prompt in prompts:
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        expected.append((tuple(prompt), tokens[0, len(prompt) :].tolist()))
    assert found == sorted(expected)


def test_continuous_batching_of_two_threads_ends_as_it_began(monkeypatch):
    class Slow(list):
        def __len__(self):
            found = super().__len__()
            time.sleep(0.1)  # in which another thread gets its turn
            return found

    monkeypatch.setattr(zinit, "_batching", Slow())
    before = zinit.ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(zinit.ALL_ATTENTION_FUNCTIONS, "sdpa", before)
    inside = threading.Barrier(2, timeout=10)

    def serve(model):
        with zinit.continuous_batching(model):
            inside.wait()

    threads = [threading.Thread(target=serve, args=(adapted("Llama"),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert zinit.ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_trainer(tmp_path):
    if importlib.util.find_spec("datasets"):  # which Trainer imports where it is there
        reason = "the installed datasets wants another huggingface_hub than this transformers"
        pytest.importorskip("datasets", reason=reason, exc_type=ImportError)
    model = adapted("Llama", gates=0.0)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    ids = inputs_of("Llama", rows=8)["input_ids"]
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = transformers.TrainingArguments(
        tmp_path,
        per_device_train_batch_size=4,
        num_train_epochs=3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    optimizer = torch.optim.AdamW(zinit.parameter_groups(model, 0.05))
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) != (".zinit." in key), key
    assert all(max(map(abs, row.gates)) > 0 for row in zinit.summary(model))


def test_projected_prompts_follow_the_parameters():
    model = adapted("Phi-3").eval()
    ids = inputs_of("Phi-3")["input_ids"]
    for _ in range(2):
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
        with by_the_formula(model):
            assert tokens.tolist() == model.generate(ids, max_new_tokens=5, do_sample=False).tolist()
        with torch.no_grad():
            model.model.layers[-1].self_attn.zinit.prompt.mul_(-3)
    copied = copy.deepcopy(model)
    assert torch.equal(outputs(copied, {"input_ids": ids}), outputs(model, {"input_ids": ids}))


def test_the_documentation_has_this_table():
    rows = ["| | " + " | ".join(FEATURES) + " |", "| --- " * (1 + len(FEATURES)) + "|"]
    for name in MODELS:
        label = f"{name} (transformers 5)" if name in FIVE_ONLY else name
        rows.append(
            f"| {label} | " + " | ".join("yes" if name in names else "" for names in FEATURES.values()) + " |"
        )
    assert "\n".join(rows) in (Path(__file__).parent.parent / "docs" / "transformers.md").read_text(), (
        "\n".join(rows)
    )
