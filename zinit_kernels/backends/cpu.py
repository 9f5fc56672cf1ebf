"""The C++ kernels for CPUs (`csrc/cpu`)."""

from __future__ import annotations

from torch import Tensor

from ..call import AnyCall, CacheCall, Call, PromptCall
from . import extension, fused

CHECKS_VALUES = True
UNAVAILABLE = extension.why_unavailable("cpu")
warn_unavailable = extension.warn_without_cpu_kernels


def why_not(call: AnyCall, return_lse: bool) -> str:
    return UNAVAILABLE or _why_not_here(call) or fused.why_not(call)


def _why_not_here(call: AnyCall) -> str:
    device = call.query.device
    return "" if device.type == "cpu" else f"the tensors are on {device}"


def attention(call: Call) -> tuple[Tensor, Tensor]:
    return fused.attention(call, "cpu")


def attention_with_cache(call: CacheCall) -> tuple[Tensor, Tensor]:
    return fused.attention_with_cache(call, "cpu")


def add_prompt_branch(call: PromptCall) -> None:
    call.out.add_(attention(call.attention())[0])
