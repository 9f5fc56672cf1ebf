"""What people do to a model besides training it: copies, files, casts, wrong models, two adapters at once."""

import copy
import io
import os
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
accelerate_hooks = pytest.importorskip("accelerate")
from peft import LoraConfig, get_peft_model  # noqa: E402
from repository import run_python  # noqa: E402
from tiny_peft import CONFIGS, PROMPTS, adapted, base_model, batch  # noqa: E402

from zinit_kernels.integrations import peft  # noqa: E402
from zinit_kernels.integrations import transformers as zinit  # noqa: E402


def by_peft():
    return peft.accelerate(adapted(CONFIGS["llama-gqa"], gates=2.0))


def by_transformers():
    model = zinit.add_zero_init_attention(base_model(CONFIGS["llama-gqa"]), 4, 3)
    for name, parameter in model.named_parameters():
        if name.endswith("zinit.gate"):
            torch.nn.init.normal_(parameter, std=2.0)
    return model


BOTH = pytest.mark.parametrize("make", [by_peft, by_transformers])


def inputs():
    return {"input_ids": batch("whole")["input_ids"]}


def logits(model, **options):
    with torch.no_grad():
        return model(**inputs(), **options).logits


def layer_of(model):
    """The topmost adapted layer's owner of prompts."""
    return [m for m in model.modules() if {"adaption_gate", "gate"} & m._parameters.keys()][-1]


def prompt_of(model):
    layer = layer_of(model)
    return layer.adaption_prompt if hasattr(layer, "adaption_prompt") else layer.prompt


@BOTH
def test_copies_are_equal_and_their_own(make):
    model = make()
    expected = logits(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(logits(copied), expected)
        with torch.no_grad():
            prompt_of(copied).mul_(-1)
        assert not torch.equal(logits(copied), expected) and torch.equal(logits(model), expected)
    fresh = make()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), expected)


def test_pickled_models_are_read_by_another_process(tmp_path):
    models = [by_peft(), by_transformers()]
    torch.save([(model, inputs(), logits(model)) for model in models], tmp_path / "models.pt")
    code = "import sys, torch; models = torch.load(sys.argv[1], weights_only=False)\n"
    # hooks get numbers of their process: those of this one must not take the place of the model's
    code += "attention = models[1][0].model.layers[-1].self_attn\n"
    code += "[attention.register_forward_hook(lambda *_: None) for _ in range(20)]\n"
    code += "with torch.no_grad(): print(*[torch.equal(m(**i).logits, out) for m, i, out in models])\n"
    code += "models[1][0].set_attn_implementation('sdpa')\n"
    code += "try: models[1][0](**models[1][1])\nexcept RuntimeError as error: print('ignored' in str(error))"
    done = run_python("-c", code, tmp_path / "models.pt")
    assert done.stdout == "True True\nTrue\n", done.stderr


def test_save_pretrained_keeps_the_base_and_load_adapter_the_rest(tmp_path):
    model = by_transformers()
    model.save_pretrained(tmp_path / "model")
    zinit.save_adapter(model, tmp_path / "adapter")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert loaded.config._attn_implementation == "sdpa" and "zinit" not in str(loaded)
    with zinit.disable_zero_init_attention(model):
        assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(zinit.load_adapter(loaded, tmp_path / "adapter")), logits(model))


@BOTH
def test_casts_between_two_tokens_are_seen(make):
    """`model.to` writes `.data`, which no version shows."""
    model, ids = make(), inputs()["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids).past_key_values

    def decoded(one):
        with torch.no_grad():
            return one(input_ids=ids[:, :1], past_key_values=copy.deepcopy(cache)).logits

    before = decoded(model)
    model.to(torch.bfloat16).to(torch.float32)
    after = decoded(model)
    assert torch.equal(after, decoded(copy.deepcopy(model))) and not torch.equal(after, before)
    prompt_of(model).data = -prompt_of(model).data
    assert torch.equal(decoded(model), decoded(copy.deepcopy(model))) and not torch.equal(
        decoded(model), after
    )
    assert model.double()(**inputs()).logits.dtype == torch.float64


@BOTH
def test_training_generating_and_accumulating_in_turns(make):
    model = make()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients(rounds=1):
        model.zero_grad()
        for _ in range(rounds):
            model(**inputs(), labels=inputs()["input_ids"]).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in parameters.items()}

    expected = gradients()
    assert len(expected) == 6 and all(gradient.any() for gradient in expected.values())
    with torch.inference_mode():
        model.eval().generate(**inputs(), max_new_tokens=4, do_sample=False)
    model.train()
    twice = gradients(2)
    for name, gradient in expected.items():
        torch.testing.assert_close(twice[name], 2 * gradient)
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    optimizer.step()
    with torch.inference_mode():
        tokens = model.eval().generate(**inputs(), max_new_tokens=6, do_sample=False)
    copied = copy.deepcopy(model).generate(**inputs(), max_new_tokens=6, do_sample=False, use_cache=False)
    assert tokens.tolist() == copied.tolist()


