"""The frozen base, divided among processes: its heads (tensor parallel), its weights (FSDP2), or both.

    divide(base, world, device)

Tensor parallel: q, k, v, gate and up hold the rows of their own heads or columns, and o and down the columns; DTensor
adds up their outputs. Prompts go through the same k and v, so their keys and values are divided by head too, and gates
are cut to the heads. Sharded: each layer's weights lie in equal parts on all processes, and are gathered while it
runs. What is trained, an adapter or a LoRA, is whole in every process: at 7B an adapter has 5 MB, and to gather it for
each layer would cost more than it saves.
"""

from __future__ import annotations

from typing import Any

import torch

from ..config import LlamaConfig
from ..errors import UserError
from ..llama import Llama
from .world import World


def check_division(config: LlamaConfig, world: World, batch_size: int, num_samples: int) -> None:
    """Raises UserError for a world that the model's heads or the samples cannot be divided among."""
    parts = world.tensor_parallel
    for name, heads in (("query heads", config.num_heads_q), ("key heads", config.num_heads_kv)):
        if heads % parts:
            raise UserError(f"--tensor-parallel {parts} does not divide the model's {heads} {name}.")
    if config.intermediate_size % parts:
        raise UserError(
            f"--tensor-parallel {parts} does not divide the model's intermediate size of {config.intermediate_size}."
        )
    for what, number in (("--batch-size", batch_size), ("the samples to train on:", num_samples)):
        if number < world.data_parallel:
            raise UserError(
                f"{what} {number} leaves some of the {world.data_parallel} data-parallel processes without a sample: "
                "start fewer."
            )


def divide(base: Llama, world: World, device: torch.device) -> Llama:
    """Divides the base among the processes, in place, and moves this one's part to its device."""
    if not world.divides:
        return base
    from torch.distributed import init_device_mesh

    mesh = init_device_mesh(
        device.type, (world.data_parallel, world.tensor_parallel), mesh_dim_names=("data", "tensor")
    )
    if world.tensor_parallel > 1:
        _divide_heads(base, mesh["tensor"], world)
    if world.shard:
        _shard(base, mesh["data"])
    return base.to(device)


def _divide_heads(base: Llama, mesh: Any, world: World) -> None:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
    plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    heads = base.config.num_heads_q // world.tensor_parallel
    for layer in base.layers:
        parallelize_module(layer, mesh, plan)
        layer.self_attn.heads = slice(heads * world.tensor_rank, heads * (world.tensor_rank + 1))


def _shard(base: Llama, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # of a LoRA, which is in the base: whole in every process, as an adapter is
    trained = {parameter for parameter in base.parameters() if parameter.requires_grad}
    for layer in base.layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    fully_shard(base, mesh=mesh, ignored_params=trained)
    register_fsdp_forward_method(base, "hidden_states")
