"""Zero-init prompts on a vision transformer, against a linear probe and VPT, in about two minutes without downloads.

    python examples/vit_digits.py [--quick]

The example trains a small ViT on pairs of scikit-learn's handwritten digits to read the one that a bright corner points
at. Then it is frozen, and the task changes: no pointer, always read the left digit. All methods begin with the base
and its classifier, see the same pairs, and take the settings that do best on a validation split; training, validation
and test pairs are made of different digits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from common import best, fit, head_group, is_quick, show, trained_numbers
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from zinit_kernels.console import run
from zinit_kernels.integrations.transformers import add_zero_init_attention, parameter_groups

LAYERS, HIDDEN, PROMPTS = 4, 64, 10
PATCHES = 8  # of 4 x 4 pixels; the class token comes before them
TRAINING, VALIDATION, TEST = range(0, 1000), range(1000, 1300), range(1300, 1797)  # of the shuffled digits
Pairs = tuple[Tensor, Tensor]  # pictures [N, 1, 8, 16], the digits to read [N]


class Digits:
    """Draws pairs of digits, the same ones in every run."""

    def __init__(self) -> None:
        digits = load_digits()
        self.draw = torch.Generator().manual_seed(0)
        order = torch.randperm(len(digits.target), generator=self.draw)
        self.pictures = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
        self.labels = torch.tensor(digits.target)[order]

    def pairs(self, split: range, count: int, pointer: bool) -> Pairs:
        place = torch.randint(split.start, split.stop, (2, count), generator=self.draw)
        pictures = torch.cat([self.pictures[place[0]], self.pictures[place[1]]], dim=-1)
        if not pointer:
            return pictures, self.labels[place[0]]
        side = torch.randint(2, (count,), generator=self.draw)
        pictures[torch.arange(count), 0, 0, side * 15] = 3.0  # three times the brightest ink
        return pictures, self.labels[place[side, torch.arange(count)]]


def train(model: nn.Module, groups: list[dict], pairs: Pairs, steps: int) -> nn.Module:
    draw = torch.Generator().manual_seed(1)

    def loss() -> Tensor:
        rows = torch.randint(len(pairs[1]), (64,), generator=draw)
        return F.cross_entropy(model(pixel_values=pairs[0][rows]).logits, pairs[1][rows])

    fit(groups, loss, steps)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, pairs: Pairs) -> float:
    return float((model(pixel_values=pairs[0]).logits.argmax(-1) == pairs[1]).float().mean())


def linear_probes(base: nn.Module, pairs: Pairs, steps: int, rates: list[float]) -> Iterator[nn.Module]:
    """The classifier alone goes on learning."""
    for rate in rates:
        model = copy.deepcopy(base)
        yield train(model, [head_group(model, rate)], pairs, steps)


class VisualPrompts(nn.ParameterList):
    """VPT-deep: each layer reads prompt tokens of its own behind the picture's, in place of the last layer's."""

    def __init__(self, model: nn.Module):
        super().__init__(nn.Parameter(0.02 * torch.randn(PROMPTS, HIDDEN)) for _ in range(LAYERS))
        layers = [module for module in model.modules() if type(module).__name__ == "ViTLayer"]
        for layer, prompts in zip(layers, self, strict=True):
            layer.register_forward_pre_hook(
                lambda _, inputs, prompts=prompts: (self.appended(inputs[0], prompts), *inputs[1:])
            )

    def appended(self, hidden: Tensor, prompts: Tensor) -> Tensor:
        return torch.cat([hidden[:, : 1 + PATCHES], prompts.expand(len(hidden), -1, -1)], dim=1)


def visual_prompts(base: nn.Module, pairs: Pairs, steps: int, rates: list[float]) -> Iterator[nn.Module]:
    for rate in rates:
        torch.manual_seed(0)
        model = copy.deepcopy(base)
        model.visual_prompts = VisualPrompts(model)
        prompts = {"params": list(model.visual_prompts), "lr": rate, "weight_decay": 0.02}
        yield train(model, [prompts, head_group(model, 1e-3)], pairs, steps)


def zero_init_prompts(base: nn.Module, pairs: Pairs, steps: int, rates: list[float]) -> Iterator[nn.Module]:
    with torch.no_grad():
        expected = base(pixel_values=pairs[0][:100]).logits
    for rate in rates:
        torch.manual_seed(0)
        model = add_zero_init_attention(copy.deepcopy(base), PROMPTS, LAYERS)
        with torch.no_grad():
            assert torch.equal(model(pixel_values=pairs[0][:100]).logits, expected), "step 0 is the base's"
        groups = parameter_groups(model, rate, gate_learning_rate=0.3)
        yield train(model, [*groups, head_group(model, 1e-3)], pairs, steps)


def main() -> None:
    quick = is_quick(__doc__)
    torch.manual_seed(0)
    digits = Digits()
    base = ViTForImageClassification(
        ViTConfig(
            image_size=(8, 16), patch_size=(4, 4), num_channels=1, hidden_size=HIDDEN, intermediate_size=128,
            num_hidden_layers=LAYERS, num_attention_heads=4, num_labels=10, hidden_dropout_prob=0.0,
        )
    )  # fmt: skip
    print("training a base that reads the digit pointed at ...", flush=True)
    everything = [{"params": list(base.parameters()), "lr": 2e-3, "weight_decay": 0.05}]
    train(base, everything, digits.pairs(TRAINING, 30_000, pointer=True), 350 if quick else 2000)
    base.requires_grad_(False)

    training = digits.pairs(TRAINING, 4000, pointer=False)
    validation = digits.pairs(VALIDATION, 1000, pointer=False)
    test, pointed = (digits.pairs(TEST, 2000, pointer) for pointer in (False, True))
    steps, settings = (150, 1) if quick else (400, 3)
    rows = [
        ["its own task: the digit pointed at", 0, accuracy(base, pointed)],
        ["no pointer: frozen base", 0, accuracy(base, test)],
    ]
    methods = {
        "linear probe": (linear_probes, [1e-2, 3e-3, 3e-2]),
        "VPT-deep and probe": (visual_prompts, [3e-2, 1e-2, 1e-1]),
        "zero-init prompts and probe": (zero_init_prompts, [1e-1, 3e-2, 3e-1]),
    }
    for name, (method, rates) in methods.items():
        print(f"{name} ...", flush=True)
        trained = method(base, training, steps, rates[:settings])
        model = best(trained, lambda model: accuracy(model, validation))
        rows.append([name, trained_numbers(model), accuracy(model, test)])
    show("Reading the left digit", ["", "trained numbers", "test accuracy"], rows)
    assert rows[-1][-1] > rows[1][-1] + 0.1, "zero-init prompts learned nothing"


if __name__ == "__main__":
    run(main)
