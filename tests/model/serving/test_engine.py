"""The engine: every answer is the one that generate() gives alone, whatever happens beside it."""

import random
import threading
from dataclasses import replace

import pytest
import torch
from tiny_runs import make_base
from tiny_serving import Listener, alone, make_adapter, make_engine, random_prompts, run

from model.adapter import LlamaAdapter
from model.config import AdapterConfig
from model.errors import UserError
from model.llama import Llama
from model.serving import engine
from model.serving.engine import Engine
from model.serving.pages import PAGE_SIZE, PagePool
from model.serving.request import QueueFull, Sampling, UnknownAdapter
from model.serving.worker import EngineThread

GREEDY = Sampling(max_new_tokens=12, temperature=0, eos_ids=())
SEEDED = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=7, choices=2, eos_ids=())


def assert_nothing_is_kept(engine):
    """Every page is back, and the table holds the named adapters alone."""
    assert engine.pool.available == engine.pool.num_pages
    assert not engine.scheduler.running and engine.waiting == 0
    assert engine.table.used == len(engine.adapters) and not engine._seen and not engine._held


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("cache_tokens", [4096, 96], ids=["roomy", "out of pages"])
def test_a_mix_is_answered_as_each_alone(sampling, cache_tokens):
    engine, adapters = make_engine(cache_tokens=cache_tokens)
    prompts = random_prompts(16, 120) if cache_tokens == 4096 else random_prompts(8, 40)
    sampling = replace(sampling, max_new_tokens=12 if cache_tokens == 4096 else 24)
    names = [list(adapters)[place % 4] for place in range(len(prompts))]
    answers = engine.generate(prompts, names, sampling)
    assert answers == [
        alone(engine.model, prompt, adapters[name], sampling)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    assert (engine.scheduler.preemptions > 0) == (cache_tokens < 4096)
    assert len({tuple(answer[0]) for answer in answers}) == len(prompts)
    assert_nothing_is_kept(engine)


@pytest.mark.parametrize("mode", ["eos", "stops", "none"])
def test_how_an_answer_ends(mode):
    engine, adapters = make_engine()
    plain = alone(engine.model, [5, 6, 7], None, GREEDY)[0]
    end = plain[4]
    sampling = Sampling(
        max_new_tokens=0 if mode == "none" else 12, temperature=0, eos_ids=(end,) if mode == "eos" else ()
    )
    heard = Listener()
    stops = (lambda choice, tokens: tokens[-1] == end) if mode == "stops" else None
    engine.submit([5, 6, 7], None, sampling, tell=heard, stops=stops)
    run(engine)
    first = plain.index(end)
    expected = {"eos": plain[:first], "stops": plain[: first + 1], "none": []}[mode]
    assert heard.tokens.get(0, []) == expected
    assert heard.ends == {0: ("length" if mode == "none" else "stop", None)}
    assert_nothing_is_kept(engine)


def test_one_attention_call_a_layer_whatever_the_mix(monkeypatch):
    """Prompts and decoding sequences, the base and three unlike adapters."""
    import model.llama as module

    engine, adapters = make_engine(chunk=64)
    calls = []
    attention = module.zero_init_attention_with_kvcache
    monkeypatch.setattr(
        module,
        "zero_init_attention_with_kvcache",
        lambda *args, **options: calls.append(options["prompt_index"]) or attention(*args, **options),
    )
    for name in adapters:
        engine.submit([5, 6, 7], name, GREEDY, tell=Listener())
    engine.step()
    engine.submit(random_prompts(1, 100)[0] + [1] * 60, "tall", GREEDY, tell=Listener())
    calls.clear()
    engine.step()
    assert len(calls) == engine.model.config.num_layers
    assert calls[-1].tolist()[:4] == [-1, 0, 1, 2] and len(calls[-1]) > 4


def test_a_prefix_is_shared_within_an_adapter_alone():
    engine, adapters = make_engine()
    prompt = random_prompts(1, seed=3)[0][:1] + list(range(3, 53))  # 51 tokens: three full pages
    expected = {name: alone(engine.model, prompt, adapters[name], GREEDY) for name in adapters}

    def computed(name):
        before = engine.counts["computed_tokens"]
        assert engine.generate([prompt], [name], GREEDY) == [expected[name]]
        return engine.counts["computed_tokens"] - before

    whole = len(prompt) + GREEDY.max_new_tokens - 1
    assert computed("tall") == whole
    assert computed("tall") == whole - 3 * PAGE_SIZE
    assert computed("short") == whole and computed(None) == whole
    engine.drop_adapter("tall")
    other = make_adapter(engine.model.config, 99)
    engine.add_adapter("tall", other)  # another adapter by the same name
    expected["tall"] = alone(engine.model, prompt, other, GREEDY)
    assert computed("tall") == whole


def test_choices_share_their_prompt():
    engine, _ = make_engine()
    prompt = list(range(3, 100))
    engine.generate([prompt], ["tall"], Sampling(max_new_tokens=1, temperature=1.0, choices=4, eos_ids=()))
    assert engine.counts["computed_tokens"] == 97 + 3 * (97 - 96)


def test_a_long_prompt_does_not_stall_the_others():
    engine, _ = make_engine(chunk=16)
    decoding, long, short = Listener(), Listener(), Listener()
    engine.submit([5], None, Sampling(max_new_tokens=60, temperature=0, eos_ids=()), tell=decoding)
    engine.step()
    engine.submit([7] * 400, None, GREEDY, tell=long)
    engine.step()
    engine.scheduler.chunk = 32
    engine.submit([9] * 20, None, GREEDY, tell=short)
    for step in range(3, 10):
        engine.step()
        assert len(decoding.tokens[0]) == step, "the decoding sequence has a token in every step"
    assert short.tokens and not long.tokens
    run(engine)
    assert len(long.tokens[0]) == 12


def test_queues_take_turns():
    engine, _ = make_engine(max_running=1)
    order = []

    def teller(name):
        return lambda event: order.append(name) if hasattr(event, "reason") else None

    one = Sampling(max_new_tokens=1, temperature=0)
    for place in range(30):
        engine.submit([5, place + 3], "tall", one, tell=teller("greedy customer"))
    engine.submit([6], "short", one, tell=teller("modest"))
    engine.submit([6], "tall", one, tell=teller("third"), queue="another client")
    run(engine)
    assert order[:3] == ["greedy customer", "modest", "third"] and len(order) == 32


def fail_on(monkeypatch, token):
    """The base raises where a batch holds this token."""
    forward = Llama.hidden_states

    def hidden_states(self, tokens, *args, **options):
        if (tokens == token).any():
            raise RuntimeError("an exception inside a step")
        return forward(self, tokens, *args, **options)

    monkeypatch.setattr(Llama, "hidden_states", hidden_states)


@pytest.mark.parametrize("how", ["raises", "not numbers", "listener", "stops"])
def test_what_one_request_causes_ends_that_request_alone(monkeypatch, how):
    engine, adapters = make_engine()
    prompts, names = random_prompts(6, seed=5), ["tall", "short", None, "tall", "identity", None]
    expected = [
        alone(engine.model, prompt, adapters[name], GREEDY)[0]
        for prompt, name in zip(prompts, names, strict=True)
    ]
    bad, name, options = [130, 5, 6], "tall", {}
    heard = [Listener() for _ in prompts]
    end = Listener()

    def tell(event):
        end(event)
        if how == "listener" and hasattr(event, "token"):
            raise ValueError("an exception inside a step")

    def stops(choice, tokens):
        raise ValueError("an exception inside a step")

    if how == "raises":
        fail_on(monkeypatch, 130)
        prompts = [[token % 130 for token in prompt] for prompt in prompts]
        expected = [
            alone(engine.model, p, adapters[n], GREEDY)[0] for p, n in zip(prompts, names, strict=True)
        ]
    elif how == "not numbers":
        name = "broken"
        broken = make_adapter(engine.model.config, 9)
        broken.prompts.fill_(float("nan"))
        engine.add_adapter(name, broken)
    elif how == "stops":
        options["stops"] = stops
    for place, (prompt, other) in enumerate(zip(prompts, names, strict=True)):
        if place == 3:
            engine.submit(bad, name, GREEDY, tell=tell, **options)
        engine.submit(prompt, other, GREEDY, tell=heard[place])
    run(engine)
    reason, error = end.ends[0]
    assert reason == "error" and ("not numbers" in str(error) or "an exception inside a step" in str(error))
    assert [one.tokens[0] for one in heard] == expected
    assert all(one.ends == {0: ("length", None)} for one in heard)
    assert_nothing_is_kept(engine)


def test_a_fault_of_the_engine_itself_ends_all_and_it_goes_on():
    engine, adapters = make_engine()
    plan, broken = engine.scheduler.plan, threading.Event()

    def failing():
        if (
            not broken.is_set() and engine.scheduler.num_waiting
        ):  # the thread may plan before the request is there
            broken.set()
            raise AssertionError("a fault of the scheduler")
        return plan()

    engine.scheduler.plan = failing
    done = threading.Event()
    first, second = Listener(), Listener()
    thread = EngineThread(engine).start()
    engine.submit(
        [5], "tall", SEEDED, tell=lambda event: first(event) or (len(first.ends) == 2 and done.set())
    )
    assert done.wait(60) and {end[0] for end in first.ends.values()} == {"error"}
    done.clear()
    engine.submit([5], "tall", GREEDY, tell=lambda event: second(event) or (second.ends and done.set()))
    assert done.wait(60)
    thread.stop()
    assert second.tokens[0] == alone(engine.model, [5], adapters["tall"], GREEDY)[0]
    assert_nothing_is_kept(engine)


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding", "held"])
def test_a_cancelled_request_gives_everything_back(when):
    engine, adapters = make_engine(chunk=16, max_running=2)
    heard, other = Listener(), Listener()
    engine.submit([9, 8], None, GREEDY, tell=other)
    request = engine.submit([7] * 40, "tall", SEEDED, tell=heard)
    for _ in range({"waiting": 0, "prefilling": 1, "held": 2, "decoding": 5}[when]):
        engine.step()
    request.cancel()
    engine.step()
    assert {reason for reason, _ in heard.ends.values()} == {"cancelled"} and len(heard.ends) == 2
    run(engine)
    assert other.tokens[0] == alone(engine.model, [9, 8], None, GREEDY)[0]
    assert_nothing_is_kept(engine)


def test_an_adapter_is_dropped_while_it_is_in_use():
    engine, adapters = make_engine()
    heard = Listener()
    engine.submit([5, 6], "tall", GREEDY, tell=heard)
    engine.step()
    engine.drop_adapter("tall")
    assert engine.adapters == ["short", "identity"] and engine.table.used == 3
    with pytest.raises(UnknownAdapter, match="no adapter 'tall'"):
        engine.submit([5, 6], "tall", GREEDY, tell=heard)
    with pytest.raises(UnknownAdapter):
        engine.drop_adapter("tall")
    run(engine)
    assert heard.tokens[0] == alone(engine.model, [5, 6], adapters["tall"], GREEDY)[0]
    assert_nothing_is_kept(engine)


def test_ten_thousand_requests_are_not_too_many_to_refuse():
    engine, _ = make_engine(max_waiting=100)
    heard = []
    one = Sampling(max_new_tokens=1, temperature=0)
    refused = 0
    for place in range(10_000):
        try:
            engine.submit([3 + place % 120], None, one, tell=heard.append)
        except QueueFull as error:
            assert "100 requests wait already: try again later" in str(error)
            refused += 1
    assert refused == 9_900 and engine.waiting == 100
    run(engine)
    assert sum(hasattr(event, "reason") for event in heard) == 100
    assert_nothing_is_kept(engine)


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"prompt": []}, "the prompt has no tokens"),
        ({"prompt": [131]}, "outside the model's vocabulary of 131"),
        (
            {"prompt": [5] * 501},
            "with 12 new ones it exceeds the model's context of 512 tokens: ask for at most 11",
        ),
        ({"sampling": Sampling(seed=-1)}, "seed must lie in"),
        ({"sampling": Sampling(choices=129)}, "1 to 128 choices"),
        ({"sampling": Sampling(top_p=0)}, "top_p must lie in"),
        ({"sampling": Sampling(temperature=float("nan"))}, "must be finite"),
        ({"sampling": Sampling(logprobs=21)}, "logprobs must lie in 0 .. 20"),
        ({"adapter": "none"}, "there is no adapter 'none'"),
    ],
)
def test_refused_before_it_waits(asked, message):
    engine, _ = make_engine()
    with pytest.raises(UserError, match=message):
        engine.submit(**{"prompt": [5], "sampling": GREEDY, "tell": print} | asked)
    assert not engine.step()


