"""A prompt's pass through all layers in one call: as near to float64 as the layers one by one."""

import copy
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from model import llama
from model.adapter import LlamaAdapter
from model.config import AdapterConfig, LlamaConfig
from model.decoding import Decoder
from model.deltas import AdaptedLinear, Delta
from model.llama import KVCache, Llama, Prompt
from model.quantised import quantise
from zinit_kernels import packed

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not packed.MANY_ROWS, reason="the kernels for many rows need AVX-512"),
]
# columns of every kind: 52 is no multiple of 8, and of bfloat16's pairs of 75 the last is half a pair
ODD = {"hidden_size": 52, "intermediate_size": 75, "num_heads_q": 6, "num_heads_kv": 2, "head_dim": 10}
EVEN = {"hidden_size": 64, "intermediate_size": 160, "num_heads_q": 4, "num_heads_kv": 4, "head_dim": 16}
LENGTHS = {"one": [1], "few": [7, 2], "several": [63, 1, 20, 111], "long": [513]}


def model_of(dtype=torch.float32, **shape):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=160, num_layers=3, **(ODD | shape))).initialise(std=0.15)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype).freeze()


def adapter_of(model, **chosen):
    torch.manual_seed(5)
    adapter = LlamaAdapter(model.config, AdapterConfig(gate_init="random", prompt_length=7, **chosen))
    return adapter.requires_grad_(False)


def states(model, lengths, adapter=None, last=False, in_one_call=True, capacity=None):
    """The hidden states of packed sequences, and the cache, which held NaN everywhere."""
    torch.manual_seed(1)
    tokens = torch.randint(3, 160, (sum(lengths),))
    cache = KVCache(model.config, len(lengths), capacity or max(lengths) + 3, model.dtype)
    cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    calls = []
    fill = Decoder.fill
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "fill", lambda *given: calls.append(1) or fill(*given))
        if not in_one_call:
            patch.setattr(llama, "prefill", lambda *given: None)
        hidden = model.hidden_states(tokens, adapter, cu_seqlens=cu_seqlens, cache=cache, last=last)
    assert len(calls) == (in_one_call and model.dtype != torch.float64)
    assert cache.lengths.tolist() == lengths
    return hidden, cache


