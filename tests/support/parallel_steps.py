"""Steps of one adapter in several worlds: under torchrun, and alone for comparison.

torchrun --nproc-per-node 2 parallel_steps.py OUT plain shard tensor
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from tiny_runs import CONFIG, make_base

from model.adapter import LlamaAdapter
from model.data import Sample
from model.lora import Lora, LoraChoice
from model.parallel.divide import divide
from model.parallel.world import World, open_world
from model.recipe import Recipe
from model.train_loop import evaluate, make_optimizer, train
from zinit_kernels.console import run

RECIPE = Recipe(epochs=2, warmup_epochs=0, base_lr=0.5, batch_size=4, max_tokens=64)
MODES = {
    "plain": (1, False),
    "shard": (1, True),
    "tensor": (2, False),
    "both": (2, True),
    "padded": (1, True),
    "lora": (1, True),
}


def samples() -> list[Sample]:
    """Of very different lengths, so that processes have different numbers of passes."""
    generator = torch.Generator().manual_seed(1)
    lengths = (60, 50, 45, 9, 8, 7, 20, 3, 30)
    return [Sample(torch.randint(3, 131, (n,), generator=generator).tolist(), 2) for n in lengths]


def steps(world: World, mode: str) -> dict:
    """What each step reports, and the adapter after the last."""
    recipe = dataclasses.replace(RECIPE, packed=mode != "padded")
    base = make_base()
    adapter: LlamaAdapter | Lora
    if mode == "lora":
        adapter = Lora(base, LoraChoice(rank=2, targets=("q_proj", "down_proj")))
    else:
        adapter = LlamaAdapter(CONFIG, generator=torch.Generator().manual_seed(3))
        torch.nn.init.normal_(adapter.gates, generator=torch.Generator().manual_seed(4))
    optimizer = make_optimizer(adapter, recipe)
    base = divide(base, world, torch.device("cpu"))
    reports = [
        (report.loss, report.grad_norm, report.num_tokens, report.layer_grad_norms)
        for report in train(base, adapter, samples(), recipe, optimizer, world=world)
    ]
    loss = evaluate(base, adapter, samples(), recipe, world=world)
    return {"reports": reports, "loss": loss, "trained": dict(adapter.state_dict())}


def main() -> None:
    torch.set_num_threads(1)
    first = open_world("cpu")
    for mode in sys.argv[2:]:
        tensor_parallel, shard = MODES[mode]
        result = steps(dataclasses.replace(first, tensor_parallel=tensor_parallel, shard=shard), mode)
        torch.save(result, Path(sys.argv[1]) / f"{mode}.{first.rank}")
    first.close()


if __name__ == "__main__":
    run(main)