def test_a_request_that_the_pages_could_never_hold_is_refused():
    engine, _ = make_engine(cache_tokens=64)
    with pytest.raises(UserError, match="exceeds the cache of 64 tokens: ask for at most 4 new"):
        engine.submit([5] * 60, None, GREEDY, tell=print)


def test_logprobs_are_those_of_a_pass_without_a_cache():
    engine, adapters = make_engine()
    heard = Listener()
    prompt = [5, 6, 7]
    sampling = Sampling(max_new_tokens=5, temperature=1.0, seed=3, logprobs=4, eos_ids=())
    engine.submit(prompt, "tall", sampling, tell=heard)
    run(engine)
    tokens = heard.tokens[0]
    with torch.no_grad():
        logits = engine.model(torch.tensor([prompt + tokens]), adapters["tall"])[0, 2:-1]
    expected = logits.log_softmax(-1)
    for row, token, found in zip(expected, tokens, heard.logprobs, strict=True):
        assert found.chosen == pytest.approx(float(row[token]), abs=1e-4)
        assert [value for _, value in found.likeliest] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


def test_what_the_table_cannot_hold_is_refused():
    engine, _ = make_engine()
    config = engine.model.config
    with pytest.raises(UserError, match="an adapter 'tall' already"):
        engine.add_adapter("tall", make_adapter(config, 5))
    with pytest.raises(UserError, match="20 in a row, have no common multiple up to 128"):
        engine.add_adapter("odd", make_adapter(config, 5, length=7))
    with pytest.raises(UserError, match="without gates"):
        engine.add_adapter("none", LlamaAdapter(config, AdapterConfig(gate_init="none")))
    assert engine.adapters == ["tall", "short", "identity"] and engine.table.used == 3
    with pytest.raises(UserError, match="chunk must be at least 1"):
        Engine(engine.model, chunk=0)


