"""transformers' continuous batching with prompts: the answers of generate, and everything as before afterwards."""

import contextlib
import os
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from forked import in_a_child

transformers = pytest.importorskip("transformers")
from tiny_transformers import CONTINUOUS, FIVE, adapted, base_model, inputs_of, outputs  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from zinit_kernels.integrations import transformers as zinit  # noqa: E402


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


def test_continuous_batching_that_overlaps_ends_as_it_began():
    """Of one model and of two: who enters first may leave first, in another thread."""
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    model, other = adapted("Llama"), adapted("Llama")
    expected = outputs(model, inputs_of("Llama"))
    contexts = [zinit.continuous_batching(one) for one in (model, model, other)]
    for context in contexts:
        context.__enter__()
    for context in contexts:
        assert model.config._attn_implementation == ("zinit" if context is contexts[2] else "sdpa")
        torch.testing.assert_close(outputs(model, inputs_of("Llama")), expected, rtol=0, atol=1e-5)
        thread = threading.Thread(target=context.__exit__, args=(None, None, None))
        thread.start()
        thread.join()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert model.config._attn_implementation == other.config._attn_implementation == "zinit"
    assert "_supports_flash_attn" not in vars(model)


@pytest.mark.skipif(not FIVE, reason="generate_batch of transformers 4 needs a GPU")
def test_continuous_batching_does_not_switch_to_flash_attention(monkeypatch):
    """It would, by default, where flash-attention is installed, and take the prompts away."""
    api = pytest.importorskip("transformers.generation.continuous_batching.continuous_api")
    monkeypatch.setattr(api, "is_flash_attn_2_available", lambda *_, **__: True)
    monkeypatch.setattr(api, "is_flash_attn_3_available", lambda *_, **__: False)
    model = adapted("Llama", gates=3.0)
    config = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    with zinit.continuous_batching(model):
        found = model.generate_batch([[5, 6, 7]], config, room)
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)[0, 3:]
    assert [out.generated_tokens for out in found.values()] == [expected.tolist()]


@pytest.mark.skipif(not FIVE, reason="generate_batch of transformers 4 needs a GPU")
@pytest.mark.parametrize("how", ["generate_batch", "continuous_batching"])
def test_peft_models_are_served(how):
    """By the answers of stock PEFT, and fused: a query projection runs once."""
    pytest.importorskip("peft")
    from tiny_peft import CONFIGS, adapted, batch

    from zinit_kernels.integrations.peft import accelerate

    model, prompts = adapted(CONFIGS["llama-gqa"], gates=2.0), batch("whole")["input_ids"][:, :5]
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    expected = model.generate(input_ids=prompts, max_new_tokens=4, do_sample=False)[:, 5:].tolist()
    projections = []
    attention = accelerate(model).base_model.model.model.layers[-1].self_attn.model
    attention.register_forward_hook(lambda *_: projections.append("pass"))
    attention.q_proj.register_forward_hook(lambda *_: projections.append("query"))
    if how == "generate_batch":
        found = model.generate_batch(prompts.tolist(), config, room)
    else:
        with zinit.continuous_batching(model):
            found = model.generate_batch(prompts.tolist(), config, room)
    assert sorted(out.generated_tokens for out in found.values()) == sorted(expected)
    assert projections.count("query") == projections.count("pass") > 0
    assert model.config._attn_implementation == "zinit"


@pytest.mark.skipif(not FIVE, reason="generate_batch of transformers 4 needs a GPU")
def test_the_base_is_served_where_it_was_asked_for():
    """Continuous batching computes in a thread of its own, which stands in no block."""
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    model, base, tokens = adapted("Llama", gates=3.0), base_model("Llama"), torch.tensor([[5, 6, 7]])

    def served():
        with zinit.continuous_batching(model):
            (found,) = model.generate_batch(tokens.tolist(), config, room).values()
        return found.generated_tokens

    def by(model):
        return model.generate(tokens, max_new_tokens=4, do_sample=False)[0, 3:].tolist()

    with zinit.disable_zero_init_attention(model):
        assert served() == by(base)
    assert served() == by(model) != by(base)


