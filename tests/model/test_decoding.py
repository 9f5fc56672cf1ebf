"""Decoding through all layers in one call: the tokens and hidden states of the layers one by one."""

import copy

import pytest
import torch
from tiny_models import KINDS, hf_directory, prompts
from torch import nn

from model import decoding
from model.adapter import LlamaAdapter
from model.config import AdapterConfig
from model.decoding import Decoder
from model.llama import KVCache, Prompt
from model.loading import load_base
from model.quantised import quantise as quantise_base
from model.sampling import _prefill, generate

pytestmark = pytest.mark.native
PROMPTS = [prompt.tolist() for prompt in prompts((7, 1, 19, 5))]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def states(model, adapter, next_tokens, monkeypatch, in_one_call, start=PROMPTS):
    """The hidden states of the next tokens [B, T], and the cache behind them."""
    cache = KVCache(model.config, len(start), 60, model.dtype)
    calls = []
    run = Decoder.run
    with torch.no_grad(), monkeypatch.context() as patch:
        _prefill(model, start, adapter, cache)
        patch.setattr(Decoder, "run", lambda *given: calls.append(1) or run(*given))
        if not in_one_call:
            patch.setattr(decoding, "NATIVE", False)
        hidden = model.hidden_states(next_tokens, adapter, cache=cache)
    assert len(calls) == in_one_call
    return hidden.float(), cache


def adapter_of(model, **chosen):
    torch.manual_seed(5)
    return LlamaAdapter(model.config, AdapterConfig(gate_init="random", **chosen))


@pytest.mark.parametrize("quantise", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_all_layers_in_one_call_are_the_layers_one_by_one(tmp_path, monkeypatch, kind, dtype, quantise):
    hf_directory(tmp_path, kind)
    model = load_base(tmp_path, dtype, quantise=quantise).freeze()
    for adapter in (None, adapter_of(model), adapter_of(model, num_layers=1, gate_activation="identity")):
        for tokens in (torch.tensor([[5], [9], [11], [3]]), torch.randint(3, 160, (4, 6))):
            one_by_one, cache = states(model, adapter, tokens, monkeypatch, False)
            together, other = states(model, adapter, tokens, monkeypatch, True)
            # a number near the middle of two 16-bit activations may be rounded either way
            tolerance = TOLERANCE[dtype] if quantise is None else max(TOLERANCE[dtype], 5e-4)
            assert (together - one_by_one).abs().max() <= tolerance * one_by_one.abs().max()
            assert torch.equal(cache.lengths, other.lengths)
            for a, b in ((cache.keys, other.keys), (cache.values, other.values)):
                torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(a.abs().max()))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_several_tokens_of_one_sequence_have_the_bits_of_one_by_one(tmp_path, monkeypatch, dtype):
    """Also where a token more asks for another number of splits of the cache."""
    hf_directory(tmp_path)
    model = load_base(tmp_path, dtype).freeze()
    adapter = adapter_of(model)
    tokens = torch.randint(3, 160, (1, 8))
    together, cache = states(model, adapter, tokens, monkeypatch, True, PROMPTS[:1])
    alone = KVCache(model.config, 1, 60, dtype)
    with torch.no_grad():
        _prefill(model, PROMPTS[:1], adapter, alone)
        steps = [model.hidden_states(tokens[:, t : t + 1], adapter, cache=alone) for t in range(8)]
    assert torch.equal(together, torch.cat(steps, 1).float())
    assert torch.equal(cache.keys, alone.keys) and torch.equal(cache.values, alone.values)


@pytest.mark.parametrize("quantise", [None, "int8"])
def test_greedy_tokens_are_the_same(tmp_path, monkeypatch, quantise):
    hf_directory(tmp_path, "llama3")
    model = load_base(tmp_path, quantise=quantise).freeze()
    adapter = adapter_of(model)
    asked = {"max_new_tokens": 30, "temperature": 0, "eos_ids": []}
    together = generate(model, PROMPTS, adapter, **asked)
    monkeypatch.setattr(decoding, "decode", lambda *given: None)
    monkeypatch.setattr("model.llama.decode", lambda *given: None)
    assert generate(model, PROMPTS, adapter, **asked) == together


