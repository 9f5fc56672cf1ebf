"""What the machine itself can do, measured inside the same loop as everything else: its rate drifts by the minute."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MATRIX = {"cpu": 1024, "cuda": 8192}


def matrix_product(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Callable[[], object], float]:
    """A square torch.mm, and its floating-point operations."""
    size = MATRIX[torch.device(device).type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: torch.mm(a, b), 2.0 * size**3


def plain_read(*tensors: Tensor) -> Callable[[], object]:
    """Reads every byte once on all threads. As integers: a sum in bfloat16 is bound by arithmetic, a maximum over int64
    runs at the rate of a hand-written loop of 512-bit loads."""
    words = [tensor.flatten().view(torch.int64) for tensor in tensors]
    return lambda: [word.amax() for word in words]


def device_copy(num_bytes: int, device: torch.device) -> Callable[[], object]:
    """Moves `num_bytes` through the device's memory: half of them are read, half written."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
