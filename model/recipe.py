"""How an adapter is trained: the numbers of a run, and what they cannot reach."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import UserError

# Adam moves a number by about the learning rate a step, so a gate that starts at 0 ends below the sum of the rates.
# Below this sum the prompts have less than a tenth of the weight of the tokens, and the answers stay the base's.
_LEAST_REACH = 0.1
_STABLE_LR = 0.02  # the demo's peak, for a model of 2 million parameters
_LONG_RUN = 1 << 20  # steps: such a run reaches its peak, and is not counted step by step


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained. The learning rate is base_lr * batch_size / 256, as in the official script."""

    epochs: int = 5
    warmup_epochs: float = 2.0  # the learning rate rises from 0 during these, then falls along half a cosine
    base_lr: float = 9e-3
    min_lr: float = 0.0
    projection_lr: float = 1.0  # of a visual part, times the learning rate
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    batch_size: int = 64  # samples per optimizer step
    max_grad_norm: float | None = None  # clips the gradient to this norm
    max_tokens: int = 2048  # in one forward pass; a step takes as many passes as its samples need
    packed: bool = True  # False: rows padded to the longest
    autocast: bool = False  # bfloat16 arithmetic; parameters and loss stay as they are
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "base_lr", "batch_size", "max_tokens", "max_grad_norm", "projection_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be above 0, got {value}.")
        for name in ("warmup_epochs", "min_lr", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"{name} must be at least 0, got {value}.")
        if self.min_lr > self.peak_lr:
            raise UserError(f"min_lr {self.min_lr} is above the learning rate's peak of {self.peak_lr:.3g}.")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed must lie in 0 .. 2**63 - 1, got {self.seed}.")

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up; 2.25e-3 by default."""
        return self.base_lr * self.batch_size / 256

    def learning_rate(self, epoch: float) -> float:
        """The learning rate `epoch` epochs (with their fraction) into the run."""
        if epoch < self.warmup_epochs:
            return self.peak_lr * epoch / self.warmup_epochs
        progress = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-9)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def steps_per_epoch(self, num_samples: int) -> int:
        """Optimizer steps in an epoch; the last one takes what is left."""
        return math.ceil(num_samples / self.batch_size)

    def num_steps(self, num_samples: int) -> int:
        """Optimizer steps of the run."""
        return self.epochs * self.steps_per_epoch(num_samples)

    def learning_rates(self, num_samples: int) -> Iterator[float]:
        """The learning rate of each step."""
        steps = self.steps_per_epoch(num_samples)
        return (self.learning_rate(step / steps) for step in range(self.epochs * steps))

    def highest_lr(self, num_samples: int) -> float:
        """The highest learning rate that a step of the run has; short runs miss the peak."""
        if self.num_steps(num_samples) > _LONG_RUN:
            return self.peak_lr
        return max(self.learning_rates(num_samples))


def recipe_warnings(recipe: Recipe, lengths: list[int], fresh: bool) -> Iterator[str]:
    """What the recipe says and cannot do with so many samples, a sentence each, with what to change.

    lengths: of the training samples, in tokens. fresh: the gates start at 0. Raises UserError for a recipe whose
    learning rate is 0 at every step.
    """
    num_samples, steps = len(lengths), recipe.num_steps(len(lengths))
    highest = recipe.highest_lr(num_samples)
    reach = math.inf if steps > _LONG_RUN else math.fsum(recipe.learning_rates(num_samples))
    if highest == 0:
        raise UserError(
            f"the run has {steps} step{'s' * (steps > 1)}, and its learning rate is 0: the warm-up begins there. "
            "Pass --warmup-epochs 0, or more --epochs."
        )
    if num_samples < recipe.batch_size:
        yield (
            f"--batch-size {recipe.batch_size} is more than the {num_samples} samples to train on: a step takes all "
            f"of them, with the learning rate of {recipe.batch_size}. --batch-size {num_samples} says what is done"
        )
    if highest < 0.9 * recipe.peak_lr:
        cause = f"the run has only {steps} step{'s' * (steps > 1)}"
        if recipe.warmup_epochs >= recipe.epochs:
            cause = f"the warm-up of {recipe.warmup_epochs:g} epochs ends after the run of {recipe.epochs}"
        yield (
            f"the learning rate rises to {highest:.3g} and not to its peak of {recipe.peak_lr:.3g}: {cause}. Lower "
            f"--warmup-epochs (the paper's share of the run is {0.4 * recipe.epochs:g}), or raise --epochs"
        )
    if fresh and reach < _LEAST_REACH:
        # to reach 1: a higher rate as far as it is known to be stable, and more epochs for the rest
        faster = min(1 / reach, max(_STABLE_LR / recipe.peak_lr, 1))
        base_lr, epochs = recipe.base_lr * faster, math.ceil(recipe.epochs / (reach * faster))
        yield (
            f"in {steps} steps the gates, which start at 0, can move to about {reach:.2g} only, and the answers will "
            "hardly differ from the base's. Raise --base-lr or --epochs (--batch-size changes nothing here), for "
            f"instance --base-lr {base_lr:.2g} --epochs {epochs}"
        )
    if recipe.peak_lr * recipe.weight_decay >= 1:
        yield (
            f"--weight-decay {recipe.weight_decay:g} times the learning rate of {recipe.peak_lr:.3g} is at least 1: "
            "a step undoes all that was learned before it. Lower one of them"
        )
    longer = sum(length - 1 > recipe.max_tokens for length in lengths)
    if longer:
        yield (
            f"{longer} samples are longer than --max-tokens {recipe.max_tokens} and go through the model alone. Lower "
            "--max-seq-len, or raise --max-tokens"
        )
