"""The training loop: an adapter learns, the base stays as it is.

optimizer = make_optimizer(adapter, recipe)
for report in train(base, adapter, samples, recipe, optimizer):
    print(report.step, report.loss)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .adapter import LlamaAdapter
from .data import Batch, Sample, batches, epoch_order
from .errors import UserError
from .llama import Llama
from .loss import answer_loss


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained. The learning rate is base_lr * batch_size / 256, as in the official script."""

    epochs: int = 5
    warmup_epochs: float = 2.0  # the learning rate rises from 0 during these, then falls along half a cosine
    base_lr: float = 9e-3
    min_lr: float = 0.0
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    batch_size: int = 64  # samples per optimizer step
    max_grad_norm: float | None = None  # clips the gradient to this norm
    max_tokens: int = 2048  # in one forward pass; a step takes as many passes as its samples need
    packed: bool = True  # False: rows padded to the longest
    autocast: bool = False  # bfloat16 arithmetic; parameters and loss stay as they are
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "base_lr", "batch_size", "max_tokens", "max_grad_norm"):
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


class StepReport(NamedTuple):
    """What one optimizer step did."""

    step: int  # from 0
    epoch: float  # at its beginning
    loss: float  # mean over the step's answer tokens, in nats
    learning_rate: float
    grad_norm: float  # before clipping
    num_tokens: int  # that went through the model, without padding
    seconds: float


def make_optimizer(adapter: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over the adapter's prompts and gates, both decayed, as in the official script."""
    return torch.optim.AdamW(
        adapter.parameters(), lr=recipe.peak_lr, betas=recipe.betas, weight_decay=recipe.weight_decay
    )


def train(
    base: Llama,
    adapter: LlamaAdapter,
    samples: Sequence[Sample],
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    *,
    first_step: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[StepReport]:
    """Takes the optimizer steps from first_step to the recipe's last, one per item of the iterator.

    The base must be frozen. A step's loss is the mean over all answer tokens of its samples, however they are spread
    over forward passes, so packing changes nothing beyond rounding. `stop` is asked after every pass; once it says
    True the step begun is thrown away and the iterator ends: the parameters are those after the last step reported.
    """
    steps_per_epoch = recipe.steps_per_epoch(len(samples))
    order: list[int] = []
    for step in range(first_step, recipe.epochs * steps_per_epoch):
        began = time.perf_counter()
        epoch, index = divmod(step, steps_per_epoch)
        if not order or index == 0:
            order = epoch_order(len(samples), recipe.seed, epoch)
        chosen = [samples[i] for i in order[index * recipe.batch_size : (index + 1) * recipe.batch_size]]
        passes = list(batches(chosen, recipe.max_tokens, packed=recipe.packed))
        num_answer_tokens = sum(batch.num_answer_tokens for batch in passes)

        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for batch in passes:
            partial = batch_loss(base, adapter, batch, recipe.autocast) / num_answer_tokens
            partial.backward()
            loss += partial.item()
            if stop():
                return
        learning_rate = recipe.learning_rate(step / steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        grad_norm = nn.utils.clip_grad_norm_(adapter.parameters(), recipe.max_grad_norm or math.inf).item()
        for name, value in (("loss", loss), ("gradient's norm", grad_norm)):
            if not math.isfinite(value):  # a step would carry it into the parameters, and into the checkpoint
                raise UserError(
                    f"the {name} became {value} at step {step}: try a lower --base-lr, or --clip 1."
                )
        optimizer.step()
        yield StepReport(
            step=step,
            epoch=step / steps_per_epoch,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            num_tokens=sum(batch.num_tokens for batch in passes),
            seconds=time.perf_counter() - began,
        )


def batch_loss(base: Llama, adapter: LlamaAdapter | None, batch: Batch, autocast: bool = False) -> Tensor:
    """-log p of the batch's answer tokens, summed: a float32 scalar."""
    batch = batch.to(base.device)
    with torch.autocast(base.device.type, torch.bfloat16, enabled=autocast):
        hidden = base.hidden_states(
            batch.tokens, adapter, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen
        )
        return answer_loss(hidden, batch.targets, base.output_weight, reduction="sum")


@torch.no_grad()
def evaluate(
    base: Llama,
    adapter: LlamaAdapter | None,
    samples: Sequence[Sample],
    recipe: Recipe,
    stop: Callable[[], bool] = lambda: False,
    report: Callable[[int, int], None] = lambda number, total: None,
) -> float:
    """The mean of -log p over the samples' answer tokens, in nats; nan once `stop`, asked after every pass, is true.

    `report` is told the pass that begins, from 1, and how many there are.
    """
    loss, num_answer_tokens = 0.0, 0
    passes = list(batches(samples, recipe.max_tokens, packed=recipe.packed))
    for number, batch in enumerate(passes, 1):
        report(number, len(passes))
        loss += batch_loss(base, adapter, batch, recipe.autocast).item()
        num_answer_tokens += batch.num_answer_tokens
        if stop():
            return math.nan
    return loss / num_answer_tokens
