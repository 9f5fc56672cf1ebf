"""The processes of one run, as `torchrun` starts them.

world = open_world("cpu", tensor_parallel=1)
world.is_first                          # the one process that writes
mine = world.share(lengths)             # which samples of a step this process computes
world.sum(tensors)                      # one all-reduce, in place

D x T processes: T of them compute one pass together, each with its share of the heads, and D such groups compute
different samples. Every process knows the whole step, so nothing has to be agreed on but the sums.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from zinit_kernels.console import end_at_once

from ..errors import UserError

_JOIN = 180.0  # seconds until all processes have found each other
_TIMEOUT = timedelta(minutes=10)  # a process that hangs; one that ends is noticed at once


@dataclass(frozen=True)
class World:
    """The place of this process among all."""

    rank: int = 0
    size: int = 1
    tensor_parallel: int = 1
    shard: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    @property
    def data_parallel(self) -> int:
        """Groups of processes with samples of their own."""
        return self.size // self.tensor_parallel

    @property
    def data_rank(self) -> int:
        """The group of this process."""
        return self.rank // self.tensor_parallel

    @property
    def tensor_rank(self) -> int:
        """The place of this process in its group."""
        return self.rank % self.tensor_parallel

    @property
    def divides(self) -> bool:
        """Whether a process has a part of the base alone."""
        return self.shard or self.tensor_parallel > 1

    def describe(self) -> dict[str, object]:
        """What another world changes: rounding alone. Empty for one process."""
        if self.size == 1:
            return {}
        return {"processes": self.size, "tensor parallel": self.tensor_parallel, "sharded": self.shard}

    def shares(self, lengths: Sequence[int]) -> list[list[int]]:
        """The samples of a step, divided among the groups so that each has about as many tokens: the longest first,
        each to the group with the fewest. Within a share they keep their order.
        """
        if self.data_parallel == 1:
            return [list(range(len(lengths)))]
        shares: list[list[int]] = [[] for _ in range(self.data_parallel)]
        tokens = [0] * self.data_parallel
        for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
            group = min(range(self.data_parallel), key=lambda group: (tokens[group], group))
            shares[group].append(index)
            tokens[group] += lengths[index]
        return [sorted(share) for share in shares]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Adds up each tensor over all processes, in place and in one bucket."""
        if self.size == 1:
            return
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
        bucket = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])
        distributed.all_reduce(bucket)
        start = 0
        for tensor in tensors:
            tensor.detach().copy_(bucket[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.size == 1:
            return flag
        found = torch.tensor(float(flag))
        distributed.all_reduce(found)
        return bool(found)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            distributed.barrier()

    def close(self) -> None:
        """Leaves the group."""
        if self.size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()


def open_world(device: str, tensor_parallel: int = 1, shard: bool = False) -> World:
    """Joins the processes that torchrun's variables name; one process alone without them.

    Raises UserError for options that such a world cannot have.
    """
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    if tensor_parallel < 1 or size % tensor_parallel:
        raise UserError(
            f"--tensor-parallel {tensor_parallel} does not divide the {size} process{'es' * (size > 1)}: start a "
            "multiple of it by torchrun --nproc-per-node."
        )
    if size == 1:
        if shard:
            raise UserError(
                "--shard divides the base among processes, and there is one: start more by torchrun."
            )
        return World()
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(_number("LOCAL_RANK", 0))
    end_at_once()
    with _ends_after(_JOIN):
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        distributed.init_process_group(
            backend, store=_store(rank, size), rank=rank, world_size=size, timeout=_TIMEOUT
        )
        world = World(rank, size, tensor_parallel, shard)
        world.wait()
    return world


def _store(rank: int, size: int) -> distributed.Store:
    """Where the processes tell each other their addresses.

    On one machine torchrun keeps it between restarts (torch 2.13, static rendezvous), with the addresses of processes
    that are dead: each restart has keys of its own. Of several machines each counts its own restarts, and a c10d
    rendezvous makes a new one for each.
    """
    store, _, _ = next(distributed.rendezvous("env://", rank, size, timeout=_TIMEOUT))
    if _number("GROUP_WORLD_SIZE", 1) > 1:
        return store
    return distributed.PrefixStore(f"restart {_number('TORCHELASTIC_RESTART_COUNT', 0)}", store)


@contextmanager
def _ends_after(seconds: float) -> Iterator[None]:
    """Ends the process if the block takes longer, so that torchrun starts all of them again.

    gloo may wait for ever, whatever its timeout, where a process that it connects to goes meanwhile.
    """

    def end() -> None:
        sys.stderr.write(f"error: the processes of this run did not find each other within {seconds:g} s.\n")
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def local_device(name: str) -> str:
    """The device of this process: of several GPUs, the one that torchrun gives it."""
    return f"cuda:{_number('LOCAL_RANK', 0)}" if _number("WORLD_SIZE", 1) > 1 and name == "cuda" else name


def _number(name: str, default: int) -> int:
    """A variable of torchrun; the default where another program set it to something else."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default
