"""The command base-to-novel: a CLIP learns the first half of the classes, and is tested on each half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from ..ledgers import table_of
from ..question import Cell, Table
from ..scorers import base_to_novel
from ..shared import UserError
from .checkpoint import load_model, load_tokenizer
from .command import Defaults, command, interruptible_compare, parser_of, plan_of, report, run_of
from .image_sets import LAYOUT, Images, ImageSet, find_sets, read_set
from .pixels import DEFAULT_SIZE, Pixels, forward
from .protocol import Task

METHODS = ("frozen", "bias", "one-softmax", "random-gates", "lora", "zero-init")
_EVALUATED_AT_ONCE = 64


class BaseToNovel(Task):
    """A few images of each base class to learn from, others to choose the learning rate by, drawn anew for each seed.

    An image is told by the caption whose embedding is nearest, among the captions of its half of the classes.
    """

    score = "accuracy"
    figures = ("base", "novel", "harmonic mean")

    def __init__(self, base: Path, data: ImageSet, template: str, shots: int, image_size: int):
        self.title, self.base, self.data = f"{data.name}, base to novel", base, data
        self.pixels = Pixels(base, image_size)
        labels = sorted(set(data.train.labels.tolist()))
        self.halves = base_to_novel.split(labels)
        tokenizer = load_tokenizer(base)
        names = [data.classes[label].replace("_", " ") for label in labels]
        captions = tokenizer([template.format(name) for name in names], padding=True, return_tensors="pt")
        self.captions = {name: captions[name] for name in ("input_ids", "attention_mask")}
        self.shots = shots
        self.train, self.validation = data.train, data.train
        self._by_seed: dict[int, tuple[Images, Images]] = {}

    def make(self, seed: int) -> Any:
        self.train, self.validation = self._drawn(seed)
        return load_model(transformers.AutoModel, self.base)

    def _drawn(self, seed: int) -> tuple[Images, Images]:
        if seed not in self._by_seed:
            draw = torch.Generator().manual_seed(seed)
            wanted = base_to_novel.validation_shots(self.shots)
            train: list[int] = []
            validation: list[int] = []
            for label in self.halves[0]:
                of_label = (self.data.train.labels == label).nonzero().flatten()
                rows = of_label[torch.randperm(len(of_label), generator=draw)].tolist()
                if len(rows) < 2:
                    raise UserError(
                        f"{self.data.name}: the class {self.data.classes[label]!r} has one training image."
                    )
                cut = min(self.shots, len(rows) - 1)
                train += rows[:cut]
                validation += rows[cut : cut + wanted] if self.data.validation is None else []
            held_out = self.data.train.chosen(validation)
            if self.data.validation is not None:
                held_out = _of_classes(self.data.validation, self.halves[0])
            self._by_seed[seed] = (self.data.train.chosen(train), held_out)
        return self._by_seed[seed]

    def count(self, refit: bool) -> int:
        return len(self.train)

    def loss(self, model: Any, rows: Tensor, refit: bool) -> Tensor:
        pixels = self.pixels.batch(self.train, rows.tolist(), keep=True)
        logits = self._logits(model, pixels, self.halves[0])
        return F.cross_entropy(logits, self.train.labels[rows].to(logits.device))

    def validate(self, model: Any) -> float:
        return self._accuracy(model, self.validation, 0)

    def test(self, model: Any) -> dict[str, float]:
        base, novel = (
            self._accuracy(model, _of_classes(self.data.test, half), n) for n, half in enumerate(self.halves)
        )
        return {"base": base, "novel": novel, "harmonic mean": base_to_novel.harmonic_mean(base, novel)}

    def _logits(self, model: Any, pixels: Tensor, among: list[int]) -> Tensor:
        captions = {name: values[among] for name, values in self.captions.items()}
        logits: Tensor = forward(model, pixels, **captions).logits_per_image
        return logits

    def _accuracy(self, model: Any, images: Images, half: int) -> float:
        among, right = self.halves[half], 0
        for first in range(0, len(images), _EVALUATED_AT_ONCE):
            rows = list(range(first, min(first + _EVALUATED_AT_ONCE, len(images))))
            best = self._logits(model, self.pixels.batch(images, rows, keep=False), among).argmax(-1).cpu()
            right += int((torch.tensor(among)[best] == images.labels[rows]).sum())
        return 100 * right / len(images)


def _of_classes(images: Images, labels: list[int]) -> Images:
    rows = [row for row, label in enumerate(images.labels.tolist()) if label in set(labels)]
    if not rows:
        raise UserError("there are no test images of one half of the classes.")
    return images.chosen(rows)


@command
def main(arguments: list[str]) -> None:
    """`python -m evaluate base-to-novel`."""
    about = "CLIP learns half of the classes of each data set and is tested on both halves"
    defaults = Defaults(METHODS, steps=300, batch_size=32, seeds=base_to_novel.SEEDS)
    parser = parser_of("base-to-novel", about, LAYOUT, defaults)
    parser.add_argument(
        "--shots", type=int, default=base_to_novel.SHOTS, help="images a base class (default: 16)"
    )
    parser.add_argument(
        "--template", default="a photo of a {}.", help="caption of a class (default: %(default)s)"
    )
    parser.add_argument("--image-size", type=int, default=DEFAULT_SIZE, help="default: %(default)s")
    options = parser.parse_args(arguments)
    plan = plan_of(options, with_head=False)
    if options.shots < 1 or options.image_size < 1:
        raise UserError(
            f"--shots and --image-size must be at least 1, got {options.shots} and {options.image_size}."
        )
    before, mark, after = options.template.partition("{}")
    if not mark or any(sign in before + after for sign in "{}"):
        raise UserError(f"--template must hold {{}} once, where the class stands, got {options.template!r}.")
    sets = [read_set(folder) for folder in find_sets(options.data)]
    more = {name: getattr(options, name) for name in ("shots", "template", "image_size")}
    run = run_of("base-to-novel", options, plan, " ".join(data.fingerprint() for data in sets), more)
    tables: list[Table] = []
    scores: dict[str, list[base_to_novel.Score]] = {}
    for data in sets:
        task = BaseToNovel(options.base, data, options.template, options.shots, options.image_size)
        entries = interruptible_compare(task, plan, options.out, run, data.name)
        tables.append(table_of(task.title, entries, run))
        for method in plan.methods:
            tests = [e["figures"] for e in entries if (e["method"], e["kind"]) == (method, "test")]
            score = base_to_novel.score([(figures["base"], figures["novel"]) for figures in tests])
            scores.setdefault(method, []).append(score)
    rows: list[list[Cell]] = []
    for method, found in scores.items():
        base, novel = (
            sum(values) / len(found) for values in ([s.base for s in found], [s.novel for s in found])
        )
        rows.append([method, base, novel, base_to_novel.harmonic_mean(base, novel)])
    note = "Means over seeds and data sets; the harmonic mean is that of the two means."
    report(
        [*tables, Table("Base to novel", ("method", "base", "novel", "harmonic mean"), rows, [note])],
        options.out,
        run,
    )
