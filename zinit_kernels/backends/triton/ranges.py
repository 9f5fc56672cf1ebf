"""Named ranges around kernel launches, for profilers; a call that nobody profiles pays one flag's reading."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch

# a torch without CUDA has no NVTX, and says so by raising
_NVTX = os.environ.get("ZINIT_NVTX") == "1" and torch.version.cuda is not None


def named(name: str) -> AbstractContextManager[object]:
    """A `record_function` range under torch.profiler, an NVTX range for Nsight with ZINIT_NVTX=1."""
    if _NVTX:
        return torch.cuda.nvtx.range(f"zinit.{name}")
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(f"zinit.{name}")
    return nullcontext()


def is_profiled() -> bool:
    """Whether `named` opens ranges now."""
    return _NVTX or torch.autograd._profiler_enabled()
