"""Prompts that differ from sequence to sequence: as if each sequence had an adapter of its own."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

transformers = pytest.importorskip("transformers")
from tiny_transformers import ADAPTED, EAGER, FIVE, PROMPTS, adapted, base_model, inputs_of  # noqa: E402

from zinit_kernels.integrations import transformers as zinit  # noqa: E402

ARCHITECTURES = ("Llama", "Qwen3", "Phi-3", "GPT-2", *EAGER)
WIDTH = 32
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def visual(entries=2, length=PROMPTS, seed=5):
    return torch.randn(entries, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def shifted(name, added, place=None):
    """The model with `added` [P or 1, C] in its parameters: of one layer (place), or of all."""
    model = adapted(name, gates=2.0)
    prompts = [p for key, p in model.named_parameters() if key.endswith("zinit.prompt")]
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            prompt += added if added.dim() == 2 else added[row]
    return model


def expected_logits(name, tables, rows, inputs):
    """Row by row, each by a model of its own."""
    out = []
    for row, entry in enumerate(rows):
        added = torch.zeros(1, WIDTH) if entry < 0 else tables[..., entry, :, :]
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        out.append(shifted(name, added)(**one).logits[0])
    return out


@pytest.mark.parametrize("rows", [[1, 0, 1], [0, -1, 1], [1, 1, 1], [-1, -1, -1]])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_each_sequence_has_its_own_prompts(name, rows):
    model, inputs = adapted(name, gates=2.0), inputs_of(name, "left-padded")
    plain = model(**inputs).logits
    with zinit.per_sample_prompts(model, visual(), rows):
        found = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    for row, expected in enumerate(expected_logits(name, visual(), rows, inputs)):
        torch.testing.assert_close(found[row][real[row]], expected[real[row]], rtol=1e-3, atol=1e-3)
        if rows[row] >= 0:
            assert not torch.allclose(found[row][real[row]], plain[row][real[row]], atol=1e-2)
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("shape", ["one vector", "by layer", "no rows", "one for all"])
@torch.no_grad()
def test_shapes(shape):
    model, inputs = adapted("Llama", gates=2.0), inputs_of("Llama")
    tables, rows = {
        "one vector": (visual(3, 1), [2, 0, 1]),
        "by layer": (torch.stack([visual(seed=seed) for seed in range(ADAPTED)]), [1, 0, 0]),
        "no rows": (visual(3), None),
        "one for all": (visual(1), None),
    }[shape]
    with zinit.per_sample_prompts(model, tables, rows):
        found = model(**inputs).logits
    chosen = rows or ([0, 1, 2] if shape == "no rows" else [0, 0, 0])
    for row, expected in enumerate(expected_logits("Llama", tables, chosen, inputs)):
        torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_generate(name, options):
    model, inputs, rows = adapted(name, gates=2.0), inputs_of(name, "left-padded"), [1, -1, 0]
    with zinit.per_sample_prompts(model, visual(), rows):
        together = model.generate(**inputs, **GREEDY, **options)
    returned = options.get("num_return_sequences", 1)
    for row, entry in enumerate(rows):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        added = torch.zeros(1, WIDTH) if entry < 0 else visual()[entry]
        alone = shifted(name, added).generate(**one, **GREEDY, **options)
        assert torch.equal(together[row * returned : (row + 1) * returned], alone)


@pytest.mark.skipif(not FIVE, reason="generate_batch of transformers 4 needs a GPU")
def test_continuous_batching_serves_one_entry():
    model = adapted("Llama", gates=2.0)
    prompts = [row[: 4 + 3 * i].tolist() for i, row in enumerate(inputs_of("Llama")["input_ids"])]
    config = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    with zinit.per_sample_prompts(model, visual(), [1, 1, 1]), zinit.continuous_batching(model):
        found = model.generate_batch(prompts, config, room)
    found = sorted((tuple(out.prompt_ids), out.generated_tokens) for out in found.values())
    alone, expected = shifted("Llama", visual()[1]), []
    for prompt in prompts:
        tokens = alone.generate(torch.tensor([prompt]), **GREEDY)
        expected.append((tuple(prompt), tokens[0, len(prompt) :].tolist()))
    assert found == sorted(expected)
    with (
        zinit.per_sample_prompts(model, visual(), [0, 1, 1]),
        pytest.raises(ValueError, match="requests share their batches"),
        zinit.continuous_batching(model),
    ):
        pass
    with (
        zinit.continuous_batching(model),
        pytest.raises(ValueError, match="has begun without"),
        zinit.per_sample_prompts(model, visual()),
    ):
        pass


@torch.no_grad()
def test_the_prompts_of_an_image_are_projected_once():
    model, inputs = adapted("Llama", gates=2.0), inputs_of("Llama")
    seen = []
    layer = model.model.layers[-1].self_attn
    real = layer.k_proj.forward

    class Counted(torch.nn.Linear):  # the projections of transformers and torch are kept, hooked ones are not
        def forward(self, x):
            seen.append(x.shape[:-1].numel())
            return real(x)

    Counted.__module__ = "torch.nn.modules.linear"
    layer.k_proj.__class__ = Counted
    with zinit.per_sample_prompts(model, visual(), [1, 0, 1]):
        model.generate(**inputs, **GREEDY)
    # the tokens of the prefill and of each step, and once, for the first decoded token too, the table: its own prompts
    # and two entries
    assert sorted(seen) == sorted([inputs["input_ids"].numel(), *[3] * 5, 3 * PROMPTS])


def test_gradients():
    model, inputs, rows = adapted("Llama", gates=2.0), inputs_of("Llama"), [1, -1, 1]
    tables = visual(3).requires_grad_()
    with zinit.per_sample_prompts(model, tables, rows):
        model(**inputs).logits[0].square().sum().backward()
    assert tables.grad[1].any() and not tables.grad[0].any() and not tables.grad[2].any()
    own = shifted("Llama", visual(3)[1])
    own(**{key: value[:1] for key, value in inputs.items()}).logits.square().sum().backward()
    grads = [p.grad for key, p in own.named_parameters() if key.endswith("zinit.prompt")]
    torch.testing.assert_close(tables.grad[1], sum(grads), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    """Backward in the block and after it; layers of the user's own checkpoints have to be computed again in it."""
    grads, rows = [], [1, 0, 1]
    for checkpointing in (False, True):
        model, inputs = adapted("Llama", gates=2.0).train(), inputs_of("Llama")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        for ends_first in (False, True):
            model.zero_grad()
            tables = visual().requires_grad_()
            with zinit.per_sample_prompts(model, tables, rows):
                loss = model(**inputs).logits.square().sum()
                if not ends_first:
                    loss.backward()
            if ends_first:
                # of this call each layer was last computed without the block
                loss = loss + model(**inputs).logits.square().sum()
                loss.backward()
            grads.append([p.grad for p in (*model.parameters(), tables) if p.grad is not None])
    for plain, recomputed in ((grads[0], grads[2]), (grads[1], grads[3])):
        assert len(plain) == 5
        for one, other in zip(plain, recomputed, strict=True):
            torch.testing.assert_close(one, other)
    model.gradient_checkpointing_disable()
    with zinit.per_sample_prompts(model, visual(), rows):
        hidden = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
        loss = (
            checkpoint(lambda x: model(inputs_embeds=x).logits, hidden, use_reentrant=reentrant)
            .square()
            .sum()
        )
    with pytest.raises(RuntimeError, match="call backward in the block"):
        loss.backward()
    model(**inputs).logits.square().sum().backward()  # without the block: as ever