def test_made_in_inference_mode_it_still_answers():
    with torch.inference_mode():
        model = by_transformers()
        expected = model(**inputs()).logits.clone()
        tokens = model.generate(**inputs(), max_new_tokens=4, do_sample=False)
    assert torch.equal(logits(model), expected) and tokens.shape == (3, 24)


def test_shapes_on_the_meta_device():
    model = by_transformers().to("meta")
    attention, hidden = model.model.layers[-1].self_attn, torch.empty(2, 5, 64, device="meta")
    position = torch.empty(2, 2, 5, 8, device="meta").unbind()
    out = attention(hidden, position_embeddings=position, attention_mask=None)[0]
    assert out.shape == (2, 5, 64) and out.is_meta


def test_other_adapters_of_peft():
    base = base_model(CONFIGS["llama-gqa"])
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    expected = logits(lora)
    model = zinit.add_zero_init_attention(lora, 4, 3)
    assert torch.equal(logits(model), expected), "gates begin at 0, whatever the base is"
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 6 and all(".zinit." in name for name in trained)
    assert len(zinit.summary(model)) == 3
    with pytest.raises(TypeError, match="expected a PeftModel with adaption prompts .* over LoraModel"):
        peft.accelerate(lora)


@pytest.mark.parametrize("accelerated", [False, True])
def test_prompts_of_two_kinds_are_refused(accelerated, tmp_path):
    model = adapted(CONFIGS["llama-gqa"])
    model = peft.accelerate(model) if accelerated else model
    zinit.save_adapter(by_transformers(), tmp_path / "adapter")
    implementation, expected = model.config._attn_implementation, logits(model)
    with pytest.raises(ValueError, match="has PEFT's adaption prompts: accelerate"):
        zinit.add_zero_init_attention(model)
    with pytest.raises(ValueError, match="has PEFT's adaption prompts: accelerate"):
        zinit.load_adapter(model, tmp_path / "adapter")
    assert model.config._attn_implementation == implementation and torch.equal(logits(model), expected)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 6

    both = peft.accelerate(get_peft_model(by_transformers(), copy.deepcopy(PROMPTS)))
    with pytest.raises(ValueError, match="has PEFT's prompts and zero-init prompts too"):
        both(**inputs())


def lora(model, **options):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], **options)).eval()


def test_prompts_that_peft_saves_beside_its_own_adapter(tmp_path):
    """modules_to_save puts a wrapper in their place, with a copy for each of its adapters."""
    base = by_transformers()
    with zinit.disable_zero_init_attention(base):
        bare = logits(base)
    before = logits(base)
    model = lora(base, modules_to_save=["zinit"])
    assert torch.equal(logits(model), before)
    summary = zinit.summary(model)
    assert len(summary) == 3 and len(zinit.parameter_groups(model, 1e-3)[0]["params"]) == 3
    assert all(p.requires_grad for group in zinit.parameter_groups(model, 1e-3) for p in group["params"])
    for _, p in model.named_parameters():
        if p.requires_grad and p.shape == (8,):  # the gates of the copies that are trained
            p.data.mul_(-2)
    changed = logits(model)
    assert not torch.equal(changed, before)
    assert zinit.summary(model)[0].gates != summary[0].gates
    with zinit.disable_zero_init_attention(model):
        assert torch.equal(logits(model), bare)
        with model.disable_adapter():
            assert torch.equal(logits(model), bare)
    with model.disable_adapter():  # PEFT's: its copies are left out, and the prompts are those of before
        assert torch.equal(logits(model), before) and zinit.summary(model) == summary
    zinit.save_adapter(model, tmp_path / "adapter")
    loaded = zinit.load_adapter(base_model(CONFIGS["llama-gqa"]), tmp_path / "adapter")
    assert torch.equal(logits(loaded), changed)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="this pass ignored them"):
        logits(model)
    merged = model.merge_and_unload()
    merged.set_attn_implementation("zinit")
    torch.testing.assert_close(logits(merged), changed, rtol=0, atol=1e-5)
    removed = zinit.remove_zero_init_attention(merged)
    assert removed.config._attn_implementation == "sdpa" and torch.equal(logits(removed), bare)
    assert not any(module._forward_hooks for module in removed.modules())


