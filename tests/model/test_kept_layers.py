"""Many tokens by one handing over of the model: the bits of token by token, and nothing kept behind the generation."""

import copy
import dataclasses
import gc
import threading

import pytest
import torch
from tiny_models import KINDS, hf_directory, prompts
from torch import nn

from model import sampling
from model.adapter import LlamaAdapter
from model.config import AdapterConfig
from model.decoding import Decoder
from model.errors import UserError
from model.kept_layers import KeptLayers, keep
from model.llama import KVCache, Prompt
from model.loading import load_base
from model.sampling import generate
from model.serving.prompt_table import PromptTable

pytestmark = pytest.mark.native
PROMPTS = [prompt.tolist() for prompt in prompts((7, 1, 19, 5))]
OPERATORS = torch.ops.zinit


def adapter_of(model, **chosen):
    torch.manual_seed(5)
    return LlamaAdapter(model.config, AdapterConfig(gate_init="random", **chosen))


@pytest.fixture
def model(tmp_path):
    hf_directory(tmp_path)
    return load_base(tmp_path).freeze()


def cache_behind(model, adapter, start=PROMPTS):
    cache = KVCache(model.config, len(start), 60, model.dtype)
    sampling._prefill(model, start, adapter, cache)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("quantise", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_have_the_bits_of_token_by_token(tmp_path, kind, dtype, quantise):
    hf_directory(tmp_path, kind)
    model = load_base(tmp_path, dtype, quantise=quantise).freeze()
    for adapter in (None, adapter_of(model), adapter_of(model, num_layers=1, gate_activation="identity")):
        cache, other = (cache_behind(model, adapter) for _ in range(2))
        kept = keep(model, adapter, cache)
        for count in (1, 3, 1, 6):
            tokens = torch.randint(3, 160, (4, count))
            logits, likeliest = kept.read(tokens)
            expected = model.logits(model.hidden_states(tokens, adapter, cache=other).flatten(0, 1))
            assert torch.equal(logits, expected)
            assert torch.equal(likeliest, expected.max(-1).indices)
            assert torch.equal(cache.lengths, other.lengths)
            assert torch.equal(cache.keys, other.keys) and torch.equal(cache.values, other.values)


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_generation_whose_sequences_end_one_by_one(model, monkeypatch, temperature):
    table = PromptTable(model)
    for seed in range(3):
        torch.manual_seed(seed)
        table.add(LlamaAdapter(model.config, AdapterConfig(gate_init="random")))
    asked = {"max_new_tokens": 30, "temperature": temperature, "eos_ids": list(range(3, 20))}
    kept, found = [], {}
    monkeypatch.setattr(sampling, "keep", lambda *given: kept.append(keep(*given)) or kept[-1])
    adapters = (None, adapter_of(model), table.adapter_of([2, 0, -1, 1]))
    for name, adapter in enumerate(adapters):
        found[name] = generate(model, PROMPTS, adapter, **asked)
    assert len({len(answer) for answers in found.values() for answer in answers}) > 2
    assert len(kept) > len(adapters) and None not in kept
    monkeypatch.setattr(sampling, "keep", lambda *given: None)
    for name, adapter in enumerate(adapters):
        assert generate(model, PROMPTS, adapter, **asked) == found[name]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_likeliest_is_the_first_of_the_largest(tmp_path, dtype):
    hf_directory(tmp_path)
    model = load_base(tmp_path, dtype).freeze()
    size, vocab_size = model.config.hidden_size, model.config.vocab_size - 3  # not whole vectors
    model.config = dataclasses.replace(model.config, vocab_size=vocab_size)
    model.lm_head = nn.Linear(size, vocab_size, bias=False, dtype=dtype).requires_grad_(False)
    model.embed_tokens = nn.Embedding(vocab_size, size, dtype=dtype).requires_grad_(False)
    hidden = model.hidden_states(torch.tensor([[7]]), cache=KVCache(model.config, 1, 8, dtype))[0, 0]
    place = int(hidden.abs().argmax())
    last = vocab_size - 1
    cases = {
        (5,): 5, (last,): last, (17, 90): 17, (3, 4): 3, (0, last): 0, (last - 1, last): last - 1,
    }  # fmt: skip
    for value in (4.0, float("nan"), float("inf")):
        for places, first in cases.items():
            model.lm_head.weight.zero_()
            model.lm_head.weight[list(places), place] = value * float(hidden[place].sign())
            kept = keep(model, None, KVCache(model.config, 1, 8, dtype))
            logits, likeliest = kept.read(torch.tensor([[7]]))
            assert likeliest.tolist() == [first if value == 4 else -1]
            if value == 4:
                assert float(logits.max()) > 0
    model.lm_head.weight.fill_(-torch.inf)
    assert keep(model, None, KVCache(model.config, 1, 8, dtype)).read(torch.tensor([[7]]))[1].tolist() == [-1]
    with pytest.raises(UserError, match="not numbers"):
        generate(model, [[7]], max_new_tokens=3, temperature=0, eos_ids=[])


class Growing(LlamaAdapter):
    """Its prompts grow from token to token."""

    times = 0

    def forward(self, attention):
        prompt = super().forward(attention)
        self.times += 1
        return prompt and prompt._replace(gate=prompt.gate * self.times)


class Scaled(nn.Embedding):
    def forward(self, tokens):
        return super().forward(tokens) * 2


def unknown_function(model, adapter):
    return lambda attention: Prompt(*adapter(attention)[:4])


def growing(model, adapter):
    return Growing(model.config, AdapterConfig(gate_init="random"))


def hook_of(name):
    def add(model, adapter):
        model.get_submodule(name).register_forward_hook(lambda module, given, out: out / 2)

    return add


def other_embedding(model, adapter):
    model.embed_tokens = Scaled.from_pretrained(model.embed_tokens.weight)


def norm_of_embedding(model, adapter):
    model.embed_tokens.max_norm = 0.1


def own_logits(model, adapter):
    model.logits = lambda hidden: type(model).logits(model, hidden) * -1


UNKNOWN = {
    "an adapter that grows": growing,
    "a function": unknown_function,
    "a hook of the adapter": lambda model, adapter: (
        adapter.register_forward_hook(lambda *given: None) and None
    ),
    "a hook of the embedding": hook_of("embed_tokens"),
    "a hook of a layer": hook_of("layers.0.mlp"),
    "another embedding": other_embedding,
    "an embedding with max_norm": norm_of_embedding,
    "other logits": own_logits,
    "another backend": lambda model, adapter: model.set_backend("composed") and None,
}


@torch.no_grad()
@pytest.mark.parametrize("what", UNKNOWN)
def test_what_may_change_from_token_to_token_is_asked_each_time(model, what):
    adapter = adapter_of(model, num_layers=model.config.num_layers)
    cache = KVCache(model.config, 1, 20, model.dtype)
    assert isinstance(keep(model, adapter, cache), KeptLayers)
    adapter = UNKNOWN[what](model, adapter) or adapter
    assert keep(model, adapter, KVCache(model.config, 1, 20, model.dtype)) is None
    generate(model, PROMPTS[:1], adapter, max_new_tokens=3, eos_ids=[])


def uses(tensor):
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def test_nothing_is_kept_behind_a_generation(model):
    adapter, weight = adapter_of(model), model.layers[0].mlp.up_proj.weight
    gc.collect()
    before = uses(weight)
    for _ in range(3):
        generate(model, PROMPTS, adapter, max_new_tokens=3, eos_ids=[])
    with pytest.raises(KeyError):
        generate(model, PROMPTS, adapter, max_new_tokens=5, eos_ids=[], watch=lambda *given: {}["stop"])
    gc.collect()
    assert uses(weight) == before


@torch.no_grad()
def test_the_operators_refuse(model):
    cache = KVCache(model.config, 2, 20, model.dtype)
    kept = keep(model, None, cache)
    number, vocab_size = kept._number, model.config.vocab_size
    cases = [
        (torch.tensor([[5]]), "cache_seqlens must have shape \\(1\\)"),
        (torch.tensor([[5], [vocab_size]]), f"tokens must lie in 0 .. {vocab_size - 1}, got {vocab_size}"),
        (torch.tensor([[5], [-1]]), "got -1"),
        (torch.tensor([[5], [5]], dtype=torch.int32), "tokens must be Long"),
        (torch.zeros(2, 33, dtype=torch.int64), "tokens must hold at most 64 tokens, got 66"),
        (torch.zeros(2, 21, dtype=torch.int64), "the capacity of the cache"),
    ]
    for tokens, message in cases:
        with pytest.raises(RuntimeError, match=message):
            OPERATORS.decode_kept_cpu(number, tokens, cache.lengths, None, None)
        assert cache.lengths.tolist() == [0, 0]
    with pytest.raises(RuntimeError, match="cache_seqlens must have shape"):
        OPERATORS.decode_kept_cpu(number, torch.tensor([[5], [6]]), cache.lengths[:1], None, None)
    decoder = Decoder(model)
    head = model.head.weight.detach()
    good = [
        decoder.weights, decoder.schemes, decoder.norm, 1e-5, model.config.num_heads_q, model.config.num_heads_kv,
        model.config.intermediate_size, cache.keys, cache.values, cache.cos, cache.sin, [], [], 0.3, -1, True,
        head, 0, head, 0, vocab_size,
    ]  # fmt: skip
    for place, value, message in (
        (16, head[1:], "embedding must have shape"),
        (18, head.bfloat16(), "head must be"),
        (7, cache.keys[0], "key_cache must have shape"),
        (2, decoder.norm[None], "final_norm must have shape"),
        (0, decoder.weights[1:], "weights must be 9 tensors"),
        (19, 9, "scheme must be 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPERATORS.keep_layers_cpu(*good[:place], value, *good[place + 1 :])
    again = OPERATORS.keep_layers_cpu(*good)
    OPERATORS.drop_layers_cpu(again)
    OPERATORS.drop_layers_cpu(again)  # nothing is left to do
    for unknown in (again, 0, -1, 1 << 40):
        with pytest.raises(RuntimeError, match="layers must be a number that keep_layers_cpu gave"):
            OPERATORS.decode_kept_cpu(unknown, torch.tensor([[5], [6]]), cache.lengths, None, None)


@torch.no_grad()
def test_two_threads_do_not_share_one_model_in_progress(model):
    tokens = torch.tensor([[5]])
    kept = keep(model, None, KVCache(model.config, 1, 500, model.dtype))
    expected, wrong = {}, []
    alone = KVCache(model.config, 1, 500, model.dtype)
    for length in range(1, 401):
        expected[length] = model.logits(model.hidden_states(tokens, cache=alone)[:, 0])

    def run():
        for _ in range(200):
            try:
                logits, _ = kept.read(tokens)
            except RuntimeError as error:
                if "another thread" not in str(error):
                    wrong.append(error)
            else:
                if not any(torch.equal(logits, other) for other in expected.values()):
                    wrong.append(logits)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("lookup", [0, 4])
def test_weights_that_move_within_a_generation(model, lookup):
    asked = {"max_new_tokens": 12, "temperature": 0, "eos_ids": [], "lookup": lookup}
    expected = generate(model, PROMPTS[:1], **asked)
    before = model.norm.weight.data_ptr()

    def move(index, tokens):
        if len(tokens) == 3:
            model.share_memory()

    assert generate(model, PROMPTS[:1], watch=move, **asked) == expected
    assert model.norm.weight.data_ptr() != before

    def free(index, tokens):
        if len(tokens) == 3:
            for weight in other.parameters():
                weight.untyped_storage().resize_(0)

    other = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="no memory"):
        generate(other, PROMPTS[:1], watch=free, **asked)
