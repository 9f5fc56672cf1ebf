"""PEFT's adaption prompts, accelerated, against PEFT's own: at gates away from 0 the same numbers, at 0 the base's."""

import copy
from collections import Counter

import pytest
import torch

pytest.importorskip("peft")
from peft import AdaptionPromptConfig, PeftModel, get_peft_model  # noqa: E402
from tiny_peft import BIASED, CONFIGS, NEMO, PROMPTS, adapted, assert_same_step, base_model, batch, step  # noqa: E402
from transformers import AutoModelForCausalLM, GPT2Config, LlamaForSequenceClassification  # noqa: E402

from zinit_kernels.integrations.peft import accelerate, restore  # noqa: E402
from zinit_kernels.integrations.prompts import _kept_tables  # noqa: E402


@pytest.mark.parametrize("kind", ["whole", "left-padded", "right-padded", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_pefts(name, kind):
    model = adapted(CONFIGS[name])
    fused = accelerate(copy.deepcopy(model))
    assert_same_step(fused, model, batch(kind))


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}]
)
@pytest.mark.parametrize("kind", ["whole", "left-padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_generate_is_pefts(name, kind, options):
    if options.get("cache_implementation") == "static" and name == "mistral-window":
        options = {}  # a static window of 8 behind 20 tokens: transformers' own limits
    model = adapted(CONFIGS[name])
    fused = accelerate(copy.deepcopy(model))
    inputs = {key: value for key, value in batch(kind).items() if key != "labels"}
    tokens = fused.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
    assert tokens.tolist() == model.generate(**inputs, max_new_tokens=12, do_sample=False, **options).tolist()
    with fused.disable_adapter():
        assert (
            tokens.tolist()
            != fused.generate(**inputs, max_new_tokens=12, do_sample=False, **options).tolist()
        )


@pytest.mark.parametrize("kind", ["whole", "left-padded", "packed"])
@pytest.mark.parametrize("config", [*CONFIGS.values(), NEMO, BIASED], ids=[*CONFIGS, "nemo", "biased"])
def test_at_gate_0_it_is_the_base_bit_for_bit(config, kind):
    base = base_model(config)
    inputs = batch(kind)
    expected = base(**inputs).logits
    fused = accelerate(adapted(config, gates=0.0, base=base))
    logits, gradients = step(fused, inputs)
    assert torch.equal(logits, expected)
    with torch.no_grad():
        assert torch.equal(fused(**inputs).logits, expected)
    for name, gradient in gradients.items():
        assert bool(gradient.any()) == name.endswith("adaption_gate"), name


def test_layers_that_peft_cannot_run_or_gets_wrong():
    """Against the formula, at gates away from 0: peft raises on the one and adds the bias twice on the other."""
    for config in (NEMO, BIASED):
        model = adapted(config)
        with torch.no_grad():
            logits = accelerate(model)(**batch("whole")).logits
            expected = by_the_formula(model, batch("whole")["input_ids"])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def by_the_formula(model, ids):
    """The whole adapted model, equations 5 to 8 written out."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    body = model.base_model.model.model
    x = body.embed_tokens(ids)
    cos_sin = body.rotary_emb(x, torch.arange(ids.shape[1])[None])
    hidden_from_future = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
    for layer in body.layers:
        attention, prompt = layer.self_attn, None
        if hasattr(attention, "adaption_prompt"):
            prompt, gate, attention = attention.adaption_prompt, attention.adaption_gate, attention.model

        def heads(projection, hidden, attention=attention):
            split = projection(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            return split.repeat_interleave(8 // split.shape[1], 1)

        normed = layer.input_layernorm(x)
        q, k = apply_rotary_pos_emb(
            heads(attention.q_proj, normed), heads(attention.k_proj, normed), *cos_sin
        )
        scores = (q @ k.mT * attention.scaling).masked_fill(hidden_from_future, -torch.inf)
        out = scores.softmax(-1) @ heads(attention.v_proj, normed)
        if prompt is not None:
            prompt_scores = q @ heads(attention.k_proj, prompt).mT * attention.scaling
            out = out + gate * prompt_scores.softmax(-1) @ heads(attention.v_proj, prompt)
        x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.base_model.model.lm_head(body.norm(x))


def test_projections_run_once():
    model = adapted(CONFIGS["llama-gqa"])
    calls = Counter()
    attention = model.base_model.model.model.layers[-1].self_attn.model
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(attention, name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    inputs = batch("whole")
    model(**inputs)
    assert calls == {"q_proj": 2, "k_proj": 2, "v_proj": 3, "o_proj": 2}
    calls.clear()
    accelerate(model)(**inputs)
    assert calls == {"q_proj": 1, "k_proj": 2, "v_proj": 2, "o_proj": 1}


def test_state_dict_files_and_restore(tmp_path):
    model = adapted(CONFIGS["llama-gqa"])
    before = model.state_dict()
    inputs = batch("left-padded")
    expected, fused = step(model, inputs), accelerate(model)
    assert fused is model and accelerate(model) is model
    state = model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in state)
    assert model.config._attn_implementation == "zinit"

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(CONFIGS["llama-gqa"]), tmp_path, is_trainable=True).eval()
    assert torch.equal(step(loaded, inputs)[0], expected[0])
    assert torch.equal(step(accelerate(loaded), inputs)[0], step(model, inputs)[0])

    restore(model)
    assert model.config._attn_implementation == "sdpa"
    assert type(model.base_model).__module__.startswith("peft.")
    assert not any(type(module).__module__.startswith("zinit") for module in model.modules())
    assert torch.equal(step(model, inputs)[0], expected[0])
    assert restore(model) is model


def test_another_attention_implementation_gives_pefts_computation_back():
    model = adapted(CONFIGS["llama-gqa"])
    expected = step(model, batch("whole"))[0]
    accelerate(model).base_model.model.set_attn_implementation("sdpa")
    assert torch.equal(step(model, batch("whole"))[0], expected)


def test_accelerated_again_after_another_implementation():
    model = accelerate(adapted(CONFIGS["llama-gqa"]))
    expected = step(model, batch("whole"))[0]
    model.base_model.model.set_attn_implementation("eager")
    assert accelerate(model).config._attn_implementation == "zinit"
    assert torch.equal(step(model, batch("whole"))[0], expected)
    assert restore(accelerate(model)).config._attn_implementation == "eager"


def test_a_base_that_does_not_take_the_implementation_is_told_and_left_alone(monkeypatch):
    model = adapted(CONFIGS["llama-gqa"])
    body = type(model.base_model.model)
    with monkeypatch.context() as patch:
        patch.setattr(body, "set_attn_implementation", lambda *_: None)  # transformers' own only warns
        with pytest.raises(ValueError, match="LlamaForCausalLM does not take its attention from"):
            accelerate(model)
        assert not any(type(module).__module__.startswith("zinit") for module in model.modules())
    assert accelerate(model).config._attn_implementation == "zinit"


def test_adapters_are_switched_and_disabled():
    inputs = batch("left-padded")
    base = base_model(CONFIGS["llama-gqa"])
    bare = base(**inputs).logits
    model = adapted(CONFIGS["llama-gqa"], base=base, adapters=("default", "second"))
    reference = copy.deepcopy(model)
    accelerate(model)
    for name in ("second", "default", "second"):
        model.set_adapter(name)
        reference.set_adapter(name)
        torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits, rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, bare)
    torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits, rtol=0, atol=1e-5)

    model.add_adapter("third", copy.deepcopy(PROMPTS))
    model.set_adapter("third")
    assert torch.equal(model(**inputs).logits, bare), "a new adapter starts at gate 0"
    model.delete_adapter("third")
    restore(model)
    model.set_adapter("default")
    assert not any(type(module).__module__.startswith("zinit") for module in model.modules())


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_every_row_its_own_adapter(options):
    model = accelerate(adapted(CONFIGS["llama-gqa"], adapters=("default", "second", "third")))
    model.add_adapter("short", AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"))
    names = ["second", "__base__", "default", "short", "second"]
    inputs = {key: value for key, value in batch("left-padded", rows=5).items() if key != "labels"}

    def alone(call):
        found = []
        for row, name in enumerate(names):
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            if name == "__base__":
                with model.disable_adapter():
                    found.append(call(one))
            else:
                model.set_adapter(name)
                found.append(call(one))
        model.set_adapter("third")
        return torch.cat(found)

    with torch.no_grad():
        seen = inputs["attention_mask"].bool()
        expected = alone(lambda one: model(**one).logits)
        mixed = model(**inputs, adapter_names=names).logits
        assert (mixed - expected)[seen].abs().max() <= 1e-5
        assert (mixed - model(**inputs).logits)[seen].abs().max() > 0.01
    expected = alone(lambda one: model.generate(**one, max_new_tokens=6, do_sample=False, **options))
    mixed = model.generate(**inputs, adapter_names=names, max_new_tokens=6, do_sample=False, **options)
    assert mixed.tolist() == expected.tolist()

    with torch.no_grad():
        model.set_adapter("short")
        short = model(**inputs).logits
        with model.disable_adapter():
            base = model(**inputs).logits
            assert torch.equal(model(**inputs, adapter_names=["second"] * 5).logits, base)
        for active in ("third", "short"):  # whose other layers' prompts are nobody's here
            model.set_adapter(active)
            assert torch.equal(model(**inputs, adapter_names=["__base__"] * 5).logits, base)
            found = model(**inputs, adapter_names=["short"] * 5).logits
            assert (found - short)[seen].abs().max() <= 1e-5

    for names, message in (
        ([], r"must be a list of one name for each row, got \[\]"),
        ("third", "must be a list of one name for each row, got 'third'"),
        (["second", "fourth"], r"adapter_names holds \['fourth'\]; this model has \['__base__', 'default'"),
        (["second", "third"], "2 adapter names do not go evenly into a batch of 5 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs, adapter_names=names)
    model.add_adapter("long", AdaptionPromptConfig(adapter_len=5, adapter_layers=1))
    with pytest.raises(ValueError, match="must have one adapter_len, got {'default': 4, 'long': 5}"):
        model(**inputs, adapter_names=["default", "long", "long", "long", "long"])
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        model.train()(**inputs, adapter_names=["default"] * 5)


@pytest.mark.parametrize("names", [["second"] * 3, ["second", "default", "__base__"]])
def test_adapters_that_were_not_moved_with_the_model(names):
    """PEFT keeps those that are not active outside the model, where `.to` does not find them."""
    model = accelerate(adapted(CONFIGS["llama-gqa"], adapters=("default", "second"))).to("meta")
    # one layer: transformers 4 asks for autocast around its rotary embedding, which "meta" does not have
    hidden, *position = torch.empty(3, 5, 64, device="meta"), *torch.empty(2, 3, 5, 8, device="meta")
    with torch.no_grad(), model.base_model._enable_peft_forward_hooks(adapter_names=names):
        attention = model.base_model.model.model.layers[-1].self_attn
        out = attention(hidden_states=hidden, position_embeddings=position, attention_mask=None)[0]
    assert out.shape == hidden.shape and out.is_meta


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = accelerate(adapted(CONFIGS["llama-gqa"]))
    inputs = batch("left-padded")
    _, expected = step(model.train(), inputs)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    _, gradients = step(model, inputs)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_whole_graph_compiles():
    model = accelerate(adapted(CONFIGS["llama-gqa"])).train()
    inputs = batch("whole")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(**inputs).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in step(model, inputs)[1].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_pefts(dtype):
    model = adapted(CONFIGS["llama-gqa"])
    inputs = batch("whole")
    with torch.no_grad():
        exact = model(**inputs).logits
        model.to(dtype)
        theirs = (model(**inputs).logits.float() - exact).abs().max()
        ours = (accelerate(model)(**inputs).logits.float() - exact).abs().max()
    assert 0 < ours <= 2 * theirs


def test_float32_adapter_on_a_half_precision_base():
    model = adapted(CONFIGS["llama-gqa"])
    inputs = batch("left-padded")
    exact = step(model, inputs)[0]
    for name, parameter in model.named_parameters():
        if "adaption" not in name:
            parameter.data = parameter.data.bfloat16()
    with pytest.raises(RuntimeError, match="dtype"):
        model(**inputs)
    logits, gradients = step(accelerate(model), inputs)
    seen = inputs["attention_mask"].bool()
    assert (logits.float() - exact)[seen].abs().max() < 0.05
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients.values())


def test_sequence_classification():
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["llama-gqa"])
    config.num_labels = 3
    prompts = AdaptionPromptConfig(adapter_len=4, adapter_layers=3, task_type="SEQ_CLS")
    model = get_peft_model(LlamaForSequenceClassification(config), prompts).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("adaption_gate"):
            parameter.data.fill_(0.5)
    inputs = {key: value for key, value in batch("left-padded").items() if key != "labels"}
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(accelerate(model)(**inputs).logits, expected, rtol=0, atol=1e-5)


class TestProjectedPromptsAreNeverStale:
    def decode(self, model, prefix_cache, token):
        with torch.no_grad():
            past = copy.deepcopy(prefix_cache)
            return model(input_ids=token, past_key_values=past, use_cache=True).logits

    @pytest.fixture
    def prefilled(self):
        model = accelerate(adapted(CONFIGS["llama-gqa"]))
        ids = batch("whole", rows=1)["input_ids"]
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        return model, cache, ids[:, :1]

    def test_they_are_kept_while_decoding(self, prefilled):
        model, cache, token = prefilled
        layer = model.base_model.model.model.layers[-1].self_attn
        calls = Counter()
        kept = _kept_tables[layer.model]
        for _ in range(3):
            self.decode(model, cache, token)
            assert _kept_tables[layer.model] is kept
        layer.model.k_proj.register_forward_hook(lambda *_: calls.update(["k"]))
        self.decode(model, cache, token)
        assert calls["k"] == 2, "a hooked projection is called again: its hook may do anything"

    CHANGES = {
        "optimizer step": lambda layer: torch.optim.SGD([layer.adaption_prompt], 1.0).step(),
        "fused optimizer step": lambda layer: torch.optim.SGD(
            [layer.adaption_prompt], 1.0, fused=True
        ).step(),
        "in place": lambda layer: layer.adaption_prompt.mul_(2),
        "new parameter": lambda layer: setattr(
            layer, "adaption_prompt", torch.nn.Parameter(torch.ones_like(layer.adaption_prompt))
        ),
        "load_state_dict": lambda layer: layer.load_state_dict(
            {"adaption_prompt": torch.ones_like(layer.adaption_prompt)}, strict=False
        ),
        "gate in place": lambda layer: layer.adaption_gate.mul_(-1),
        "gate to 0": lambda layer: layer.adaption_gate.zero_(),
        "new gate": lambda layer: setattr(
            layer, "adaption_gate", torch.nn.Parameter(torch.ones_like(layer.adaption_gate))
        ),
        "key projection": lambda layer: layer.model.k_proj.weight.mul_(-1),
        "new value weight": lambda layer: setattr(
            layer.model.v_proj, "weight", torch.nn.Parameter(-layer.model.v_proj.weight)
        ),
    }

    @pytest.mark.parametrize("change", CHANGES)
    def test_after_a_change(self, prefilled, change):
        model, cache, token = prefilled
        layer = model.base_model.model.model.layers[-1].self_attn
        before = self.decode(model, cache, token)
        layer.adaption_prompt.grad = torch.randn_like(layer.adaption_prompt)
        with torch.no_grad():
            self.CHANGES[change](layer)
        after = self.decode(model, cache, token)
        _kept_tables.clear()
        assert torch.equal(after, self.decode(model, cache, token))
        assert not torch.equal(after, before)

    def test_training_goes_on_after_generating(self, prefilled):
        model, _, _ = prefilled
        inputs = batch("whole")
        expected = step(model, inputs)[1]
        model.generate(input_ids=inputs["input_ids"], max_new_tokens=4)
        with torch.inference_mode():
            model(**inputs)
        for _ in range(2):
            gradients = step(model, inputs)[1]
            assert all(torch.equal(gradients[name], expected[name]) for name in expected)

    def test_they_end_with_their_layer(self):
        model = accelerate(adapted(CONFIGS["llama"]))
        before = len(_kept_tables)
        with torch.no_grad():
            model(**batch("whole"))
        assert len(_kept_tables) == before + 3
        del model
        import gc

        gc.collect()
        assert len(_kept_tables) <= before


def test_what_is_no_adaption_prompt_model_is_told():
    with pytest.raises(TypeError, match="expected a PeftModel with adaption prompts"):
        accelerate(base_model(CONFIGS["llama"]))
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=128))
    with pytest.raises(
        ValueError, match="'gpt2' are added behind the output projection.*add_zero_init_attention"
    ):
        accelerate(get_peft_model(gpt2, copy.deepcopy(PROMPTS)))
    model = accelerate(adapted(CONFIGS["llama"]))
    with pytest.raises(
        ValueError, match="output_attentions is not supported with zero-init prompts in LlamaA"
    ):
        model(**batch("whole"), output_attentions=True)