OFFLOADS = {
    "cpu": lambda model, folder: accelerate_hooks.cpu_offload(model, torch.device("cpu")),
    "disk": lambda model, folder: accelerate_hooks.disk_offload(model, folder, torch.device("cpu")),
}


@pytest.mark.parametrize("where", OFFLOADS)
@BOTH
def test_offloaded_parameters_are_there_while_they_are_needed(make, where, tmp_path):
    model = make()
    expected = logits(model)
    tokens = model.generate(**inputs(), max_new_tokens=4, do_sample=False)
    OFFLOADS[where](model, tmp_path)
    assert prompt_of(model).is_meta
    assert torch.equal(logits(model), expected)
    assert torch.equal(model.generate(**inputs(), max_new_tokens=4, do_sample=False), tokens)


def test_hooks_on_the_prompts_are_called():
    """As FSDP2's, which are there to gather the parameters of what it shards."""
    model, expected = by_transformers(), by_transformers()
    for adapter in (m for m in model.modules() if isinstance(m, zinit.ZeroInitPrompts)):
        adapter.register_forward_hook(lambda module, args, output: (-output[0], output[1]))
    with torch.no_grad():
        for adapter in (m for m in expected.modules() if isinstance(m, zinit.ZeroInitPrompts)):
            adapter.prompt.neg_()
    assert torch.equal(logits(model), logits(expected))


def test_adapters_of_an_offloaded_model_are_mixed_and_accelerated_late():
    model = adapted(CONFIGS["llama-gqa"], gates=2.0, adapters=("default", "second"))
    names = ["second", "__base__", "default"]
    expected = logits(peft.accelerate(copy.deepcopy(model)), adapter_names=names)
    plain = logits(model)
    accelerate_hooks.cpu_offload(model, torch.device("cpu"))
    projections = []
    attention = model.base_model.model.model.layers[-1].self_attn.model
    attention.q_proj.register_forward_hook(lambda *_: projections.append(1))
    torch.testing.assert_close(logits(peft.accelerate(model)), plain, rtol=0, atol=1e-5)
    assert len(projections) == 1, "Accelerate's hooks still call PEFT's forward, which projects twice"
    assert torch.equal(logits(model, adapter_names=names), expected)
    assert torch.equal(logits(peft.restore(model)), plain) and len(projections) == 4


def test_prompts_of_an_offloaded_base_are_where_it_computes(tmp_path):
    zinit.save_adapter(by_transformers(), tmp_path)
    base = base_model(CONFIGS["llama-gqa"])
    expected = logits(by_transformers())
    accelerate_hooks.cpu_offload(base, torch.device("cpu"))
    assert torch.equal(logits(zinit.load_adapter(base, tmp_path)), expected)


@BOTH
def test_stacked_adapters_under_vmap(make):
    """As of an ensemble: torch.func's transforms take PyTorch's own operators, as stock PEFT does."""
    model = make()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    stacked = {name: torch.stack([p, -2 * p]) for name, p in parameters.items()}

    options = inputs() | {"use_cache": False}

    def call(adapter):
        return torch.func.functional_call(model, adapter, (), options).logits

    with torch.no_grad():
        expected = torch.stack([call({name: p[row] for name, p in stacked.items()}) for row in range(2)])
        found = torch.func.vmap(call)(stacked)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.equal(found[0], found[1])

    def loss(adapter):
        return call(adapter).square().mean()

    of_each = torch.func.vmap(torch.func.grad(loss))(stacked)
    for row in range(2):
        one = {name: p[row].clone().requires_grad_() for name, p in stacked.items()}
        right = torch.autograd.grad(loss(one), list(one.values()))
        for name, gradient in zip(one, right, strict=True):
            torch.testing.assert_close(of_each[name][row], gradient, rtol=1e-3, atol=1e-6)


def test_tensor_parallel_models_are_refused():
    for model, adapt in (
        (base_model(CONFIGS["llama-gqa"]), zinit.add_zero_init_attention),
        (adapted(CONFIGS["llama-gqa"]), peft.accelerate),
    ):
        (model if adapt is zinit.add_zero_init_attention else model.base_model.model)._tp_size = 2
        with pytest.raises(ValueError, match="is divided among 2 processes by tensor parallelism"):
            adapt(model)
        assert model.config._attn_implementation == "sdpa" and "zinit" not in str(model)
    model = by_transformers()
    for layer in model.model.layers:  # divided after prompts were added: what one of two processes has then
        for name, rows in (("q_proj", 32), ("k_proj", 8), ("v_proj", 8)):
            projection = getattr(layer.self_attn, name)
            projection.weight = torch.nn.Parameter(projection.weight[:rows])
        layer.self_attn.o_proj.weight = torch.nn.Parameter(layer.self_attn.o_proj.weight[:, :32])
    with pytest.raises(ValueError, match=r"8 gates, and this attention call 4 heads.*\(tensor parallelism\)"):
        logits(model)


