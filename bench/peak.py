"""The most memory that a call takes beyond what was there before it."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

# freed memory goes back at once, so that resident memory is what is in use
RETURN_AT_ONCE = (
    "glibc.malloc.mmap_threshold=65536:glibc.malloc.trim_threshold=65536:glibc.malloc.arena_max=1"
)


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Bytes at the worst moment of a call, beyond those in use before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    call()
    return resident("VmHWM") - before


def in_fresh_process(function: Callable[..., Any], *arguments: object, malloc: str = RETURN_AT_ONCE) -> Any:
    """function(*arguments) in a process whose malloc is told so when it starts; its exceptions are raised here."""
    saved = os.environ.get("GLIBC_TUNABLES")
    os.environ["GLIBC_TUNABLES"] = malloc
    try:
        # Ctrl-C reaches it too: it dies of that without a word, and the caller says what is kept
        quietly = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), **quietly) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        if saved is None:
            del os.environ["GLIBC_TUNABLES"]
        else:
            os.environ["GLIBC_TUNABLES"] = saved
