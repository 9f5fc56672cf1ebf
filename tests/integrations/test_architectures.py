"""The table of architectures: each row makes the keys and values that its attention makes; a missing row is shown."""

import re

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
from tiny_transformers import (  # noqa: E402
    ADAPTED,
    AVAILABLE,
    DECODER,
    EAGER,
    FIVE,
    TEXT,
    adapted,
    base_model,
    inputs_of,
    of,
    outputs,
)
from transformers import AttentionInterface  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface  # noqa: E402

from zinit_kernels.integrations import architectures, attention  # noqa: E402
from zinit_kernels.integrations import transformers as zinit  # noqa: E402

UNKNOWN = {
    "Cohere 2": of("Cohere2ForCausalLM", "Cohere2Config", **DECODER),
    "Olmo 3": of("Olmo3ForCausalLM", "Olmo3Config", **DECODER),
    "OPT": of(
        "OPTForCausalLM", "OPTConfig", **TEXT, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64
    ),
    "ELECTRA": of("ElectraForTokenClassification", "ElectraConfig", **TEXT, embedding_size=32),
}


def rows_and_calls(model, inputs, monkeypatch):
    """Each self-attention module with the hidden states that it got, and the keys and values that it attended with."""
    calls, hidden = {}, {}

    def record(module, query, key, value, attention_mask, **_):
        calls[module] = key, value
        return query.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "recorded", record)
    monkeypatch.setitem(
        AttentionMaskInterface._global_mapping, "recorded", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    )
    for module in model.modules():
        if architectures.is_adaptable(module):

            def keep(module, args, kwargs):
                hidden[module] = args[0] if args else kwargs["hidden_states"]

            module.register_forward_pre_hook(keep, with_kwargs=True)
    model.set_attn_implementation("recorded")
    with torch.no_grad():
        model(**inputs)
    assert calls and calls.keys() == hidden.keys()
    return [(module, hidden[module], *calls[module]) for module in calls]


