"""What people do to a model besides training it: copies, files, casts, wrong models, two adapters at once."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model  # noqa: E402
from tiny_peft import CONFIGS, PROMPTS, adapted, base_model, batch  # noqa: E402

from zinit_kernels.checkpoints import CheckpointError  # noqa: E402
from zinit_kernels.integrations import peft  # noqa: E402
from zinit_kernels.integrations import transformers as zinit  # noqa: E402

ROOT = Path(__file__).parent.parent


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


def logits(model):
    with torch.no_grad():
        return model(**inputs()).logits


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


@BOTH
def test_a_pickled_model_is_read_by_another_process(make, tmp_path):
    model = make()
    torch.save({"model": model, "inputs": inputs(), "logits": logits(model)}, tmp_path / "model.pt")
    code = "import sys, torch; s = torch.load(sys.argv[1], weights_only=False)\n"
    code += "with torch.no_grad(): print(torch.equal(s['model'](**s['inputs']).logits, s['logits']))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.pt"],
        capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip
    assert done.stdout == "True\n", done.stderr


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
    with pytest.raises(CheckpointError, match="is for layers model.layers; this model has base_model"):
        zinit.load_adapter(model, tmp_path / "adapter")
    assert model.config._attn_implementation == implementation and torch.equal(logits(model), expected)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 6

    both = peft.accelerate(get_peft_model(by_transformers(), copy.deepcopy(PROMPTS)))
    with pytest.raises(ValueError, match="has PEFT's prompts and zero-init prompts too"):
        both(**inputs())


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


def test_continuous_batching_of_two_models_at_once():
    """Who leaves first does not take the other's prompts away."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    first, second = by_transformers(), by_transformers()
    expected = logits(second)
    outer, inner = zinit.continuous_batching(first), zinit.continuous_batching(second)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    torch.testing.assert_close(logits(second), expected, rtol=0, atol=1e-5)
    assert second.config._attn_implementation == "sdpa" and first.config._attn_implementation == "zinit"
    inner.__exit__(None, None, None)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert torch.equal(logits(second), expected)


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
