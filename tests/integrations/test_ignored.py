"""No pass leaves the prompts out without a word, whatever made transformers take another attention function."""

import copy
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers")
from tiny_transformers import FIVE, adapted, base_model, inputs_of, outputs  # noqa: E402

from zinit_kernels.integrations import transformers as zinit  # noqa: E402


def another_implementation(model):
    model.set_attn_implementation("sdpa")  # transformers' own message advises it


def eager(model):
    model.set_attn_implementation("eager")


def configuration_written_to(model):
    model.config._attn_implementation = "sdpa"


def configuration_shared_with_another_model(model):
    transformers.LlamaForCausalLM(model.config).set_attn_implementation("sdpa")


def configuration_of_one_layer_replaced(model):
    attention = model.model.layers[-1].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "sdpa"


def forward_replaced(model):
    attention = model.model.layers[-1].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states, None)


WAYS = (
    another_implementation, eager, configuration_written_to, configuration_shared_with_another_model,
    configuration_of_one_layer_replaced, forward_replaced,
)  # fmt: skip
IGNORED = "has zero-init prompts, and this pass ignored them: "


@pytest.mark.parametrize("way", WAYS, ids=[way.__name__ for way in WAYS])
def test_a_pass_that_ignores_the_prompts_is_an_error(way):
    model, inputs = adapted("Llama"), inputs_of("Llama")
    expected = outputs(model, inputs)
    base = outputs(base_model("Llama"), inputs)
    way(model)
    reason = (
        "forward of its LlamaAttention" if way is forward_replaced else "attention implementation is now '"
    )
    for run in (
        lambda: outputs(model, inputs),
        lambda: model.generate(**inputs, max_new_tokens=1),
        lambda: outputs(copy.deepcopy(model), inputs),
    ):
        with pytest.raises(RuntimeError, match=f"{IGNORED}.*{reason}.*set_attn_implementation\\('zinit'\\)"):
            run()
    if way is forward_replaced:
        return
    with zinit.disable_zero_init_attention(model):  # which asks for the base: no error then
        torch.testing.assert_close(outputs(model, inputs), base, rtol=0, atol=1e-5)
    model.set_attn_implementation("zinit")
    model.model.layers[-1].self_attn.config._attn_implementation = "zinit"
    assert torch.equal(outputs(model, inputs), expected)
    model.set_attn_implementation("eager")
    zinit.remove_zero_init_attention(model)
    torch.testing.assert_close(outputs(model, inputs), base, rtol=0, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("prepare", ["deepcopy", "pickle", "compile", "checkpointing", "at rest"])
def test_it_is_seen_after_other_changes_too(prepare):
    model, inputs = adapted("Llama", gates=0.0 if prepare == "at rest" else 0.5), inputs_of("Llama")
    if prepare == "deepcopy":
        model = copy.deepcopy(model)
    elif prepare == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif prepare == "compile":
        torch._dynamo.reset()
        model.model.layers[-1].compile(backend="eager")
    elif prepare == "checkpointing":
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    outputs(model, inputs)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=IGNORED):
        outputs(model, inputs)


@pytest.mark.skipif(not FIVE, reason="transformers 4 sets the parts of CLIP without looking")
def test_one_of_two_parts():
    model, inputs = adapted("CLIP"), inputs_of("CLIP")
    model.set_attn_implementation({"vision_config": "sdpa"})
    with pytest.raises(RuntimeError, match=f"{IGNORED}its attention implementation is now 'sdpa'"):
        outputs(model, inputs)
    assert model.text_model(inputs["input_ids"]).last_hidden_state.isfinite().all()


def test_removing_gives_each_part_its_own_implementation_back():
    model = base_model("CLIP")
    model.set_attn_implementation("eager")
    model.config.vision_config._attn_implementation = "sdpa"
    zinit.remove_zero_init_attention(zinit.add_zero_init_attention(model))
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"


@pytest.mark.skipif(not FIVE, reason="generate_batch of transformers 4 needs a GPU")
def test_serving_outside_of_continuous_batching_fails(caplog):
    model = adapted("Llama")
    model.set_attn_implementation("sdpa")
    config = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    found = model.generate_batch([[5, 6, 7]], config, room)
    assert all(IGNORED in str(out.error) for out in found.values())


def test_an_attention_function_that_reads_the_prompts_itself_is_no_error():
    """As the formula's of test_integrations_transformers, and after PEFT has wrapped the prompts."""
    read = []

    def somebody_elses(module, query, key, value, attention_mask, **kwargs):
        read.append(module.zinit.prompt.shape)
        return query.transpose(1, 2), None

    transformers.AttentionInterface.register("somebody_elses", somebody_elses)
    model = adapted("Llama")
    for layer in model.model.layers[:1]:  # without prompts, so that it may not read any
        layer.self_attn.config = copy.deepcopy(layer.self_attn.config)
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["zinit"])
    for one in (model, peft.get_peft_model(model, lora)):
        for layer in model.model.layers[1:]:
            layer.self_attn.config._attn_implementation = "somebody_elses"
        read.clear()
        outputs(one, inputs_of("Llama"))
        assert len(read) == 2
