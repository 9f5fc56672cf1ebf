"""The Triton kernels: NVIDIA GPUs from sm_80 on, and CPUs under Triton's interpreter.

Triton is imported by the first call, so the package imports without it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ... import operators
from ...call import CACHE_CALL, CALL, AnyCall, CacheCall, Call, PromptCall
from .. import fused
from . import configs

CHECKS_VALUES = False  # kernels clamp; the host would have to wait for the device
INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # Triton's interpreter runs the kernels on CPU tensors


def _why_unavailable() -> str:
    try:
        found = importlib.util.find_spec("triton") is not None
    except ImportError:
        found = False
    return "" if found else "triton is not installed: pip install triton"


UNAVAILABLE = _why_unavailable()


def why_not(call: AnyCall, return_lse: bool) -> str:
    return UNAVAILABLE or _why_not_here(call) or fused.why_not(call) or _why_too_large(call)


def _why_not_here(call: AnyCall) -> str:
    if call.query.device.type != "cpu":
        return fused.why_not_on_gpu(call)
    return "" if INTERPRETED else "the tensors are on cpu (Triton's interpreter needs TRITON_INTERPRET=1)"


def _why_too_large(call: AnyCall) -> str:
    """Of Triton's tiles on the call's chip; the interpreter has no shared memory."""
    query = call.query
    if call.prompt_key is None or query.device.type != "cuda" or torch.version.hip:
        return ""
    cached = isinstance(call, CacheCall)
    prompt_length = call.prompt_key.shape[1 if cached else 2]
    backward = not cached and fused.requires_grad(call)
    arch = fused.arch_of(query.device)
    ask = configs.find_why_too_large if torch.compiler.is_compiling() else configs.why_too_large
    return ask(query.shape[-1], prompt_length, query.element_size(), arch, cached, backward)


def attention(call: Call) -> tuple[Tensor, Tensor]:
    return fused.attention(call, "triton")


def attention_with_cache(call: CacheCall) -> tuple[Tensor, Tensor]:
    return fused.attention_with_cache(call, "triton")


def add_prompt_branch(call: PromptCall) -> None:
    call.out.add_(attention(call.attention())[0])


def _implement(stage: str) -> None:
    def run(*arguments: Any) -> Any:
        return getattr(importlib.import_module(".launch", __name__), stage)(*arguments)

    operators.implement(stage, "triton", run, ("CUDA", "CPU") if INTERPRETED else ("CUDA",))


def _backward(*arguments: Any) -> Any:
    """Kept launches of a backward. Triton was imported by its forward."""
    return _kept().direct("backward", arguments[0], arguments)


def plan_of(call: Call | CacheCall) -> Any:
    """The kept launches of a call's forward or of its decoding; None where there are none."""
    if isinstance(call, CacheCall):
        return _kept().plan_of("decode", CACHE_CALL.arguments(call))
    return _kept().plan_of("forward", CALL.arguments(call))


def gradients_of(without_rows: tuple[int, ...]) -> Any:
    """An empty `kept_gradients.Gradients`."""
    return importlib.import_module(".kept_gradients", __name__).Gradients(without_rows)


def may_be_kept(query: Tensor) -> bool:
    """Whether kept launches may run now: nobody has to see them beside Triton, and the device is the current one."""
    return bool(_kept().may_be_kept(query))


@functools.cache
def _kept() -> Any:
    """Imports Triton."""
    return importlib.import_module(".kept", __name__)


fused.DIRECT["backward", "triton"] = _backward
for _stage in operators.STAGES["triton"]:
    _implement(_stage)