def written(cache, lengths):
    """The keys and values of all tokens. What lies behind them was not touched."""
    for layers in (cache.keys, cache.values):
        for sequence, length in enumerate(lengths):
            assert layers[:, sequence, length:].isnan().all()
    return torch.cat(
        [torch.cat([c[:, b, :n] for b, n in enumerate(lengths)], 1) for c in (cache.keys, cache.values)]
    )


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("shape", [ODD, EVEN, ODD | {"sliding_window": 9}], ids=["odd", "even", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_further_from_float64_than_the_layers_one_by_one(dtype, shape, lengths):
    model = model_of(dtype, **shape)
    precise = copy.deepcopy(model).double()
    lengths = LENGTHS[lengths]
    for adapter in (None, adapter_of(model), adapter_of(model, num_layers=1, gate_activation="identity")):
        exact, exact_cache = states(precise, lengths, adapter)
        together, cache = states(model, lengths, adapter)
        one_by_one, other_cache = states(model, lengths, adapter, in_one_call=False)
        # of few numbers one of the two is luckier; in float32 the order of the sums is all that differs
        spare = 2 if sum(lengths) < 50 else 1.02 if dtype != torch.float32 else 1.5
        assert error(together, exact) <= spare * error(one_by_one, exact)
        numbers, others, exact_numbers = (written(c, lengths) for c in (cache, other_cache, exact_cache))
        assert error(numbers, exact_numbers) <= spare * error(others, exact_numbers)
        worst, other = ((found - exact).norm(dim=-1).max() for found in (together, one_by_one))
        assert worst <= 3 * other


@pytest.mark.parametrize("how", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_weights(dtype, how):
    model = quantise(model_of(dtype, **EVEN), how)
    for lengths in LENGTHS.values():
        adapter = adapter_of(model)
        together, cache = states(model, lengths, adapter)
        one_by_one, other = states(model, lengths, adapter, in_one_call=False)
        tolerance = 3e-4 if dtype == torch.float32 else 2e-2
        assert error(together, one_by_one.double()) < tolerance
        assert error(written(cache, lengths), written(other, lengths).double()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_last_states_are_those_of_the_last_tokens(dtype, lengths):
    model, lengths = model_of(dtype), LENGTHS[lengths]
    ends = torch.tensor(lengths).cumsum(0) - 1
    whole, cache = states(model, lengths, adapter_of(model))
    last, other = states(model, lengths, adapter_of(model), last=True)
    plain, _ = states(model, lengths, adapter_of(model), last=True, in_one_call=False)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for found in (last, plain):
        assert found.shape == (len(lengths), 52)
        assert error(found, whole[ends].double()) < tolerance
    assert torch.equal(written(cache, lengths), written(other, lengths))


def test_last_of_many_sequences():
    """More than the kernels for few rows take."""
    lengths = [2] * 70
    last, _ = states(model_of(), lengths, last=True)
    whole, _ = states(model_of(), lengths)
    assert error(last, whole[1::2].double()) < 1e-5


def test_a_sequence_has_the_same_bits_whatever_lies_beside_it():
    model = model_of(torch.bfloat16)
    lengths = [63, 40, 111]
    together, cache = states(model, lengths, adapter_of(model))
    torch.manual_seed(1)
    tokens = torch.randint(3, 160, (sum(lengths),))
    for b, (begin, end) in enumerate(pairwise([0, 63, 103, 214])):
        alone = KVCache(model.config, 1, 120, model.dtype)
        cu_seqlens = torch.tensor([0, end - begin], dtype=torch.int32)
        with torch.no_grad():
            hidden = model.hidden_states(
                tokens[begin:end], adapter_of(model), cu_seqlens=cu_seqlens, cache=alone
            )
        assert torch.equal(hidden, together[begin:end])
        assert torch.equal(alone.keys[:, 0, : end - begin], cache.keys[:, b, : end - begin])


def test_prompts_of_a_table():
    model = model_of()
    torch.manual_seed(0)
    key, value = torch.randn(2, 3, 5, 2, 10)
    gate, index = torch.randn(6), torch.tensor([2, 0, -1, 1], dtype=torch.int32)

    def adapter(attention):
        return Prompt(key, value, gate, "tanh", index) if attention.layer_index else None

    lengths = LENGTHS["several"]
    together, _ = states(model, lengths, adapter)
    one_by_one, _ = states(model, lengths, adapter, in_one_call=False)
    assert error(together, one_by_one.double()) < 1e-5


WHAT = [
    "hook",
    "another layer",
    "deltas",
    "forward",
    "backend",
    "gradients",
    "autocast",
    "no gate",
    "other cache",
]


@pytest.mark.parametrize("what", WHAT)
def test_what_the_operator_cannot_know_goes_layer_by_layer(monkeypatch, what):
    model, adapter = model_of(), None
    mlp, lengths = model.layers[1].mlp, [40, 9]
    if what == "hook":
        mlp.register_forward_hook(lambda *given: None)
    elif what == "another layer":
        mlp.up_proj = nn.Sequential(mlp.up_proj)
    elif what == "deltas":
        mlp.up_proj = AdaptedLinear(mlp.up_proj, Delta())
    elif what == "forward":
        monkeypatch.setattr(mlp, "forward", mlp.forward, raising=False)
    elif what == "backend":
        model.set_backend("composed")
    elif what == "no gate":
        adapter = adapter_of(model)
        adapter.gates = None
    cache = KVCache(model.config, 3 if what == "other cache" else 2, 50, torch.float32)
    monkeypatch.setattr(Decoder, "fill", lambda *given: pytest.fail("taken"))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    given = {"cu_seqlens": cu_seqlens, "cache": cache}
    with torch.set_grad_enabled(what == "gradients"), torch.autocast("cpu", enabled=what == "autocast"):
        if what in ("other cache", "autocast"):  # the layers refuse these too
            with pytest.raises(RuntimeError):
                model.hidden_states(torch.arange(3, 52), adapter, **given)
        else:
            model.hidden_states(torch.arange(3, 52), adapter, **given)


def arguments(model, lengths=(3, 34)):
    config = model.config
    cache = KVCache(config, len(lengths), 40, torch.float32)
    decoder = Decoder(model)
    return {
        "input": torch.randn(sum(lengths), config.hidden_size), "weights": decoder.weights,
        "schemes": decoder.schemes, "final_norm": model.norm.weight.detach(), "eps": 1e-5,
        "num_heads_q": config.num_heads_q, "num_heads_kv": config.num_heads_kv,
        "intermediate": config.intermediate_size, "key_cache": cache.keys, "value_cache": cache.values,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32), "rotary_cos": cache.cos,
        "rotary_sin": cache.sin, "prompts": [], "prompt_layers": [], "prompt_index": None, "scale": 0.3,
        "window_left": -1, "tanh_gate": True, "last": False,
    }  # fmt: skip


@pytest.mark.parametrize("last", [False, True])
def test_opcheck(last):
    given = arguments(model_of()) | {"last": last}
    torch.library.opcheck(torch.ops.zinit.prefill_layers_cpu.default, tuple(given.values()))


def test_the_operator_refuses():
    good = arguments(model_of())

    def of(*numbers, dtype=torch.int32):
        return {"cu_seqlens": torch.tensor(numbers, dtype=dtype)}

    cases = [
        ({"input": good["input"][None]}, "input must have shape \\(total, C\\)"),
        ({"input": good["input"].double()}, "input must be float32"),
        ({"input": good["input"][:, 1:]}, "input must be contiguous"),
        ({"input": good["input"][:, 1:].contiguous()}, "final_norm must have shape"),
        (of(0, 3, 36), "must end with the number of rows, 37"),
        (of(1, 3, 37), "must begin with 0"),
        (of(0, 40, 37), "must rise by 0 to 40"),
        (of(0, -1, 37), "must rise by 0 to 40"),
        (of(0, 37), "key_cache is made for 2 sequences, got 1"),
        (of(), "cu_seqlens must have shape"),
        (of(0, 3, 37, dtype=torch.int64), "cu_seqlens must be Int"),
        (of(0, 0, 37) | {"last": True}, "sequence 0 has no tokens"),
        ({"rotary_cos": good["rotary_cos"][:33], "rotary_sin": good["rotary_sin"][:33]}, "must rise by 0 to 33"),
        ({"weights": good["weights"][:-1]}, "weights must be 9 tensors for each"),
        ({"key_cache": good["value_cache"]}, "must lie apart in memory"),
    ]  # fmt: skip
    for change, message in cases:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.zinit.prefill_layers_cpu(*(good | change).values())


def test_no_tokens():
    given = arguments(model_of(), (0, 0))
    assert torch.ops.zinit.prefill_layers_cpu(*given.values()).shape == (0, 52)


def test_last_is_for_packed_tokens():
    with pytest.raises(ValueError, match="give cu_seqlens"):
        model_of().hidden_states(torch.tensor([[5]]), last=True)


def test_nothing_is_left_unwritten():
    """With every number between the stages NaN at the start (ZINIT_POISON_OUTPUTS is read once in a process)."""
    program = "import test_prefill as t\nfor n in ([5], [40, 7]):\n  for last in (False, True):\n"
    program += "    assert t.states(t.model_of(t.torch.bfloat16), n, last=last)[0].isfinite().all()"
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "ZINIT_POISON_OUTPUTS": "1", "PYTHONPATH": paths}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
