"""The multi-modal adapter: equations 9 and 10, V2's queries, and which sequence sees which image."""

import math

import pytest
import torch
from tiny_models import pack, prompts
from tiny_runs import make_base

from model.adapter import LlamaAdapter
from model.config import AdapterConfig
from model.errors import UserError
from model.sampling import generate
from model.vision.adapter import VisualAdapter
from model.vision.config import FeatureConfig, VisualConfig
from model.vision.projection import Bottleneck

SIZE = 12
KINDS = {
    "bottleneck": VisualConfig("bottleneck", SIZE, 6),
    "queries": VisualConfig("queries", SIZE, 16, blocks=2, heads=4),
    "standardised": VisualConfig("queries", SIZE, 16, blocks=1, heads=2, standardise=True),
}
TOKENS = prompts([7, 3, 11, 5, 4], 131)
IMAGES = [(0,), (0,), (), (2, 1), (1,)]  # which images each sequence is about


@pytest.fixture(scope="module")
def base():
    return make_base()


def make_adapter(base, kind="queries", gates=0.8, prompt_length=3):
    generator = torch.Generator().manual_seed(1)
    config = AdapterConfig(prompt_length, 3)
    adapter = VisualAdapter(base.config, config, KINDS[kind], FeatureConfig(), generator)
    with torch.no_grad():
        adapter.gates.fill_(gates)
    return adapter


def features(kind="queries", count=3):
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(1 if kind == "bottleneck" else 3 + i, SIZE, generator=generator) for i in range(count)
    ]


def logits(base, adapter, sequences):
    tokens, cu_seqlens = pack(sequences)
    return base(tokens, adapter, cu_seqlens=cu_seqlens).split([len(s) for s in sequences])


def test_the_bottleneck_is_equations_9_and_10(base):
    """P + Repeat(Projection(Concat(I_1 .. I_M))), written out, as the prompts of a text adapter."""
    adapter, (image,) = make_adapter(base, "bottleneck"), features("bottleneck", 1)
    down, up = adapter.projection.down, adapter.projection.up
    hidden = image[0] @ down.weight.T + down.bias
    projected = (hidden * torch.sigmoid(hidden)) @ up.weight.T + up.bias
    text = LlamaAdapter(base.config, adapter.config)
    with torch.no_grad():
        text.gates.copy_(adapter.gates)
        text.prompts.copy_(adapter.prompts + projected.expand(3, -1))
        expected = logits(base, text, TOKENS[:1])[0]
        found = logits(base, adapter.with_images([image], [(0,)]), TOKENS[:1])[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_bottleneck_has_the_papers_number_of_parameters():
    projection = Bottleneck(VisualConfig("bottleneck", 6 * 768, 64), 4096)
    assert sum(p.numel() for p in projection.parameters()) == 561_216


def layer_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias


def linear(x, module):
    return x @ module.weight.T + module.bias


def queries_by_hand(projection, tokens):
    x = torch.cat([projection.query, layer_norm(linear(tokens, projection.tokens), projection.tokens_norm)])
    for block in projection.blocks:
        query, key, value = linear(layer_norm(x, block.norm1), block.qkv).chunk(3, -1)
        heads = []
        for q, k, v in zip(*(part.chunk(block.heads, -1) for part in (query, key, value)), strict=True):
            heads.append(torch.softmax(q @ k.T / math.sqrt(q.shape[1]), -1) @ v)
        x = x + linear(torch.cat(heads, -1), block.proj)
        hidden = linear(layer_norm(x, block.norm2), block.fc1)
        x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), block.fc2)
    return layer_norm(linear(x[: len(projection.query)], projection.out), projection.out_norm)