@pytest.fixture
def model(tmp_path):
    hf_directory(tmp_path)
    return load_base(tmp_path).freeze()


def test_prompts_of_a_table_and_of_its_rows(model, monkeypatch):
    config = model.config
    torch.manual_seed(0)
    key, value = torch.randn(2, 3, 5, config.num_heads_kv, config.head_dim)
    gate = torch.randn(config.num_heads_q)
    index = torch.tensor([2, 0, -1, 1], dtype=torch.int32)

    def adapter(attention):
        return Prompt(key, value, gate, "tanh", index) if attention.layer_index else None

    tokens = torch.tensor([[5], [9], [11], [3]])
    one_by_one, _ = states(model, adapter, tokens, monkeypatch, False)
    together, _ = states(model, adapter, tokens, monkeypatch, True)
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_replaced_is_used(model, monkeypatch):
    cache = KVCache(model.config, 1, 30, model.dtype)
    tokens = torch.tensor([[5]])
    with torch.no_grad():
        first = model.hidden_states(tokens, cache=cache)
        before = cache.decoder
        model.hidden_states(tokens, cache=cache)
        assert cache.decoder is before
        other = copy.deepcopy(model)
        for layer in model.layers:
            layer.mlp.down_proj.weight = nn.Parameter(torch.zeros_like(layer.mlp.down_proj.weight))
            layer.self_attn.o_proj.weight.zero_()
        cache.lengths.zero_()
        changed = model.hidden_states(tokens, cache=cache)
        torch.testing.assert_close(changed, model.norm(model.embed_tokens(tokens)))
        cache.lengths.zero_()
        assert torch.equal(other.hidden_states(tokens, cache=cache), first)
        for layer in other.layers:
            for weight in (layer.mlp.down_proj.weight, layer.self_attn.o_proj.weight):
                weight.data = torch.zeros_like(weight)
        cache.lengths.zero_()
        changed = other.hidden_states(tokens, cache=cache)
        torch.testing.assert_close(changed, other.norm(other.embed_tokens(tokens)))


def step_of_an_optimizer(model, adapter):
    adapter.prompts.grad = torch.ones_like(adapter.prompts)
    torch.optim.AdamW([adapter.prompts], lr=0.5, fused=True).step()


def write_and_forget(model, adapter):
    adapter.prompts.data.mul_(-2)
    adapter.forget()