def assert_rows_are_right(model, inputs, monkeypatch):
    """Values, and the direction of the keys at the first token, which a rotary embedding turns by 0.

    Its own factor (YaRN's, in GPT-OSS) is part of the rotary embedding, which prompts do without.
    """
    from zinit_kernels.integrations.prompts import Prompts, _project

    for module, hidden, key, value in rows_and_calls(model, inputs, monkeypatch):
        projection = architectures.ARCHITECTURES[type(module).__name__]
        with torch.no_grad():
            made = _project(module, Prompts([hidden], [torch.zeros(1)], "tanh", projection), key)
        made_key, made_value = (heads.transpose(1, 2) for heads in made)
        torch.testing.assert_close(made_value, value, rtol=1e-5, atol=1e-6)
        made_key, key = (F.normalize(heads[:, :, 0], dim=-1) for heads in (made_key, key))
        torch.testing.assert_close(made_key, key, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", AVAILABLE)
def test_a_row_makes_the_keys_and_values_of_its_attention(name, monkeypatch):
    assert_rows_are_right(base_model(name), inputs_of(name), monkeypatch)


def test_a_key_norm_that_the_configuration_switches_off(monkeypatch):
    model = of("CohereForCausalLM", "CohereConfig", **DECODER, use_qk_norm=False)().eval()
    assert_rows_are_right(model, inputs_of("Llama"), monkeypatch)
    assert outputs(zinit.add_zero_init_attention(model), inputs_of("Llama")).isfinite().all()


@pytest.fixture
def table():
    known = dict(architectures.ARCHITECTURES)
    yield architectures.ARCHITECTURES
    architectures.ARCHITECTURES.clear()
    architectures.ARCHITECTURES.update(known)


@pytest.mark.skipif(
    not FIVE, reason="ELECTRA of transformers 4 does not take its attention from AttentionInterface"
)
@pytest.mark.parametrize("name", UNKNOWN)
def test_the_row_that_a_refusal_shows_is_right(name, table, monkeypatch):
    model, inputs, rows = UNKNOWN[name]().eval(), {"input_ids": inputs_of("Llama")["input_ids"]}, len(table)
    with pytest.raises(ValueError, match="has no attention of a known architecture") as refused:
        zinit.add_zero_init_attention(model)
    exec(str(refused.value).split("\n\n")[1], {})  # the row, as it stands
    assert len(table) == rows + 1
    assert_rows_are_right(model, inputs, monkeypatch)
    assert outputs(zinit.add_zero_init_attention(UNKNOWN[name]()), inputs).isfinite().all()


@pytest.mark.parametrize(
    "model, config, sizes, message",
    [
        (
            "T5ForConditionalGeneration",
            "T5Config",
            {"d_model": 32, "d_kv": 8, "num_layers": 1},
            "not for an encoder-d",
        ),
        pytest.param(
            "StableLmForCausalLM",
            "StableLmConfig",
            DECODER | {"qk_layernorm": True},
            "but not for StableLmAttention: no row describes its k_layernorm, StableLmLayerNormPerHead",
            marks=pytest.mark.skipif(not FIVE, reason="transformers 4 cannot make this model"),
        ),
        (
            "BloomForCausalLM",
            "BloomConfig",
            {"hidden_size": 32, "n_layer": 1, "n_head": 4},
            "which none of its mod",
        ),
        (
            "GPTNeoXForCausalLM",
            "GPTNeoXConfig",
            TEXT,
            r"\n    _, key, value = attention.query_key_value\(hidden\)",
        ),
    ],
)
def test_what_has_no_row_is_refused(model, config, sizes, message):
    with pytest.raises(
        ValueError, match=f"(?s){model} has no attention of a known architecture.*adds one.*{message}"
    ):
        zinit.add_zero_init_attention(of(model, config, **sizes)())


@pytest.mark.parametrize("name", EAGER)
def test_attentions_where_the_token_branch_is_eager(name):
    """Those of the base: at gate 0, and in the first adapted layer, whose tokens have seen no prompt yet."""
    base, inputs = base_model(name), inputs_of(name)
    base.set_attn_implementation("eager")
    expected = base(**inputs, output_attentions=True).attentions
    for gates in (0.0, 0.5):
        found = adapted(name, gates=gates)(**inputs, output_attentions=True).attentions
        assert [weights.shape for weights in found] == [weights.shape for weights in expected]
        for layer, (weights, right) in enumerate(zip(found, expected, strict=True)):
            same = torch.allclose(weights, right, rtol=0, atol=1e-6)
            assert same == (gates == 0.0 or layer < 2), layer


@pytest.mark.parametrize("gates", [0.0, 0.5])
@pytest.mark.parametrize(
    "name", ["Llama", "GPT-2", "SigLIP"]
)  # two do not hand the argument on to their attention
def test_attentions_that_are_not_kept_are_refused(name, gates):
    if name == "SigLIP" and not FIVE:
        pytest.skip(
            "transformers 4 says nothing to SigLIP's attention function, and returns None as for sdpa"
        )
    message = (
        "output_attentions is not supported with zero-init prompts in .*Attention: no weights are kept there"
    )
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        adapted(name, gates=gates)(**inputs_of(name), output_attentions=True)


def test_score_options_with_a_paged_cache_are_refused():
    """The eager formulas know no paged cache; they would attend to the new tokens alone."""
    model = adapted("Gemma 2")
    module = model.model.layers[-1].self_attn
    heads = [torch.zeros(1, heads, 3, 16) for heads in (4, 2, 2)]
    with pytest.raises(ValueError, match="Gemma2Attention is not supported by continuous batching .*softcap"):
        attention.attention_forward(module, *heads, None, softcap=2.0, cache=object())


def test_attention_sinks_are_fused(monkeypatch):
    """By the same numbers as unfused. Layer 1 alone: layer 2 masks the keys outside of its window."""
    model, inputs = adapted("GPT-OSS", gates=2.0), inputs_of("GPT-OSS")
    options = {"max_new_tokens": 4, "do_sample": False}
    layers, given = [layer.self_attn for layer in model.model.layers], []

    def spy(name):
        function = getattr(attention, name)

        def called(*args, sinks=None, **kwargs):
            if sinks is not None:  # the prompt branch by itself has none
                given.extend((name, place) for place, layer in enumerate(layers) if sinks is layer.sinks)
            return function(*args, sinks=sinks, **kwargs)

        monkeypatch.setattr(attention, name, called)

    spy("zero_init_attention")
    spy("zero_init_attention_with_kvcache")
    with torch.no_grad():
        fused = outputs(model, inputs)
    assert given == [("zero_init_attention", 1)]
    given.clear()
    tokens = model.generate(**inputs, **options)
    assert given == [("zero_init_attention", 1), *[("zero_init_attention_with_kvcache", 1)] * 3]
    monkeypatch.setattr(attention, "FUSED", {})
    given.clear()
    with torch.no_grad():
        torch.testing.assert_close(outputs(model, inputs), fused, rtol=0, atol=1e-5)
    assert torch.equal(model.generate(**inputs, **options), tokens) and not given


def test_gemma_2_is_fused_with_its_cap(monkeypatch):
    """In whole passes and while decoding, with the numbers of the eager formula and the prompt term beside it."""
    model, inputs = adapted("Gemma 2", gates=3.0), inputs_of("Gemma 2", tokens=6)
    options = {"max_new_tokens": 2, "do_sample": False}
    given = []
    for name in ("zero_init_attention", "zero_init_attention_with_kvcache"):
        function = getattr(attention, name)

        def counted(*arguments, function=function, **named):
            given.append(named["softcap"])
            return function(*arguments, **named)

        monkeypatch.setattr(attention, name, counted)
    fused = outputs(model, inputs)
    assert given == [2.0] * ADAPTED
    tokens = model.generate(**inputs, **options).tolist()
    assert given == [2.0] * 3 * ADAPTED
    monkeypatch.setattr(attention, "FUSED", {})
    expected = outputs(model, inputs)
    assert tokens == model.generate(**inputs, **options).tolist() and len(given) == 3 * ADAPTED
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)


def test_classes_in_front_of_an_attention_class_are_seen_through():
    """FSDP2 and parametrisations give a module a class of their own, derived from its own."""
    model, inputs = adapted("Gemma 2"), inputs_of("Gemma 2")
    expected = outputs(model, inputs)
    for layer in model.model.layers:
        kind = type(layer.self_attn)
        layer.self_attn.__class__ = type(f"FSDP{kind.__name__}", (kind,), {})
    assert len(zinit.summary(model)) == 2 and torch.equal(outputs(model, inputs), expected)
    with zinit.disable_zero_init_attention(model):
        assert not torch.equal(outputs(model, inputs), expected)
    assert not re.search("zinit", str(zinit.remove_zero_init_attention(model)))
    assert len(zinit.summary(zinit.add_zero_init_attention(model))) == 3