@pytest.mark.skipif(not FIVE, reason="generate_batch of transformers 4 needs a GPU")
def test_adapter_names_are_refused_where_they_would_be_ignored():
    pytest.importorskip("peft")
    from tiny_peft import CONFIGS, adapted

    from zinit_kernels.integrations.peft import accelerate

    with pytest.raises(ValueError, match="adapter_names is not supported by generate_batch"):
        accelerate(adapted(CONFIGS["llama-gqa"])).generate_batch([[5, 6]], adapter_names=["default"])


def test_a_context_that_cannot_be_entered_leaves_nothing_behind(monkeypatch):
    """transformers' functions are its own again, and no adapter is kept out of what is served later."""
    from zinit_kernels.integrations.layers import served_without

    before, model = ALL_ATTENTION_FUNCTIONS["sdpa"], adapted("Llama")

    def refuse(self, *_, **__):
        raise ValueError("not this one")

    monkeypatch.setattr(type(model), "set_attn_implementation", refuse)
    with (
        zinit.disable_zero_init_attention(model),
        pytest.raises(ValueError, match="not this one"),
        zinit.continuous_batching(model),
    ):
        pass
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before and not served_without


@pytest.mark.parametrize("first", ["disabled", "added", "plain"])
@pytest.mark.parametrize("second", ["disabled", "added", "plain"])
def test_contexts_that_overlap_must_agree(first, second):
    """All requests share the model, so one context would get the other's answers without a word."""
    model, entry = adapted("Llama"), torch.randn(1, 1, 32)
    blocks = {
        "disabled": lambda: zinit.disable_zero_init_attention(model),
        "added": lambda: zinit.per_sample_prompts(model, entry.clone()),
        "plain": contextlib.nullcontext,
    }
    with ThreadPoolExecutor(1) as thread, blocks[second]():
        block = blocks[first]()
        thread.submit(block.__enter__).result()
        context = zinit.continuous_batching(model)
        thread.submit(context.__enter__).result()
        if first == second:
            with zinit.continuous_batching(model):
                assert model.config._attn_implementation == "sdpa"
        else:
            said = "begun elsewhere with.* leave that context first"
            with pytest.raises(ValueError, match=said), zinit.continuous_batching(model):
                pass
        thread.submit(context.__exit__, None, None, None).result()
        with zinit.continuous_batching(model):  # now it may
            pass
    assert model.config._attn_implementation == "zinit"


def test_the_base_is_not_asked_for_within_a_context():
    """generate_batch computes in a thread that knows nothing of the block."""
    model = adapted("Llama")
    with (
        zinit.continuous_batching(model),
        pytest.raises(ValueError, match="enter disable_zero_init_attention first"),
        zinit.disable_zero_init_attention(model),
    ):
        pass
    with (
        zinit.disable_zero_init_attention(model),
        zinit.continuous_batching(model),
        zinit.disable_zero_init_attention(model),  # says nothing new
    ):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_another_thread_enters():
    """The child has only the thread that forked, and a lock that another one held would never be free there."""
    model, other, forking = adapted("Llama"), adapted("Llama"), threading.Event()
    real = model.set_attn_implementation

    def slow(implementation):
        forking.set()
        time.sleep(0.3)
        real(implementation)

    model.set_attn_implementation = types.MethodType(lambda self, *args: slow(*args), model)

    def serve():
        with zinit.continuous_batching(model):
            time.sleep(0.3)

    thread = threading.Thread(target=serve)
    thread.start()
    assert forking.wait(60)

    def served_here():
        with zinit.continuous_batching(other):
            return other.config._attn_implementation

    assert in_a_child(served_here) == "sdpa"
    thread.join()
