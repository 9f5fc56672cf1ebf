"""The training loop. The adapter learns; the base stays as it is.

optimizer = make_optimizer(adapter, recipe)
for report in train(base, adapter, samples, recipe, optimizer):
    print(report.step, report.loss)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .adapter import LlamaAdapter
from .data import Batch, Sample, batches, count_answer_tokens, pack, pad, passes
from .errors import UserError
from .llama import Adapter, Llama, about_images
from .lora import Lora
from .loss import IGNORE, answer_loss
from .mixture import Mixture
from .parallel.world import World
from .recipe import Recipe


class StepReport(NamedTuple):
    """What one optimizer step did."""

    step: int  # from 0
    epoch: float  # at its beginning
    loss: float  # mean over the step's answer tokens, in nats
    learning_rate: float
    grad_norm: float  # before clipping
    num_tokens: int  # through the model, without padding
    seconds: float
    layer_grad_norms: list[float]  # of each adapted layer, before clipping
    layer_gates: list[float]  # of each adapted layer after the step: the mean of |tanh(gate)| over its heads


def make_optimizer(adapter: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over the adapter's prompts and gates, with weight decay on both, as in the official script.

    Of a visual part, what is trained forms two more groups, with the learning rate times `recipe.projection_lr`:
    matrices, and what has one dimension (biases, norms), which is not decayed.
    """
    of_adapter, matrices, others = [], [], []
    for name, parameter in adapter.named_parameters():
        if parameter.requires_grad:
            visual = matrices if parameter.dim() > 1 else others
            (of_adapter if "." not in name else visual).append(parameter)
    groups = [
        {"params": of_adapter, "lr_factor": 1.0, "weight_decay": recipe.weight_decay},
        {"params": matrices, "lr_factor": recipe.projection_lr, "weight_decay": recipe.weight_decay},
        {"params": others, "lr_factor": recipe.projection_lr, "weight_decay": 0.0},
    ]
    if not matrices and not others:  # the optimizer of checkpoints from before there was a visual part
        groups = [{"params": of_adapter}]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=recipe.betas, weight_decay=recipe.weight_decay)


def train(
    base: Llama,
    adapter: LlamaAdapter | Lora,
    samples: Sequence[Sample],
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    *,
    first_step: int = 0,
    stop: Callable[[], bool] = lambda: False,
    mixture: Mixture | None = None,
    world: World | None = None,
) -> Iterator[StepReport]:
    """Takes the optimizer steps from first_step to the recipe's last. Each item of the iterator is one step.

    The base must be frozen. A step's loss is the mean over all answer tokens of its samples, however many forward
    passes they take, so packing changes only rounding. `stop` is called after every pass. When it returns True, the
    unfinished step is dropped and the iterator ends: the parameters are those after the last step that was reported.
    mixture: which samples an epoch has; None = every one once. world: the processes that take each step together; they
    look at `stop` at its end.
    """
    world = world or World()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    mixture = mixture or Mixture.of([len(samples)])
    steps_per_epoch = recipe.steps_per_epoch(mixture.size)
    order: list[int] = []
    for step in range(first_step, recipe.epochs * steps_per_epoch):
        began = time.perf_counter()
        epoch, index = divmod(step, steps_per_epoch)
        if not order or index == 0:
            order = mixture.order(recipe.seed, epoch)
        chosen = [samples[i] for i in order[index * recipe.batch_size : (index + 1) * recipe.batch_size]]
        mine = _passes_of(chosen, recipe, world)
        num_answer_tokens = sum(map(count_answer_tokens, chosen))

        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for batch in mine:
            partial = batch_loss(base, adapter, batch, recipe.autocast) / num_answer_tokens
            partial.backward()
            loss += partial.item()
            if world.size == 1 and stop():
                return
        if world.size > 1:
            loss, stopped = _add_up(world, trained, adapter.gates, loss, stop())
            if stopped:
                return
        learning_rate = recipe.learning_rate(step / steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_factor", 1.0)
        layer_grad_norms = adapter.layer_gradient_norms()
        grad_norm = nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm or math.inf).item()
        for name, value in (("loss", loss), ("gradient's norm", grad_norm)):
            if not math.isfinite(value):  # a step would put it into the parameters and the next checkpoint
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
            num_tokens=sum(len(sample.tokens) - 1 for sample in chosen),
            seconds=time.perf_counter() - began,
            layer_grad_norms=layer_grad_norms,
            layer_gates=adapter.layer_gates(),
        )