def test_queries_are_those_of_v2(base):
    adapter = make_adapter(base)
    with torch.no_grad():
        for parameter in adapter.projection.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        for image in features():
            seen = adapter.with_images([image], [(0,)])
            expected = queries_by_hand(adapter.projection, image)
            torch.testing.assert_close(seen.visual[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_ragged_batch_is_its_sequences_one_by_one(base, kind):
    """Shared images, several images, none; the packed and the padded layout."""
    adapter, given = make_adapter(base, kind), features(kind)
    together = logits(base, adapter.with_images(given, IMAGES), TOKENS)
    padded = torch.nn.utils.rnn.pad_sequence(TOKENS, batch_first=True)
    rows = base(padded, adapter.with_images(given, IMAGES))
    for row, (tokens, images) in enumerate(zip(TOKENS, IMAGES, strict=True)):
        alone = adapter.with_images([given[i] for i in images], [tuple(range(len(images)))])
        expected = logits(base, alone, [tokens])[0]
        torch.testing.assert_close(together[row], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(rows[row, : len(tokens)], expected, rtol=1e-3, atol=1e-3)
    text = logits(base, adapter, [TOKENS[2]])[0]
    torch.testing.assert_close(together[2], text, rtol=1e-3, atol=1e-3)
    other = logits(base, adapter.with_images(given, [(1,)] * 5), TOKENS)
    changed = [not torch.allclose(a, b, atol=1e-2) for a, b in zip(together, other, strict=True)]
    assert changed == [True, True, True, True, False]


@torch.no_grad()
def test_several_images_are_joined_on_the_token_axis(base):
    adapter, given = make_adapter(base), features()
    joined = adapter.with_images([torch.cat([given[2], given[0]])], [(0,)])
    assert torch.equal(adapter.with_images(given, [(2, 0)]).visual, joined.visual)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_step_0_is_the_base_bit_for_bit(base, kind):
    adapter = make_adapter(base, kind, gates=0)
    seen = adapter.with_images(features(kind), IMAGES)
    for with_images, plain in zip(logits(base, seen, TOKENS), logits(base, None, TOKENS), strict=True):
        assert torch.equal(with_images, plain)


def counted(module, calls):
    module.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape[:-1].numel()))


def test_images_are_projected_once_for_all_questions_and_tokens(base, monkeypatch):
    """8 questions on 2 images, 12 decoded tokens: 2 sets through the projection, 2 x P rows through each k_proj."""
    adapter, given = make_adapter(base), features(count=2)
    sets, rows = [], {layer: [] for layer in range(base.config.num_layers)}
    counted(adapter.projection, sets)
    for layer in rows:
        counted(base.layers[layer].self_attn.k_proj, rows[layer])
    questions = [p.tolist() for p in prompts([5, 3, 9, 4, 6, 5, 3, 7], 131, seed=4)]
    images = [(0,), (0,), (0,), (1,), (1,), (0,), (1,), (0,)]
    with torch.no_grad():
        seen = adapter.with_images(given, images)
    answers = generate(base, questions, seen, max_new_tokens=12, temperature=0, eos_ids=())
    assert sets == [2 * max(map(len, given))]  # both sets of images in one pass, once
    steps = [sum(map(len, questions)), *[8] * 11]  # tokens of the prefill, and of each decoded step
    assert rows[0] == steps
    for layer in adapter.layers:
        assert sorted(rows[layer]) == sorted([*steps, 2 * 3])
    one_by_one = [
        generate(
            base, [q], adapter.with_images([given[i]], [(0,)]), max_new_tokens=12, temperature=0, eos_ids=()
        )[0]
        for q, (i,) in zip(questions, images, strict=True)
    ]
    assert answers == one_by_one
    blind = generate(base, questions, adapter, max_new_tokens=12, temperature=0, eos_ids=())
    assert answers != blind


def test_sequences_that_end_early_leave_with_their_images(base):
    adapter, given = make_adapter(base), features()
    questions = [p.tolist() for p in TOKENS]
    seen = adapter.with_images(given, IMAGES)
    free = generate(base, questions, seen, max_new_tokens=16, temperature=0, eos_ids=())
    ends = {index: 1 + 2 * index for index in range(4)}  # the fourth and the last alone go on
    watched = generate(
        base, questions, seen, max_new_tokens=16, temperature=0, eos_ids=(),
        watch=lambda index, tokens: len(tokens) == ends.get(index),
    )  # fmt: skip
    assert watched == [tokens[: ends.get(index, 16)] for index, tokens in enumerate(free)]


def test_gradients_are_those_of_the_images_a_sequence_sees(base):
    adapter, given = make_adapter(base), features()
    for image in given:
        image.requires_grad_(True)
    together = logits(base, adapter.with_images(given, IMAGES), TOKENS)
    together[3].square().sum().backward()
    assert given[0].grad is None or not given[0].grad.any()
    assert given[1].grad.any() and given[2].grad.any()
    assert all(p.grad is not None for p in adapter.projection.parameters())


def test_training_does_not_keep_projected_prompts(base):
    adapter, given = make_adapter(base), features()
    seen = adapter.with_images(given, IMAGES)
    for _ in range(2):
        sum(part.sum() for part in logits(base, seen, TOKENS)).backward(retain_graph=True)
    with torch.no_grad():
        first = logits(base, seen, TOKENS)[0]
        adapter.prompts.add_(1.0)
        assert not torch.equal(first, logits(base, seen, TOKENS)[0])


@torch.no_grad()
def test_standardised_features(base):
    adapter, given = make_adapter(base, "standardised"), [7 + 3 * f for f in features()]
    adapter.standardise.fit(given)
    tokens = adapter.standardise(torch.cat(given))
    torch.testing.assert_close(tokens.mean(0), torch.zeros(SIZE), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.std(0, correction=0), torch.ones(SIZE))
    assert "standardise.mean" in adapter.state_dict()


@pytest.mark.parametrize(
    ("shape", "images", "said"),
    [
        ((4, SIZE + 1), [(0,)], "another encoder"),
        ((SIZE,), [(0,)], "another encoder"),
        ((0, SIZE), [(0,)], "another encoder"),
        ((4, SIZE), [(1,)], "1 are given"),
        ((4, SIZE), [(-1,)], "1 are given"),
    ],
)
def test_features_and_images_that_do_not_fit(base, shape, images, said):
    with pytest.raises(UserError, match=said):
        make_adapter(base).with_images([torch.zeros(shape)], images)
