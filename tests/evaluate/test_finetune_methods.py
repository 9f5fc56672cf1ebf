"""Ways to adapt a frozen model: what each trains, and that nothing else changes."""

import copy

import pytest
import torch
from tiny_finetuning import MODELS  # the libraries that few installations have
from tiny_transformers import FIVE, HEADS, LAYERS, inputs_of, outputs
from torch import nn

from evaluate.finetune import methods, one_softmax
from evaluate.finetune.fitting import fit
from evaluate.finetune.methods import Size, adapt, trained_numbers
from model.errors import UserError
from zinit_kernels.integrations.transformers import SPLIT

C = 32
NAMES = ["ViT", "Llama", "CLIP", "GPT-2", *(["BERT", "RoBERTa"] if FIVE else [])]
STACKS = {"CLIP": 2}  # of layers


def adapted(name, method, rate=0.05):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    return model, adapt(model, method, Size(5, 2), rate, 1e-3, with_head=name in ("ViT", "RoBERTa"))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT's, of GPT-2
@pytest.mark.parametrize("method", ["bias", "one-softmax", "random-gates", "lora-2", "zero-init"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_changes_what_the_groups_hold_and_nothing_else(name, method):
    model, groups = adapted(name, method)
    before = copy.deepcopy(model.state_dict())
    inputs = inputs_of(name, "right-padded")
    fit(groups, lambda rows: outputs(model, inputs).float().square().mean(), 3, 3, 2, 0)
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    after = model.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    named = {
        key for key, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in trained
    }
    assert changed and changed <= named, changed - named
    assert trained_numbers(groups) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", NAMES)
def test_zero_init_prompts_and_lora_begin_with_the_base(name):
    torch.manual_seed(0)
    base = MODELS[name]().eval()
    inputs = inputs_of(name)
    with torch.no_grad():
        expected = outputs(base, inputs)
        for method in ("zero-init", "lora-4"):
            model, _ = adapted(name, method)
            assert torch.equal(outputs(model, inputs), expected), method
        for method in ("random-gates", "one-softmax"):
            model, _ = adapted(name, method)
            assert not torch.allclose(outputs(model, inputs), expected, atol=1e-4), method


@pytest.mark.parametrize("name", ["ViT", "Llama", "CLIP"])
def test_how_many_numbers_are_trained(name):
    layers = 2 * STACKS.get(name, 1)  # of Size(5, 2)
    head = 3 * C + 3 if name == "ViT" else 0
    value = C * 2 // HEADS if name == "Llama" else C  # two key heads
    expected = {
        "one-softmax": layers * 5 * C,
        "zero-init": layers * (5 * C + HEADS),
        "random-gates": layers * (5 * C + HEADS),
        "lora-2": LAYERS * STACKS.get(name, 1) * 2 * ((C + C) + (C + value)),
        "lora-16": LAYERS * STACKS.get(name, 1) * 16 * ((C + C) + (C + value)),
    }
    assert {method: trained_numbers(adapted(name, method)[1]) for method in expected} == {
        method: count + head for method, count in expected.items()
    }


class Projecting(nn.Module):
    is_causal = True

    def __init__(self, heads, width):
        super().__init__()
        self.k_proj, self.v_proj = nn.Linear(8, heads * width), nn.Linear(8, heads * width)
        self.shared_prompts = one_softmax.SharedPrompts(torch.randn(3, 8), SPLIT)


@pytest.mark.parametrize("mask", [None, "bool", "additive"])
def test_one_softmax_over_prompts_and_tokens(mask):
    torch.manual_seed(0)
    module = Projecting(2, 6).double()
    query, key, value = (torch.randn(2, heads, 5, 6, dtype=torch.float64) for heads in (4, 2, 2))
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    seen[1, :, :, 0] = mask is None
    given = {"bool": seen, "additive": torch.zeros(2, 1, 5, 5, dtype=torch.float64).masked_fill(~seen, -1e30)}
    out, _ = one_softmax.attention_forward(module, query, key, value, given.get(mask), scaling=0.3)
    prompt = module.shared_prompts.prompt
    for b in range(2):
        for h in range(4):
            k, v = (
                torch.cat([proj(prompt).view(3, 2, 6)[:, h // 2], t[b, h // 2]])
                for proj, t in ((module.k_proj, key), (module.v_proj, value))
            )
            for t in range(5):
                kept = torch.cat([torch.ones(3, dtype=torch.bool), seen[b, 0, t]])
                weights = (0.3 * k[kept] @ query[b, h, t]).softmax(0)
                torch.testing.assert_close(out[b, t, h], weights @ v[kept], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["whole", "right-padded", "left-padded"])
@pytest.mark.parametrize("name", [*NAMES, "Qwen3", "Mistral", "Granite", "OLMo 2", "SigLIP", "DINOv2"])
def test_one_softmax_without_a_prompt_is_the_base(name, kind):
    """Masks and causality are the base's, whichever way a model hands them over."""
    torch.manual_seed(0)
    base = MODELS[name]().eval()
    model = copy.deepcopy(base)
    one_softmax.add_one_softmax_prompts(model, 3, 2)
    found = [module for module in model.modules() if isinstance(module, one_softmax.SharedPrompts)]
    for prompts in found:
        prompts.prompt = nn.Parameter(prompts.prompt[:0])
    inputs = inputs_of(name, kind)
    with torch.no_grad():
        torch.testing.assert_close(outputs(model, inputs), outputs(base, inputs), rtol=1e-5, atol=1e-5)
    assert len(found) == 2 * (2 if name in ("CLIP", "SigLIP") else 1)


@pytest.mark.parametrize("name", ["Gemma 2", "GPT-OSS"])
def test_one_softmax_refuses_scores_that_it_does_not_compute(name):
    model, _ = adapted(name, "one-softmax")
    with torch.no_grad(), pytest.raises(UserError, match="changes its scores by (softcap|s_aux)"):
        model(**inputs_of(name))


def test_what_cannot_be_adapted_is_said():
    with pytest.raises(UserError, match=r"there is no method 'vpt'; there are frozen, head, .*lora-RANK"):
        methods.split_name("vpt")
    assert methods.split_name("lora") == ("lora", 8) and methods.split_name("lora-16") == ("lora", 16)
    for method, name, said in [
        ("head", "Llama", "nothing that this method trains"), ("frozen", "ViT", "nothing that this method trains"),
        ("lora-0", "ViT", "no method"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=said):
            adapted(name, method)
    assert adapted("CLIP", "frozen")[1] == []
    for method in ("zero-init", "one-softmax", "lora"):
        with pytest.raises(UserError, match="no attention of a known architecture"):
            adapt(nn.Linear(2, 2), method, Size(), 0.1, 0.1, with_head=False)


def test_training_is_the_same_each_time_and_stops_at_a_loss_that_is_no_number():
    rows = []
    weight = nn.Parameter(torch.ones(2))

    def loss(chosen):
        rows.append(chosen.tolist())
        return (weight * chosen.float().mean()).sum()

    fit([{"params": [weight], "lr": 0.1}], loss, 5, 2, 5, seed=3)
    first, rows[:] = list(rows), []
    fit([{"params": [weight], "lr": 0.1}], loss, 5, 2, 5, seed=3)
    assert rows == first and sorted(sum(first, [])) == sorted(list(range(5)) * 2), "every row once an epoch"
    with pytest.raises(UserError, match="the loss is nan at step 0"):
        fit([{"params": [weight], "lr": 0.1}], lambda _: weight.sum() * float("nan"), 5, 2, 5, seed=3)
