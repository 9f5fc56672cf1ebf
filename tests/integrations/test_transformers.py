"""Prompts added to transformers models: by the formula at gates away from 0, the base bit for bit at 0.

The formula is written here once more, from the equations, and takes every architecture's weights by itself.
"""

import contextlib
import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
from repository import ROOT  # noqa: E402
from tiny_transformers import (  # noqa: E402
    ADAPTED,
    AVAILABLE,
    CONTINUOUS,
    DECODER,
    EAGER,
    FIVE,
    FIVE_ONLY,
    GENERATE,
    HEADS,
    LAYERS,
    MODELS,
    PROMPTS,
    adapted,
    base_model,
    frozen,
    inputs_of,
    outputs,
    step,
)
from transformers import AttentionInterface  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface  # noqa: E402

from zinit_kernels.integrations import transformers as zinit  # noqa: E402

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
    if kwargs.get("s_aux") is not None:
        # attention sinks: one more key with a score of its own and without a value, for the tokens alone
        sinks = kwargs["s_aux"][None, :, None, None].expand(*token_scores.shape[:-1], 1)
        token_scores = torch.cat([token_scores, sinks], -1)
        value = F.pad(value, (0, 0, 0, 1))
    out = token_scores.softmax(-1) @ value.repeat_interleave(repeat, 1)
    if "zinit" in module._modules:
        own = module.zinit
        prompt_key, prompt_value = weights_of(module, own.prompt)
        if type(module).__name__ == "Olmo2Attention":  # all heads together
            prompt_key = module.k_norm(prompt_key)
        prompt_key, prompt_value = (t.unflatten(-1, (-1, head_dim)) for t in (prompt_key, prompt_value))
        if hasattr(module, "k_norm") and type(module).__name__ != "Olmo2Attention":
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
    stacks = 2 if name in ("CLIP", "SigLIP") else 1
    assert gradients.keys() == expected_gradients.keys() and len(gradients) == 2 * ADAPTED * stacks
    for key, gradient in gradients.items():
        size = expected_gradients[key].norm()
        assert size > 0 and (gradient - expected_gradients[key]).norm() <= 1e-4 * size, key
    with zinit.disable_zero_init_attention(model):
        assert (outputs(model, inputs) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["whole", "left-padded"])
@pytest.mark.parametrize("name", AVAILABLE)
def test_at_gate_0_it_is_the_base_bit_for_bit(name, kind):
    base, inputs = frozen(base_model(name)), inputs_of(name, kind)
    if name in EAGER:
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
    """An adapted attention module is one graph, forward and backward."""
    model, inputs = adapted(name), inputs_of(name)
    expected = step(model, inputs)
    torch._dynamo.reset()
    attention = [module for module in model.modules() if "zinit" in module._modules][-1]
    attention.compile(backend="aot_eager", fullgraph=True)
    assert_same_step(step(model, inputs), expected)


def test_torch_compile_of_a_whole_model():
    model, inputs = adapted("Llama"), inputs_of("Llama")
    expected = step(model, inputs)
    torch._dynamo.reset()
    assert_same_step(step(torch.compile(model, backend="aot_eager", fullgraph=True), inputs), expected)


def assert_same_step(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    gradients = {key.removeprefix("_orig_mod."): gradient for key, gradient in found[1].items()}
    assert gradients.keys() == expected[1].keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][key], rtol=1e-3, atol=1e-5)


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
def test_removed_it_is_the_base_again(name):
    base, inputs = frozen(base_model(name)), inputs_of(name)
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


def test_what_does_not_fit_is_told_and_touches_nothing():
    wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER | {"hidden_size": 64}))
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
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert wide.config._attn_implementation == "sdpa" and all(p.requires_grad for p in wide.parameters())


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
    assert "\n".join(rows) in (ROOT / "docs" / "transformers.md").read_text(), "\n".join(rows)