@pytest.mark.parametrize("names", [None, ["default"]])
def test_a_layer_divided_under_peft_is_refused(names):
    """Its one gate says nothing of the heads. The result was right, and the gradient that of one process's heads."""
    model = peft.accelerate(adapted(CONFIGS["llama-gqa"])).eval()
    for layer in model.base_model.model.model.layers:
        attention = getattr(layer.self_attn, "model", layer.self_attn)
        for name, rows in (("q_proj", 32), ("k_proj", 8), ("v_proj", 8)):
            projection = getattr(attention, name)
            projection.weight = torch.nn.Parameter(projection.weight[:rows])
        attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight[:, :32])
    with pytest.raises(ValueError, match=r"has 8 heads, and this attention call 4.*\(tensor parallelism\)"):
        model(**inputs(), **({} if names is None else {"adapter_names": names * len(inputs()["input_ids"])}))


def test_a_sharded_layer_keeps_its_class():
    model = adapted(CONFIGS["llama-gqa"])
    layer = model.base_model.model.model.layers[-1].self_attn
    layer.__class__ = type("FSDPAdaptedAttention", (type(layer),), {})  # as FSDP2's fully_shard leaves it
    with pytest.raises(
        ValueError, match="class of a layer is FSDPAdaptedAttention.*call accelerate before it"
    ):
        peft.accelerate(model)
    assert model.config._attn_implementation == "sdpa" and "Fused" not in str(model)


def test_what_cannot_be_adapted_is_told_and_touches_nothing(tmp_path):
    model = base_model(CONFIGS["llama-gqa"])
    t5 = transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=32)
    for call, kind, message in (
        (
            lambda: zinit.add_zero_init_attention(None),
            TypeError,
            "expected a transformers model, got NoneType",
        ),
        (
            lambda: zinit.add_zero_init_attention(model, 4.0),
            ValueError,
            "prompt_length must be 1 to 128, got 4.0",
        ),
        (
            lambda: zinit.add_zero_init_attention(torch.nn.Sequential(model)),
            TypeError,
            "got Sequential, which has no set_attn_implementation: pass the whole model, before it is wrapped",
        ),
        (
            lambda: zinit.add_zero_init_attention(model.model.layers),
            TypeError,
            "got ModuleList, which has no set_attn_implementation",
        ),
        (lambda: zinit.add_zero_init_attention(model, "4"), ValueError, "must be 1 to 128, got '4'"),
        (lambda: zinit.add_zero_init_attention(model, 4, 2.5), ValueError, "must be at least 1, got 2.5"),
        (
            lambda: zinit.add_zero_init_attention(model, dtype=torch.int8),
            ValueError,
            "dtype must be a floating-point one, got torch.int8",
        ),
        (
            lambda: zinit.add_zero_init_attention(transformers.T5ForConditionalGeneration(t5)),
            ValueError,
            "T5ForConditionalGeneration has no attention of a known architecture .* adds one",
        ),
        (
            lambda: zinit.save_adapter(model, tmp_path / "made"),
            ValueError,
            "no zero-init prompts; call add_zero",
        ),
        (lambda: zinit.continuous_batching(model).__enter__(), ValueError, "no zero-init prompts"),
        (lambda: peft.restore(model), TypeError, "expected a PeftModel with adaption prompts"),
        (lambda: peft.accelerate(None), TypeError, "expected a PeftModel with adaption prompts"),
    ):
        with pytest.raises(kind, match=message):
            call()
    assert os.listdir(tmp_path) == [] and all(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa" and "zinit" not in str(model)
    assert zinit.remove_zero_init_attention(model) is model


@pytest.mark.native
@BOTH
def test_decoding_hands_the_operator_what_it_takes(make, monkeypatch):
    """Nothing is converted on the way: that would cost more than the attention of a small model."""
    model = make()
    with torch.no_grad():
        cache = model(**inputs()).past_key_values
        expected = model(input_ids=inputs()["input_ids"][:, :1], past_key_values=copy.deepcopy(cache)).logits
        monkeypatch.setattr("zinit_kernels.arguments.from_cache", None)
        found = model(input_ids=inputs()["input_ids"][:, :1], past_key_values=cache).logits
    assert torch.equal(found, expected)
