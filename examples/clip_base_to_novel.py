"""From base to novel classes with a CLIP and zero-init prompts, in about two minutes without downloads.

    python examples/clip_base_to_novel.py [--quick]

The example draws coloured shapes, trains a small CLIP on them and their captions ("a red circle"), and freezes it. The
task: name the same shapes under water, in pictures that are pale and blue. Of the 36 classes
(6 colours x 6 shapes) only the 24 base classes have training pictures, 16 each; the other 12 are novel, though every
colour and every shape is among the base classes. Settings are those that do best on validation pictures of the base
classes alone. Base pictures are told apart among base captions, novel ones among novel captions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from common import best, fit, is_quick, show, trained_numbers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from zinit_kernels.console import run
from zinit_kernels.integrations.transformers import add_zero_init_attention, parameter_groups

SIZE, LAYERS, PROMPTS = 24, 3, 10
WATER = torch.tensor([0.0, 0.3, 0.6])[:, None, None]  # its colour; 60 % of what one sees there
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # at (x, y), with the middle at (0, 0)
    "circle": lambda x, y: x.hypot(y) < 0.9,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) < 0.8,
    "triangle": lambda x, y: (y > -0.7) & (y < 0.9 - 1.7 * x.abs()),
    "cross": lambda x, y: (torch.minimum(x.abs(), y.abs()) < 0.3) & (torch.maximum(x.abs(), y.abs()) < 0.9),
    "ring": lambda x, y: (x.hypot(y) < 1.0) & (x.hypot(y) > 0.55),
    "diamond": lambda x, y: x.abs() + y.abs() < 1.0,
}
COLOURS = {
    "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1),
    "cyan": (0, 1, 1), "magenta": (1, 0, 1), "yellow": (1, 1, 0),
}  # fmt: skip
WORDS = ["", "<start>", "<end>", "a", *COLOURS, *SHAPES]
CAPTIONS = torch.tensor(
    [
        [WORDS.index(word) for word in ("<start>", "a", colour, shape, "<end>")]
        for colour in COLOURS
        for shape in SHAPES
    ]
)
CLASSES = torch.arange(len(CAPTIONS))
NOVEL = CLASSES[(CLASSES // 6 + CLASSES) % 3 == 0]
BASE = CLASSES[(CLASSES // 6 + CLASSES) % 3 != 0]


class Pictures:
    """Pictures [N, 3, SIZE, SIZE] of given classes: place, size, brightness of the ground and noise are drawn."""

    def __init__(self, classes: Tensor, seed: int, under_water: bool):
        draw = torch.Generator().manual_seed(seed)
        count = len(classes)
        right, up, radius, ground = torch.rand(4, count, 1, 1, generator=draw)
        places = torch.linspace(-1, 1, SIZE)
        x = (places[None, None, :] - 0.4 * (right - 0.5)) / (0.45 + 0.3 * radius)
        y = (-places[None, :, None] - 0.4 * (up - 0.5)) / (0.45 + 0.3 * radius)
        shapes = torch.stack([shape(x, y) for shape in SHAPES.values()], dim=1)  # every shape at every place
        inside = shapes[torch.arange(count), classes % 6, None]
        colour = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[classes // 6, :, None, None]
        clean = torch.where(inside, colour, 0.3 * ground[:, None])
        seen = clean + 0.05 * torch.randn(clean.shape, generator=draw)
        self.pixels = 2 * (0.4 * seen + 0.6 * WATER if under_water else seen) - 1
        self.classes = classes


def task(classes: Tensor, each: int, seed: int) -> tuple[Pictures, Tensor]:
    """Pictures, and the captions among which theirs is to be found."""
    return Pictures(classes.repeat(each), seed, under_water=True), classes


def logits(model: nn.Module, pixels: Tensor, among: Tensor) -> Tensor:
    return model(input_ids=CAPTIONS[among], pixel_values=pixels).logits_per_image


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Pictures, among: Tensor) -> float:
    found = among[logits(model, pictures.pixels, among).argmax(-1)]
    return float((found == pictures.classes).float().mean())


def learn_captions(model: nn.Module, steps: int) -> None:
    """CLIP's own loss: every batch holds one picture of each class, to be matched with the captions both ways."""
    pictures = Pictures(CLASSES.repeat(300), seed=0, under_water=False)
    draw = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        rows = CLASSES + len(CLASSES) * torch.randint(300, (len(CLASSES),), generator=draw)
        matrix = logits(model, pictures.pixels[rows], CLASSES)
        return F.cross_entropy(matrix, CLASSES) + F.cross_entropy(matrix.T, CLASSES)

    fit([{"params": list(model.parameters()), "lr": 2e-3, "weight_decay": 0.02}], loss, steps)
    model.eval()