def test_threads_submit_while_the_engine_runs():
    engine, adapters = make_engine()
    thread = EngineThread(engine).start()
    found, prompts = {}, random_prompts(12, 60, seed=8)

    def client(place):
        done, heard = threading.Event(), Listener()
        name = list(adapters)[place % 4]
        engine.submit(
            prompts[place], name, GREEDY, tell=lambda event: heard(event) or (heard.ends and done.set())
        )
        assert done.wait(120)
        found[place] = (name, heard.tokens[0])

    threads = [threading.Thread(target=client, args=(place,)) for place in range(len(prompts))]
    for one in threads:
        one.start()
    engine.add_adapter("late", make_adapter(engine.model.config, 77))
    engine.drop_adapter("late")
    for one in threads:
        one.join()
    thread.stop()
    for place, (name, tokens) in found.items():
        assert tokens == alone(engine.model, prompts[place], adapters[name], GREEDY)[0]
    assert len(found) == len(prompts)
    assert_nothing_is_kept(engine)


def test_pages_are_counted_right_whatever_is_asked():
    """At random: no page has two owners unless they share its content, and all come back."""
    chance = random.Random(0)
    pool = PagePool(12)
    held = []  # (pages, tokens)
    for _ in range(3000):
        if held and (chance.random() < 0.5 or pool.available < 4):
            pages, _ = held.pop(chance.randrange(len(held)))
            pool.give_back(pages)
            continue
        tokens = [chance.randrange(2) for _ in range(PAGE_SIZE)] * 3
        pages, before = pool.share(-1, tokens[: 3 * PAGE_SIZE])
        assert len(pages) <= 2
        for other, known in held:
            for place, page in enumerate(other):
                if page in pages:
                    end = (place + 1) * PAGE_SIZE
                    assert pages.index(page) == place and known[:end] == tokens[:end]
        while len(pages) < 3 and pool.available:
            page = pool.take()
            assert all(page not in other for other, _ in held)
            pages.append(page)
            first = (len(pages) - 1) * PAGE_SIZE
            before = pool.fill(page, before, tokens[first : first + PAGE_SIZE])
        held.append((pages, tokens))
    for pages, _ in held:
        pool.give_back(pages)
    assert pool.available == 12


def test_a_cache_that_no_memory_holds_is_refused_before_anything_grows_with_it(monkeypatch):
    """The lists of its pages took all memory before the cache itself was asked for."""
    monkeypatch.setattr(engine, "PagePool", lambda num_pages: pytest.fail(f"{num_pages} pages"))
    with pytest.raises(UserError, match=r"no memory for a cache of 10{14} tokens: .*\(--cache-tokens\)"):
        make_engine(cache_tokens=10**14)


def test_positions_are_turned_as_far_as_a_sequence_can_reach():
    """A context of 2**30 tokens took 3 GB and 10 s."""
    base = make_base()
    base.config = replace(base.config, max_seq_len=1 << 30)
    found = Engine(base, cache_tokens=160)
    assert found.room == len(found._passes.cache.cos) == 160
