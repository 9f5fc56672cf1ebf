"""What can be measured, by name."""

from __future__ import annotations

from collections.abc import Callable

from ..runner import Job, Options
from . import attention, bars, decode, dropins, generate, memory, train, verify

SUITES: dict[str, Callable[[Options], list[Job]]] = {
    "attention": attention.jobs,
    "decode": decode.jobs,
    "memory": memory.jobs,
    "train": train.jobs,
    "generate": generate.jobs,
    "bars": bars.jobs,
    "dropins": dropins.jobs,
    "verify": verify.jobs,
}