def adapt(model: nn.Module, groups: list[dict], pictures: Pictures, among: Tensor, steps: int) -> nn.Module:
    draw = torch.Generator().manual_seed(1)
    targets = torch.searchsorted(among, pictures.classes)

    def loss() -> Tensor:
        rows = torch.randint(len(targets), (36,), generator=draw)
        return F.cross_entropy(logits(model, pictures.pixels[rows], among), targets[rows])

    fit(groups, loss, steps)
    return model.eval()


def prompted(base: nn.Module, text: bool, steps: int, rates: list[float]) -> Iterator[nn.Module]:
    training = task(BASE, each=16, seed=1)
    with torch.no_grad():
        expected = logits(base, training[0].pixels, CLASSES)
    for rate in rates:
        torch.manual_seed(0)
        model = copy.deepcopy(base)
        add_zero_init_attention(model if text else model.vision_model, PROMPTS, LAYERS)
        with torch.no_grad():
            assert torch.equal(logits(model, training[0].pixels, CLASSES), expected), "step 0 is the base's"
        yield adapt(model, parameter_groups(model, rate, gate_learning_rate=0.1), *training, steps)


def fine_tuned(base: nn.Module, steps: int, rates: list[float]) -> Iterator[nn.Module]:
    for rate in rates:
        model = copy.deepcopy(base).requires_grad_(True)
        yield adapt(model, [{"params": list(model.parameters()), "lr": rate}], *task(BASE, 16, seed=1), steps)


def main() -> None:
    quick = is_quick(__doc__)
    torch.manual_seed(0)
    encoder = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
    }
    text = {
        "vocab_size": len(WORDS),
        "max_position_embeddings": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {"image_size": SIZE, "patch_size": 8}
    base = CLIPModel(
        CLIPConfig(text_config=encoder | text, vision_config=encoder | vision, projection_dim=32)
    )
    print("training a base on pictures and captions ...", flush=True)
    learn_captions(base, 300 if quick else 1200)
    base.requires_grad_(False)

    validation = task(BASE, each=30, seed=2)
    seen, unseen = task(BASE, each=50, seed=3), task(NOVEL, each=50, seed=4)
    steps, settings = (150, 1) if quick else (400, 3)
    methods = {
        "frozen base": [base],
        "zero-init prompts, vision": prompted(base, False, steps, [3e-1, 1e-1, 3e-2][:settings]),
        "zero-init prompts, vision and text": prompted(base, True, steps, [3e-1, 1e-1, 3e-2][:settings]),
        "everything fine-tuned": fine_tuned(base, steps, [3e-4, 1e-4, 1e-3][:settings]),
    }
    rows = []
    for name, models in methods.items():
        print(f"{name} ...", flush=True)
        model = best(models, lambda model: accuracy(model, *validation))
        on_base, on_novel = accuracy(model, *seen), accuracy(model, *unseen)
        mean = 2 * on_base * on_novel / max(on_base + on_novel, 1e-9)
        rows.append([name, trained_numbers(model), on_base, on_novel, mean])
    show("Shapes under water", ["", "trained numbers", "base", "novel", "harmonic mean"], rows)
    assert rows[1][-1] > rows[0][-1] + 0.1, "zero-init prompts learned nothing"


if __name__ == "__main__":
    run(main)
