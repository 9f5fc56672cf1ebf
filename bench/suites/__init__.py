"""What can be measured, by name."""

from __future__ import annotations

from collections.abc import Callable

from ..runner import Job, Options
from . import attention, decode, generate, memory, train

SUITES: dict[str, Callable[[Options], list[Job]]] = {
    "attention": attention.jobs,
    "decode": decode.jobs,
    "memory": memory.jobs,
    "train": train.jobs,
    "generate": generate.jobs,
}
