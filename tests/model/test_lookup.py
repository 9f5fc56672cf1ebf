"""Prompt-lookup decoding: fewer passes, the same tokens."""

import gc
import weakref

import pytest
import torch
from tiny_models import hf_directory, prompts

from model import sampling
from model.adapter import LlamaAdapter
from model.config import AdapterConfig
from model.errors import UserError
from model.kept_layers import KeptLayers
from model.llama import Llama
from model.loading import load_base
from model.lookup import Lookup
from model.sampling import generate


def test_a_draft_is_what_followed_the_longest_run_last():
    lookup = Lookup([1, 2, 3, 9, 2, 3, 7, 8, 5, 2, 3], 3)
    assert lookup.draft() == [7, 8]  # the last "2, 3"; "5, 2, 3" is new
    lookup.append(9)
    assert lookup.draft() == [2, 3]  # "2, 3, 9" was before
    lookup.append(4)
    assert lookup.draft() == []
    assert Lookup([6, 6, 6], 5).draft() == [6]
    assert Lookup([], 5).draft() == Lookup([1], 5).draft() == []


def test_a_draft_is_about_as_long_as_the_last_one_was_right():
    lookup = Lookup([*range(3, 40), 3], 12)
    assert lookup.draft() == [4, 5]
    for kept, following in ((2, 4), (4, 8), (8, 12), (12, 12), (5, 6), (0, 3), (0, 1), (0, 1), (1, 2)):
        lookup.judge(len(lookup.draft()), kept)
        assert len(lookup.draft()) == following
    lookup.judge(0, 0)  # a token without a draft says nothing
    assert len(lookup.draft()) == 2
    assert len(Lookup([*range(3, 40), 3], 1).draft()) == 1


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantise", [None, "int4"])
def test_the_tokens_are_those_without(tmp_path, monkeypatch, dtype, quantise):
    hf_directory(tmp_path)
    model = load_base(tmp_path, dtype, quantise=quantise).freeze()
    torch.manual_seed(0)
    adapter = LlamaAdapter(model.config, AdapterConfig(gate_init="random"))
    prompt = prompts((6,))[0].tolist() * 3
    passes = []

    def count(kind, name):
        forward = getattr(kind, name)

        def counted(self, tokens, *arguments, **options):
            passes.append(tokens.shape[-1])
            return forward(self, tokens, *arguments, **options)

        monkeypatch.setattr(kind, name, counted)

    count(Llama, "hidden_states")
    count(KeptLayers, "read")
    for temperature in (0, 0.8):
        asked = {"max_new_tokens": 60, "temperature": temperature, "seed": 3, "eos_ids": []}
        plain = generate(model, [prompt], adapter, **asked)
        without = len(passes)
        for length in (1, 4, 100):
            passes.clear()
            assert generate(model, [prompt], adapter, lookup=length, **asked) == plain
            assert max(passes[1:], default=0) <= min(length, 31) + 1
            assert len(passes) <= without
        if temperature == 0:  # a tiny model soon repeats itself
            assert len(passes) < without
        passes.clear()


def test_the_drafts_end_with_the_room(tmp_path):
    hf_directory(tmp_path)
    model = load_base(tmp_path).freeze()
    context = model.config.max_seq_len
    prompt = [5, 6] * ((context - 5) // 2)
    asked = {"max_new_tokens": context - len(prompt), "temperature": 0, "eos_ids": []}
    assert generate(model, [prompt], lookup=16, **asked) == generate(model, [prompt], **asked)


def test_one_prompt_at_a_time(tmp_path):
    hf_directory(tmp_path)
    model = load_base(tmp_path)
    for lookup, asked in ((-1, [[5]]), (4, [[5], [6]])):
        with pytest.raises(UserError, match="lookup takes one prompt"):
            generate(model, asked, max_new_tokens=2, lookup=lookup)


@pytest.mark.parametrize("backend", ["auto", "composed"])
def test_nothing_waits_for_the_collector_behind_a_generation(tmp_path, monkeypatch, backend):
    hf_directory(tmp_path)
    model, caches = load_base(tmp_path).freeze().set_backend(backend), []

    def allocate(*arguments):
        cache = real(*arguments)
        caches.append(weakref.ref(cache))
        return cache

    real = sampling._allocate
    monkeypatch.setattr(sampling, "_allocate", allocate)
    # a stop in the middle of a draft that comes true: the rest of it is never asked for
    monkeypatch.setattr(Lookup, "draft", lambda self: answer[len(self.tokens) - 3 :])
    answer = generate(model, [[5, 6, 7]], max_new_tokens=8, temperature=0, eos_ids=[])[0]
    gc.disable()
    try:
        stop = {"watch": lambda index, tokens: len(tokens) == 4}
        generate(model, [[5, 6, 7]], max_new_tokens=8, temperature=0, eos_ids=[], lookup=8, **stop)
        assert len(caches) == 2 and caches[1]() is None
    finally:
        gc.enable()
