"""Decoding on a device by repeated steps: the plain loop's tokens, one look at them in several steps, and eager steps
where a capture fails or lies. The loop is what runs here; no GPU has run a capture."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from model import sampling
from model.adapter import LlamaAdapter
from model.choice import choose_on_device
from model.config import LlamaConfig
from model.device_steps import STEPS, DeviceSteps
from model.errors import UserError
from model.llama import KVCache, Llama
from model.sampling import generate

CONFIG = LlamaConfig(
    vocab_size=67, hidden_size=64, intermediate_size=96, num_layers=3, num_heads_q=4, num_heads_kv=2, head_dim=16,
    max_seq_len=96, eos_ids=(5,),
)  # fmt: skip
PROMPTS = [[3, 9, 4], [7], [11, 12, 13, 14, 15], [20, 21], [30, 3, 3]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Llama(CONFIG).initialise(0.2).freeze()


@pytest.fixture(scope="module")
def adapter():
    made = LlamaAdapter(CONFIG, generator=torch.Generator().manual_seed(1))
    nn.init.constant_(made.gates, 0.7)
    return made


class Captures:
    """Takes the place of a CUDA graph: the call itself, counted."""

    def __init__(self):
        self.made, self.replays = 0, 0

    def __call__(self, call, generators):
        call()
        call()
        self.made += 1

        def replay():
            self.replays += 1
            call()

        return replay


def on_device(monkeypatch, model, capture):
    """Makes `generate` take the steps that it takes on a GPU."""
    monkeypatch.setattr(
        sampling,
        "_Steps",
        lambda model, adapter, cache, hidden: DeviceSteps(model, adapter, cache, hidden, capture),
    )


def test_short_answers_wait_for_no_capture(monkeypatch, model):
    captures = Captures()
    on_device(monkeypatch, model, captures)
    generate(model, PROMPTS, max_new_tokens=2 * STEPS, temperature=0, eos_ids=())
    assert captures.made == 0
    generate(model, PROMPTS, max_new_tokens=2 * STEPS + 2, temperature=0, eos_ids=())
    assert (captures.made, captures.replays) == (1, STEPS + 1 + 1)  # the last: the one that is compared


@pytest.mark.parametrize("new", [1, 2, STEPS, STEPS + 1, 40])
def test_the_tokens_are_those_of_the_plain_loop(monkeypatch, model, adapter, new):
    expected = generate(model, PROMPTS, adapter, max_new_tokens=new, temperature=0)
    assert len({len(tokens) for tokens in expected}) > 1 or new < 10  # some end early
    captures = Captures()
    on_device(monkeypatch, model, captures)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(model, PROMPTS, adapter, max_new_tokens=new, temperature=0) == expected
    assert captures.made <= 3  # for 5, 2 and 1 sequences
    assert captures.replays <= new + STEPS * captures.made


def test_a_watcher_sees_every_token_once_and_ends_a_sequence(monkeypatch, model):
    def watched(seen):
        def watch(index, tokens):
            seen.append((index, list(tokens)))
            return index == 1 and len(tokens) == 4

        return watch

    plain, ours = [], []
    options = {"max_new_tokens": 21, "temperature": 0, "eos_ids": ()}
    expected = generate(model, PROMPTS, watch=watched(plain), **options)
    on_device(monkeypatch, model, Captures())
    assert generate(model, PROMPTS, watch=watched(ours), **options) == expected
    assert ours == plain


def test_a_batch_that_shrinks_within_a_look_keeps_its_tokens_and_gets_a_new_graph(
    monkeypatch, model, adapter
):
    def watch(index, tokens):
        return len(tokens) == (3, 30, 5, 4, 12)[index]

    options = {"max_new_tokens": 30, "temperature": 0, "eos_ids": (), "watch": watch}
    expected = generate(model, PROMPTS, adapter, **options)
    assert [len(tokens) for tokens in expected] == [3, 30, 5, 4, 12]
    captures = Captures()
    on_device(monkeypatch, model, captures)
    assert generate(model, PROMPTS, adapter, **options) == expected
    assert captures.made == 2  # of 2 sequences and of 1; all five are fewer after eight tokens


def test_the_host_looks_once_in_several_steps(monkeypatch, model):
    looks = []
    look = DeviceSteps._on_host
    monkeypatch.setattr(
        DeviceSteps, "_on_host", lambda self, steps: looks.append(len(steps)) or look(self, steps)
    )
    on_device(monkeypatch, model, Captures())
    generate(model, PROMPTS[:1], max_new_tokens=1 + 2 * STEPS, temperature=0, eos_ids=())
    assert looks == [1, STEPS, STEPS]


def test_a_step_asks_the_device_nothing(monkeypatch, model, adapter):
    # fake tensors cannot draw from a generator
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator: self.fill_(1.0))
    cache = KVCache(CONFIG, 2, 16, torch.float32)
    steps = DeviceSteps(model, adapter, cache, torch.zeros(2, 64), Captures())
    steps.generators, steps.temperature, steps.top_p = [], 0.0, 1.0
    steps.tokens, steps.finite = torch.tensor([3, 4]), torch.tensor(True)
    with torch.no_grad(), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:
        steps.tokens, steps.finite = fake.from_tensor(steps.tokens), fake.from_tensor(steps.finite)
        for name in ("keys", "values", "lengths", "cos", "sin"):
            setattr(cache, name, fake.from_tensor(getattr(cache, name)))
        steps._step()  # a fake tensor has no values: reading one raises
        choose_on_device(steps.logits, 0.7, 0.9, [torch.Generator(), torch.Generator()])


def test_drawn_tokens_follow_the_probabilities_of_the_nucleus():
    logits = torch.tensor([2.0, 1.0, 0.0, -8.0]).expand(4000, 4)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    tokens, finite = choose_on_device(logits, 1.0, 0.95, generators)
    assert finite
    shares = torch.bincount(tokens, minlength=4) / 4000
    expected = logits[0].softmax(0)
    expected[3] = 0
    torch.testing.assert_close(shares, expected / expected.sum(), rtol=0, atol=0.03)
    again, _ = choose_on_device(
        logits[:3], 1.0, 0.95, [torch.Generator().manual_seed(seed) for seed in range(3)]
    )
    assert torch.equal(again, tokens[:3])


def fails(call, generators):
    call()
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")


def lies(call, generators):
    steps = call.__self__

    def replay():
        call()
        steps.logits = steps.logits + 9
        steps.tokens.zero_()

    return replay


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        (fails, "without a CUDA graph: CUDA error: operation not permitted when stream is capturing$"),
        (lies, "differ from"),
    ],
)
def test_where_a_capture_fails_or_lies_the_steps_are_eager(monkeypatch, model, adapter, capture, message):
    expected = generate(model, PROMPTS, adapter, max_new_tokens=32, temperature=0, eos_ids=())
    on_device(monkeypatch, model, capture)
    with pytest.warns(UserWarning, match=message):
        assert generate(model, PROMPTS, adapter, max_new_tokens=32, temperature=0, eos_ids=()) == expected


def test_logits_that_are_no_numbers_are_refused(monkeypatch, model):
    on_device(monkeypatch, model, Captures())
    broken = Llama(CONFIG).initialise(0.2).freeze()
    with torch.no_grad():
        broken.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not numbers"):
        generate(broken, PROMPTS[:2], max_new_tokens=3, temperature=0)