def _passes_of(samples: Sequence[Sample], recipe: Recipe, world: World) -> list[Batch]:
    """The passes of this process for some samples. Where weights are sharded, all processes run layers together: those
    with fewer passes add some whose loss is 0.
    """
    shares = world.shares([len(sample.tokens) - 1 for sample in samples])
    mine = [samples[index] for index in shares[world.data_rank]]
    found = list(batches(mine, recipe.max_tokens, packed=recipe.packed))
    if world.shard:
        lengths = ([len(samples[index].tokens) - 1 for index in share] for share in shares)
        most = max(len(passes(share, recipe.max_tokens, recipe.packed)) for share in lengths)
        found += [_nothing_to_learn(samples[0], recipe.packed)] * (most - len(found))
    return found


def _nothing_to_learn(sample: Sample, packed: bool) -> Batch:
    short = Sample(sample.tokens[:2], 1, sample.images)
    batch = pack([short]) if packed else pad([short])
    return batch._replace(targets=torch.full_like(batch.targets, IGNORE), num_answer_tokens=0, num_tokens=0)


@torch.no_grad()
def _add_up(
    world: World, trained: Sequence[Tensor], gates: Tensor | None, loss: float, stop: bool
) -> tuple[float, bool]:
    """Adds up the gradients, the loss and whether to stop over all processes, in one all-reduce.

    Processes that share the heads of a pass have its loss each, and the gradients of its prompts, which the products
    with k and v added up already; of the gates, each has those of its own heads.
    """
    facts = torch.tensor([loss / world.tensor_parallel, float(stop)], device=trained[0].device)
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter is not gates:
            parameter.grad /= world.tensor_parallel
    world.sum([*(parameter.grad for parameter in trained if parameter.grad is not None), facts])
    return facts[0].item(), bool(facts[1])


def batch_loss(base: Llama, adapter: Adapter | None, batch: Batch, autocast: bool = False) -> Tensor:
    """The sum of -log p over the batch's answer tokens: a float32 scalar."""
    batch = batch.to(base.device)
    adapter = about_images(adapter, batch.images)
    with torch.autocast(base.device.type, torch.bfloat16, enabled=autocast):
        hidden = base.hidden_states(
            batch.tokens, adapter, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen
        )
        return answer_loss(hidden, batch.targets, base.output_weight, reduction="sum")


@torch.no_grad()
def evaluate(
    base: Llama,
    adapter: LlamaAdapter | Lora | None,
    samples: Sequence[Sample],
    recipe: Recipe,
    stop: Callable[[], bool] = lambda: False,
    report: Callable[[int, int], None] = lambda number, total: None,
    world: World | None = None,
) -> float:
    """The mean of -log p over the samples' answer tokens, in nats; nan if `stop`, called after every pass, is True.

    report: called before every pass with its number, from 1, and the number of passes.
    """
    world = world or World()
    loss, num_answer_tokens = 0.0, 0
    found = _passes_of(samples, recipe, world)
    for number, batch in enumerate(found, 1):
        report(number, len(found))
        loss += batch_loss(base, adapter, batch, recipe.autocast).item()
        num_answer_tokens += batch.num_answer_tokens
        if world.size == 1 and stop():
            return math.nan
    if world.size > 1:
        facts = torch.tensor([loss, num_answer_tokens, stop()], dtype=torch.float64, device=base.device)
        world.sum([facts])
        loss, num_answer_tokens = (
            facts[0].item(),
            facts[1].item(),
        )  # both count once for each share of the heads
        if facts[2]:
            return math.nan
    return loss / num_answer_tokens