CHANGES = {
    "prompts": lambda model, adapter: adapter.prompts.mul_(-2),
    "gates": lambda model, adapter: adapter.gates.mul_(-2),
    "other gates": lambda model, adapter: setattr(adapter, "gates", nn.Parameter(-adapter.gates)),
    "projection": lambda model, adapter: model.layers[-1].self_attn.k_proj.weight.mul_(-1),
    "other projection": lambda model, adapter: setattr(
        model.layers[-1].self_attn.v_proj.weight, "data", -model.layers[-1].self_attn.v_proj.weight
    ),
    "optimizer": step_of_an_optimizer,
    "forget": write_and_forget,
    "hook": lambda model, adapter: adapter.register_forward_hook(
        lambda module, given, prompt: prompt and prompt._replace(gate=-prompt.gate)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_prompts_are_made_once_and_again_after_a_change(model, monkeypatch, change):
    adapter = adapter_of(model)
    with torch.no_grad():
        adapter.gates.fill_(1)
    asked = []
    make = decoding._prompts
    monkeypatch.setattr(decoding, "_prompts", lambda *given: asked.append(1) or make(*given))
    cache = KVCache(model.config, 1, 30, model.dtype)

    def hidden(cache):
        cache.lengths.zero_()
        return model.hidden_states(torch.tensor([[5]]), adapter, cache=cache)

    with torch.no_grad():
        first = hidden(cache)
        assert torch.equal(hidden(cache), first) and len(asked) == 1
        CHANGES[change](model, adapter)
        changed = hidden(cache)
        assert len(asked) == 2 and not torch.allclose(changed, first, atol=1e-3)
        assert torch.equal(changed, hidden(KVCache(model.config, 1, 30, model.dtype)))


def test_an_adapter_of_another_kind_is_asked_for_every_token(model, monkeypatch):
    class Growing(LlamaAdapter):
        gain = 1

        def forward(self, attention):
            prompt = super().forward(attention)
            return prompt and prompt._replace(gate=prompt.gate * self.gain)

    adapter = Growing(model.config, AdapterConfig(gate_init="random"))
    cache = KVCache(model.config, 1, 30, model.dtype)
    found = []
    with torch.no_grad():
        for gain in (1, -3):
            adapter.gain = gain
            cache.lengths.zero_()
            found.append(model.hidden_states(torch.tensor([[5]]), adapter, cache=cache))
    assert not torch.allclose(*found, atol=1e-3)


class Halved(nn.Module):
    """With the weights of an MLP, and another formula."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x):
        return self.down_proj(self.up_proj(x)) / 2


@pytest.mark.parametrize(
    "what",
    [
        "hook", "hook of a layer", "hook of attention", "later hook", "hook of all", "forward", "another layer",
        "another formula", "backend", "gradients", "dtype",
    ],
)  # fmt: skip
def test_what_the_operator_cannot_know_goes_layer_by_layer(model, monkeypatch, what):
    layer = model.layers[1]
    if what == "hook":
        layer.mlp.up_proj.register_forward_hook(lambda *given: None)
    elif what == "hook of a layer":
        layer.register_forward_hook(lambda module, given, out: out / 2)
    elif what == "hook of attention":
        layer.self_attn.register_forward_pre_hook(lambda *given: None)
    elif what == "another formula":
        layer.mlp = Halved(layer.mlp)
    elif what == "forward":
        monkeypatch.setattr(layer.self_attn.q_proj, "forward", layer.self_attn.q_proj.forward, raising=False)
    elif what == "another layer":
        layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj)
    elif what == "backend":
        model.set_backend("composed")
    cache = KVCache(model.config, 1, 30, torch.float32)
    if what == "dtype":
        model.layers[0].mlp.up_proj.weight.data = model.layers[0].mlp.up_proj.weight.data.double()
    handles = []
    if what == "later hook":
        with torch.no_grad():
            model.hidden_states(torch.tensor([[5]]), cache=cache)
        handles.append(layer.mlp.register_forward_hook(lambda *given: None))
    if what == "hook of all":
        handles.append(nn.modules.module.register_module_forward_hook(lambda *given: None))
    monkeypatch.setattr(Decoder, "run", lambda *given: pytest.fail("taken"))
    try:
        with torch.set_grad_enabled(what == "gradients"):
            model.hidden_states(torch.tensor([[5]]), cache=cache)
    except RuntimeError as error:
        assert what == "dtype" and "dtype" in str(error)
    finally:
        for handle in handles:
            handle.remove()


def arguments(model, tokens=2):
    config = model.config
    cache = KVCache(config, 1, 20, torch.float32)
    decoder = Decoder(model)
    x = torch.randn(1, tokens, config.hidden_size)
    return {
        "input": x, "weights": decoder.weights, "schemes": decoder.schemes, "final_norm": model.norm.weight.detach(),
        "eps": 1e-5, "num_heads_q": config.num_heads_q, "num_heads_kv": config.num_heads_kv,
        "intermediate": config.intermediate_size, "key_cache": cache.keys, "value_cache": cache.values,
        "cache_seqlens": cache.lengths, "block_table": None, "rotary_cos": cache.cos, "rotary_sin": cache.sin,
        "prompts": [], "prompt_layers": [], "prompt_index": None, "scale": 0.3, "window_left": -1, "tanh_gate": True,
    }  # fmt: skip


def test_opcheck(model):
    given = arguments(model)
    torch.library.opcheck(torch.ops.zinit.decode_layers_cpu.default, tuple(given.values()))


def test_the_operator_refuses(model):
    good = arguments(model)
    cache = good["key_cache"]
    flat = torch.zeros(cache.numel() * 2)
    overlapping = flat.as_strided(cache.shape, (1, *cache.stride()[1:]))
    cases = [
        ({"input": torch.randn(1, 65, model.config.hidden_size)}, "at most 64 tokens, got 65"),
        ({"input": good["input"][0]}, "input must have shape \\(B, T, C\\)"),
        ({"input": good["input"].double()}, "input must be float32"),
        ({"weights": good["weights"][:-1]}, "weights must be 9 tensors for each"),
        ({"weights": [*good["weights"][:-1], good["weights"][0]]}, "down weight must have shape"),
        ({"schemes": good["schemes"][:-1]}, "schemes must be 7 numbers"),
        ({"schemes": [*good["schemes"][:-1], 8 + 256 * 32]}, "down weight must have shape"),
        ({"final_norm": good["final_norm"][1:]}, "final_norm must have shape"),
        ({"num_heads_q": 5}, "must be a multiple"),
        ({"intermediate": 0}, "intermediate must be positive"),
        ({"key_cache": cache[..., :-1]}, "must have shape"),
        ({"key_cache": cache.bfloat16()}, "key_cache must have the input's dtype"),
        ({"key_cache": good["value_cache"]}, "must lie apart in memory"),
        ({"key_cache": overlapping}, "its layers must follow one another"),
        ({"key_cache": cache[:, :1].expand(-1, 2, -1, -1, -1), "input": torch.randn(2, 1, cache.shape[-1])}, "shape"),
        ({"cache_seqlens": torch.tensor([19], dtype=torch.int32)}, "the capacity of the cache"),
        ({"cache_seqlens": torch.tensor([-1], dtype=torch.int32)}, "must lie in 0"),
        ({"cache_seqlens": torch.tensor([0])}, "cache_seqlens must be Int"),
        ({"rotary_cos": good["rotary_cos"][:1], "rotary_sin": good["rotary_sin"][:1]}, "rotary_cos has 1 positions"),
        ({"prompt_layers": [1]}, "prompts must be 3 tensors"),
        ({"prompt_layers": [7], "prompts": [torch.ones(1)] * 3}, "prompt_layers must rise and be below"),
        ({"prompt_layers": [1], "prompts": [torch.ones(1)] * 3}, "must have 4 dimensions"),
    ]  # fmt: skip
    for change, message in cases:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.zinit.decode_layers_cpu(*(good | change).values())


def test_nothing_is_left_unwritten(tmp_path):
    """With every intermediate number NaN at the start (ZINIT_POISON_OUTPUTS is read once in a process)."""
    import os
    import subprocess
    import sys

    hf_directory(tmp_path)
    program = f"""
import torch
from model.llama import KVCache
from model.loading import load_base
for how in (None, "int4"):
    model = load_base({str(tmp_path)!r}, torch.bfloat16, quantise=how).freeze()
    cache = KVCache(model.config, 3, 40, torch.bfloat16)
    with torch.no_grad():
        for tokens in (1, 5):
            assert model.hidden_states(torch.full((3, tokens), 7), cache=cache).isfinite().all()
"""
    environment = {**os.environ, "ZINIT_POISON_OUTPUTS": "1"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_quantising_keeps_the_fingerprints_of_the_files(model, tmp_path):
    from model.fingerprint import adapter_metadata, is_of_base

    metadata = adapter_metadata(model)
    packed = quantise_base(load_base(tmp_path), "int4")
    assert adapter_metadata(packed) == metadata and is_of_base(metadata, packed)
    assert not is_of_base({"base_fingerprint": "0" * 16}, packed)
