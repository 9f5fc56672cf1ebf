"""The recipe and the training loop: what a step computes, what moves and what does not."""

from __future__ import annotations

import math
import re

import pytest
import torch
from tiny_runs import make_base

from model.adapter import LlamaAdapter
from model.config import AdapterConfig
from model.data import Sample, pack
from model.errors import UserError
from model.llama import Llama
from model.recipe import Recipe, recipe_warnings
from model.train_loop import batch_loss, evaluate, make_optimizer, train
from model.train_options import never_due, read_options, recipe_of


def samples(count: int = 9) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(torch.randint(3, 131, (5 + 2 * index,), generator=generator).tolist(), 3)
        for index in range(count)
    ]


def make_adapter(base: Llama, **config) -> LlamaAdapter:
    return LlamaAdapter(
        base.config, AdapterConfig(prompt_length=3, **config), torch.Generator().manual_seed(0)
    )


# The recipe


def test_the_papers_learning_rates():
    recipe = Recipe()
    assert recipe.peak_lr == pytest.approx(9e-3 * 64 / 256)
    # warm-up over 2 of 5 epochs, then half a cosine to 0
    expected = {0.0: 0, 0.5: 0.25, 1.0: 0.5, 2.0: 1, 2.75: 0.5 + math.sqrt(0.5) / 2, 3.5: 0.5, 5.0: 0}
    for epoch, share in expected.items():
        assert recipe.learning_rate(epoch) == pytest.approx(2.25e-3 * share, abs=1e-12)
    floored = Recipe(epochs=3, warmup_epochs=0, min_lr=1e-4)
    assert (floored.learning_rate(0), floored.learning_rate(3)) == pytest.approx((2.25e-3, 1e-4))


def test_the_papers_optimizer():
    optimizer = make_optimizer(make_adapter(make_base()), Recipe())
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.9, 0.95), 0.02, 2.25e-3)


@pytest.mark.parametrize(
    "field", ["epochs", "base_lr", "batch_size", "max_tokens", "max_grad_norm", "weight_decay"]
)
def test_impossible_recipes_are_refused(field):
    with pytest.raises(UserError, match=rf"{field} must be .*, got -1"):
        Recipe(**{field: -1})


def test_the_papers_recipe_on_alpaca_needs_no_warning():
    assert list(recipe_warnings(Recipe(), [300] * 49_402, fresh=True)) == []
    assert list(recipe_warnings(Recipe(epochs=10**9), [300] * 49_402, fresh=True)) == []


CANNOT = {
    "as long a warm-up": ({"epochs": 2, "batch_size": 64}, "the warm-up of 2 epochs ends after the run of 2"),
    "a warm-up beyond the run": ({"epochs": 1, "batch_size": 8}, "rises to 0.00013 and not to its peak of 0.000281"),
    "few steps": ({"epochs": 1, "warmup_epochs": 0.1, "batch_size": 50}, "of 0.00176: the run has only 2 steps"),
    "gates that stay at 0": ({}, "can move to about 0.011 only, .* for instance --base-lr 0.08 --epochs 50$"),
    "a batch of more than all": ({"batch_size": 101}, "--batch-size 101 is more than the 100 samples to train on"),
    "decay": ({"weight_decay": 1e3}, "--weight-decay 1000 times the learning rate of 0.00225 is at least 1"),
    "a pass of less than a sample": ({"max_tokens": 298}, "100 samples are longer than --max-tokens 298"),
}  # fmt: skip


@pytest.mark.parametrize("case", CANNOT)
def test_what_a_recipe_cannot_reach_is_said(case):
    changes, sentence = CANNOT[case]
    told = list(recipe_warnings(Recipe(**changes), [300] * 100, fresh=True))
    assert re.search(sentence, " ".join(told)), told


def test_a_recipe_that_reaches_all_it_says_is_not_talked_about():
    mended = {"epochs": 10, "warmup_epochs": 4, "batch_size": 4, "base_lr": 0.5, "max_tokens": 299}
    assert list(recipe_warnings(Recipe(**mended), [300] * 100, fresh=True)) == []


def test_gates_that_do_not_start_at_0_need_not_come_far():
    recipe = Recipe(batch_size=8)
    assert list(recipe_warnings(recipe, [300] * 100, fresh=False)) == []


NEVER = {
    "--validate-every 16": "--validate-every 16 never comes: the run has 15 steps, 5 an epoch",
    "--save-every 99": "--save-every 99 never comes",
    "--sample-every 99": "--sample-every 99 never comes",
    "--patience 4": "--patience 4 never ends the run, which validates 3 times",
    "--patience 8 --validate-every 2": "which validates 9 times after",
    "--patience 3 --validate-every 15 --save-every 15 --sample-every 15": "",
}


@pytest.mark.parametrize("words", NEVER)
def test_what_a_run_never_comes_to_is_said(words):
    options = read_options(f"--base b --data d --out o --epochs 3 --batch-size 20 {words}".split())
    told = list(never_due(options, recipe_of(options), 100))
    if words.startswith("--patience 8"):
        assert told == []
        options.patience = 10
        told = list(never_due(options, recipe_of(options), 100))
    assert len(told) == bool(NEVER[words]) and NEVER[words] in " ".join(told)


