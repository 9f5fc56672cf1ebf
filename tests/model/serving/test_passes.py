"""A decoding step of the engine is one call of the CPU kernels, and what changes between requests is noticed."""

import copy
import gc
import weakref

import pytest
import torch
from tiny_serving import Listener, alone, make_adapter, make_engine, random_prompts, run
from torch import nn

from model.kept_layers import KeptLayers
from model.llama import Llama
from model.serving import passes
from model.serving.request import Sampling

pytestmark = pytest.mark.native
GREEDY = Sampling(max_new_tokens=12, temperature=0, eos_ids=())
PROMPT = [5, 6, 7]


@pytest.fixture
def calls(monkeypatch):
    """The names of the calls of the base, one for each pass."""
    made = []
    for owner, name in ((KeptLayers, "read"), (Llama, "hidden_states")):
        function = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *given, f=function, n=name, **named: made.append(n) or f(*given, **named)
        )
    return made


@pytest.mark.parametrize("names", [[None], ["tall"], [None, "tall", "short", "identity"]], ids=str)
def test_a_decoding_step_is_one_call(calls, names):
    engine, adapters = make_engine()
    prompts = random_prompts(len(names), 30)
    heard = [Listener() for _ in names]
    for prompt, name, listener in zip(prompts, names, heard, strict=True):
        engine.submit(prompt, name, GREEDY, tell=listener)
    while not all(listener.tokens for listener in heard):
        engine.step()
    calls.clear()
    engine.step()
    assert calls == ["read"]
    run(engine)
    assert set(calls) == {"read"}
    for prompt, name, listener in zip(prompts, names, heard, strict=True):
        assert listener.tokens[0] == alone(engine.model, prompt, adapters[name], GREEDY)[0]


def test_more_sequences_than_a_call_takes(calls):
    engine, adapters = make_engine(max_running=40, chunk=512)
    prompts = [[3 + place, 50, 9] for place in range(40)]
    names = [list(adapters)[place % 4] for place in range(40)]
    answers = engine.generate(prompts, names, GREEDY)
    assert calls.count("hidden_states") >= GREEDY.max_new_tokens - 1
    for prompt, name, (answer,) in zip(prompts, names, answers, strict=True):
        assert answer == alone(engine.model, prompt, adapters[name], GREEDY)[0]


def replace_weight(model):
    projection = model.layers[1].mlp.down_proj
    projection.weight = nn.Parameter(-projection.weight, requires_grad=False)


def replace_layer(model):
    model.layers[0] = copy.deepcopy(model.layers[1])
    model.layers[0].self_attn.layer_index = 0


def replace_embedding(model):
    model.embed_tokens.weight = nn.Parameter(model.embed_tokens.weight.flip(0), requires_grad=False)


def move_embedding(model):
    model.embed_tokens.weight.data = model.embed_tokens.weight.data.flip(0)


def move_weight(model):
    model.layers[1].mlp.up_proj.weight.data = model.layers[1].mlp.up_proj.weight.data.flip(0)


def write_weight(model):
    model.layers[1].self_attn.v_proj.weight.data.mul_(-1)


def add_hook(model):
    model.layers[1].mlp.register_forward_hook(lambda module, given, out: -out)


CHANGES = (
    replace_weight,
    replace_layer,
    replace_embedding,
    move_embedding,
    move_weight,
    write_weight,
    add_hook,
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_base_is_noticed_by_the_next_request(change):
    engine, _ = make_engine()
    ((before,),) = engine.generate([PROMPT], [None], GREEDY)  # no full page, which would be taken again
    change(engine.model)
    expected = alone(engine.model, PROMPT, None, GREEDY)[0]
    assert expected != before
    assert engine.generate([PROMPT], [None], GREEDY) == [[expected]]


def test_weights_that_move_while_a_sequence_decodes(calls):
    engine, adapters = make_engine()
    heard = Listener()
    engine.submit(PROMPT, "tall", GREEDY, tell=heard)
    for _ in range(4):
        engine.step()
    engine.model.share_memory()
    run(engine)
    assert heard.tokens[0] == alone(engine.model, PROMPT, adapters["tall"], GREEDY)[0]
    assert calls.count("read") >= 11


def test_a_table_that_grows_while_a_sequence_decodes(calls):
    """Its tensors are made anew: for more rows, for longer ones, and for layers that had none."""
    engine, adapters = make_engine()
    for name in ("tall", "identity"):
        engine.drop_adapter(name)
    heard, late = Listener(), Listener()
    engine.submit(PROMPT, "short", GREEDY, tell=heard)
    others = {}
    for place, (length, layers) in enumerate(((5, 1), (10, 1), (20, None), (10, 2), (10, 2))):
        engine.step()
        others[str(place)] = make_adapter(engine.model.config, 20 + place, length, layers)
        engine.add_adapter(str(place), others[str(place)])
    engine.submit(PROMPT, "4", GREEDY, tell=late)
    run(engine)
    assert heard.tokens[0] == alone(engine.model, PROMPT, adapters["short"], GREEDY)[0]
    assert late.tokens[0] == alone(engine.model, PROMPT, others["4"], GREEDY)[0]
    assert calls.count("read") >= 20


def test_an_unchanged_base_is_kept_once(monkeypatch):
    engine, _ = make_engine()
    kept = []
    keep = passes.keep
    monkeypatch.setattr(passes, "keep", lambda *given: kept.append(keep(*given)) or kept[-1])
    for seed in range(3):
        engine.generate(random_prompts(5, 20, seed), ["tall", None, "short", "tall", None], GREEDY)
    assert len(kept) > 3 and len(set(map(id, kept))) == 1 and kept[0] is not None


def test_nothing_is_kept_behind_a_request_or_an_engine():
    engine, _ = make_engine()
    weight = engine.model.layers[0].mlp.up_proj.weight

    def uses():
        gc.collect()
        return torch._C._storage_Use_Count(weight.untyped_storage()._cdata)

    before = uses()
    request = weakref.ref(engine.submit(PROMPT, "tall", GREEDY, tell=Listener()))
    run(engine)
    gc.collect()
    assert request() is None and uses() > before
    del engine
    assert uses() == before
