"""The command vtab: image classification by the protocol of VTAB-1k (arXiv 1910.04867)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from ..ledgers import Entry, mean, table_of, test_figures
from ..question import Cell, Quoted, Table
from ..scorers import vtab
from ..shared import UserError
from ..tables import with_quoted
from .checkpoint import load_model
from .command import Defaults, command, interruptible_compare, parser_of, plan_of, report, run_of
from .image_sets import LAYOUT, Images, ImageSet, find_sets, read_set
from .pixels import DEFAULT_SIZE, Pixels, accuracy, forward
from .protocol import Plan, Task

METHODS = ("head", "bias", "one-softmax", "random-gates", "lora", "zero-init")
QUOTED = (
    Quoted(
        "LLaMA-Adapter's attention, ViT-B/16", "arXiv 2303.16199v3",
        {"natural": 81.74, "specialized": 84.43, "structured": 56.75},
    ),
)  # fmt: skip


class Classification(Task):
    """800 training and 200 validation images; for the test the chosen setting is trained again on all 1,000.

    A folder without validation images has them drawn from its training images; so are the 1,000 where there are more.
    """

    score = "accuracy"
    figures = ("test accuracy",)

    def __init__(self, base: Path, data: ImageSet, image_size: int, test_images: int | None):
        self.title, self.base, self.classes = data.name, base, data.classes
        self.pixels = Pixels(base, image_size)
        draw = torch.Generator().manual_seed(0)
        self.train, self.validation = _splits(data, draw)
        self.test_data = data.test
        if test_images is not None and test_images < len(data.test):
            self.test_data = data.test.chosen(sorted(_some(len(data.test), test_images, draw)))

    def make(self, seed: int) -> Any:
        auto = transformers.AutoModelForImageClassification
        return load_model(auto, self.base, num_labels=len(self.classes))

    def count(self, refit: bool) -> int:
        return len(self.train) + (len(self.validation) if refit else 0)

    def loss(self, model: Any, rows: Tensor, refit: bool) -> Tensor:
        first = [row for row in rows.tolist() if row < len(self.train)]
        second = [row - len(self.train) for row in rows.tolist() if row >= len(self.train)]
        pixels = [
            self.pixels.batch(images, chosen, keep=True)
            for images, chosen in ((self.train, first), (self.validation, second))
            if chosen
        ]
        labels = torch.cat([self.train.labels[first], self.validation.labels[second]])
        logits = forward(model, torch.cat(pixels)).logits
        return F.cross_entropy(logits, labels.to(logits.device))

    def validate(self, model: Any) -> float:
        return accuracy(model, self.pixels, self.validation, keep=True)

    def test(self, model: Any) -> dict[str, float]:
        return {"test accuracy": accuracy(model, self.pixels, self.test_data)}


def _some(count: int, wanted: int, draw: torch.Generator) -> list[int]:
    rows: list[int] = torch.randperm(count, generator=draw)[:wanted].tolist()
    return rows


def _splits(data: ImageSet, draw: torch.Generator) -> tuple[Images, Images]:
    if data.validation is not None:
        return data.train, data.validation
    if len(data.train) < 5:
        raise UserError(
            f"{data.name} has {len(data.train)} training images, too few to validate on a fifth of them."
        )
    rows = _some(len(data.train), vtab.TRAIN + vtab.VALIDATION, draw)
    cut = len(rows) * vtab.TRAIN // (vtab.TRAIN + vtab.VALIDATION)
    return data.train.chosen(rows[:cut]), data.train.chosen(rows[cut:])


@command
def main(arguments: list[str]) -> None:
    """`python -m evaluate vtab`."""
    about = "Image classification by VTAB-1k's protocol: 800 + 200 images, trained again on 1,000"
    parser = parser_of("vtab", about, LAYOUT, Defaults(METHODS, steps=500, batch_size=64))
    parser.add_argument("--image-size", type=int, default=DEFAULT_SIZE, help="default: %(default)s")
    parser.add_argument("--test-images", type=int, help="test on so many, drawn once (default: all)")
    options = parser.parse_args(arguments)
    plan = plan_of(options)
    for name in ("image_size", "test_images"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}.")
    folders = find_sets(options.data)
    try:
        vtab.score({folder.name: [0.0] for folder in folders})
    except ValueError as error:
        raise UserError(f"{options.data}: {error}.") from error
    sets = [read_set(folder) for folder in folders]
    more = {"image_size": options.image_size, "test_images": options.test_images}
    run = run_of("vtab", options, plan, " ".join(data.fingerprint() for data in sets), more)
    tables: list[Table] = []
    found: dict[str, list[Entry]] = {}
    for data in sets:
        task = Classification(options.base, data, options.image_size, options.test_images)
        found[data.name] = interruptible_compare(task, plan, options.out, run, data.name)
        tables.append(table_of(data.name, found[data.name], run))
    report([*tables, *_summary(plan, found)], options.out, run)


def _summary(plan: Plan, found: dict[str, list[Entry]]) -> list[Table]:
    """The means of VTAB's groups, where every task of one was run."""
    if len(found) < 2:
        return []
    rows: list[list[Cell]] = []
    for method in plan.methods:
        tests = {name: test_figures(entries, method, "test accuracy") for name, entries in found.items()}
        score = vtab.score(tests)
        everything = mean([mean(values) for values in tests.values()])
        rows.append([method, *(score.groups.get(group) for group in vtab.GROUPS), score.overall, everything])
    columns = ("mean of test accuracies, %", *vtab.GROUPS, "mean of groups", "mean of these sets")
    return [with_quoted(Table("VTAB-1k", columns, rows), QUOTED)]