@torch.no_grad()
def test_step_0_is_the_base_bit_for_bit():
    model, inputs = adapted("Llama", gates=0.0), inputs_of("Llama")
    with zinit.per_sample_prompts(model, visual(), [1, 0, -1]):
        assert torch.equal(model(**inputs).logits, base_model("Llama")(**inputs).logits)


@pytest.mark.parametrize(
    ("prompts", "rows", "said"),
    [
        (visual(2, 4), None, r"\[N, 5 or 1, 32\]"),
        (visual()[..., :7], None, r"\[N, 5 or 1, 32\]"),
        (visual()[:0], None, r"\[N, 5 or 1, 32\]"),
        (visual()[0], None, "floating-point of shape"),
        (visual().long(), None, "floating-point of shape"),
        ([1.0], None, "floating-point of shape"),
        (visual()[None], None, "1 layers, and 2 layers are adapted"),
        (visual(), [0, 2, 1], "-1 to 1"),
        (visual(), [0, -2, 1], "-1 to 1"),
        (visual(), [0.0, 1.0], "whole numbers"),
        (visual(), [], "whole numbers"),
    ],
)
def test_what_does_not_fit(prompts, rows, said):
    with pytest.raises(ValueError, match=said), zinit.per_sample_prompts(adapted("Llama"), prompts, rows):
        pass


def test_batches_of_another_size():
    model = adapted("Llama", gates=2.0)
    with zinit.per_sample_prompts(model, visual(), None), pytest.raises(ValueError, match="do not go evenly"):
        model(**inputs_of("Llama"))
    with (
        pytest.raises(ValueError, match="no zero-init prompts"),
        zinit.per_sample_prompts(base_model("Llama"), visual()),
    ):
        pass