def test_a_run_that_learns_nothing_is_refused():
    with pytest.raises(
        UserError, match="the run has 1 step, and its learning rate is 0.* Pass --warmup-epochs 0"
    ):
        list(recipe_warnings(Recipe(epochs=1), [300] * 64, fresh=True))


# The loop


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("gate", [0.0, 0.7])
def test_a_step_is_the_mean_over_answer_tokens_however_it_is_cut(packed, gate):
    """Packing, padding and accumulation give the loss and the gradients of samples taken one by one."""
    base = make_base()
    adapter, separate = make_adapter(base), make_adapter(base)
    for one in (adapter, separate):
        torch.nn.init.constant_(one.gates, gate)
    chosen = samples()
    total = sum(len(sample.tokens) - sample.prompt_length for sample in chosen)
    losses = [batch_loss(base, separate, pack([sample])) for sample in chosen]
    (sum(losses) / total).backward()

    recipe = Recipe(batch_size=len(chosen), epochs=1, warmup_epochs=0, max_tokens=40, packed=packed)
    optimizer = make_optimizer(adapter, recipe)
    report = next(train(base, adapter, chosen, recipe, optimizer))
    assert report.loss == pytest.approx(sum(losses).item() / total, rel=1e-5)
    assert report.num_tokens == sum(len(sample.tokens) - 1 for sample in chosen)
    torch.testing.assert_close(adapter.gates.grad, separate.gates.grad, rtol=2e-4, atol=1e-7)
    torch.testing.assert_close(adapter.prompts.grad, separate.prompts.grad, rtol=2e-4, atol=1e-7)
    assert evaluate(base, separate, chosen, recipe) == pytest.approx(report.loss, rel=1e-5)


def test_the_adapter_moves_and_the_base_does_not():
    base = make_base()
    adapter = make_adapter(base)
    before = {name: tensor.clone() for name, tensor in (base.state_dict() | adapter.state_dict()).items()}
    recipe = Recipe(epochs=3, warmup_epochs=0, batch_size=4, base_lr=0.5)
    for _ in train(base, adapter, samples(), recipe, make_optimizer(adapter, recipe)):
        pass
    for name, parameter in adapter.named_parameters():
        assert parameter.grad.flatten(1).norm(dim=1).min() > 0, f"a layer of {name} got no gradient"
        assert not torch.isclose(parameter, before[name]).flatten(1).all(1).any(), (
            f"a layer of {name} did not move"
        )
    for name, parameter in base.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name]), name


def test_at_gate_zero_only_the_gates_get_gradients():
    base = make_base()
    adapter = make_adapter(base)
    batch_loss(base, adapter, pack(samples())).backward()
    assert adapter.gates.grad.abs().min() > 0 and not adapter.prompts.grad.any()


def test_the_loss_falls():
    base = make_base()
    adapter = make_adapter(base)
    recipe = Recipe(epochs=15, warmup_epochs=1, batch_size=9, base_lr=6.0)
    losses = [
        report.loss for report in train(base, adapter, samples(), recipe, make_optimizer(adapter, recipe))
    ]
    assert losses[-1] < losses[0] - 0.5


def test_an_infinite_gradient_is_not_stepped_on(monkeypatch):
    base = make_base()
    adapter = make_adapter(base)
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    adapter.gates.register_hook(lambda grad: torch.full_like(grad, math.inf))
    with pytest.raises(UserError, match="the gradient's norm became inf at step 0: try a lower --base-lr"):
        next(train(base, adapter, samples(), Recipe(), make_optimizer(adapter, Recipe())))
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())


def test_clipping_bounds_the_step_and_reports_the_norm_before():
    base = make_base()
    norms = {}
    for limit in (None, 1e-3):
        adapter = make_adapter(base)
        recipe = Recipe(epochs=1, warmup_epochs=0, batch_size=9, max_grad_norm=limit)
        report = next(train(base, adapter, samples(), recipe, make_optimizer(adapter, recipe)))
        after = torch.cat([parameter.grad.flatten() for parameter in adapter.parameters()]).norm().item()
        norms[limit] = (report.grad_norm, after)
    assert norms[None][0] == pytest.approx(norms[None][1], rel=1e-5) and norms[None][0] > 1e-2
    assert norms[1e-3][0] == pytest.approx(norms[None][0], rel=1e-5)
    assert norms[1e-3][1] == pytest.approx(1e-3, rel=1e-2)


def test_autocast_trains_close_to_float32():
    base = make_base()
    losses = []
    for autocast in (False, True):
        adapter = make_adapter(base)
        torch.nn.init.constant_(adapter.gates, 0.5)
        recipe = Recipe(epochs=1, batch_size=9, autocast=autocast)
        losses.append(next(train(base, adapter, samples(), recipe, make_optimizer(adapter, recipe))).loss)
        assert adapter.gates.grad.dtype == torch.float32 and adapter.gates.grad.any()
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_a_loss_that_is_not_a_number_ends_the_run():
    base = make_base()
    adapter = make_adapter(base)
    torch.nn.init.constant_(adapter.gates, math.nan)
    with pytest.raises(UserError, match="the loss became nan at step 0: try a lower --base-lr, or --clip 1"):
        next(train(base, adapter, samples(), Recipe(), make_optimizer(adapter, Recipe())))
