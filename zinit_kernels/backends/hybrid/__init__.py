"""The vendor's attention for the tokens, our own kernels for the prompts: NVIDIA GPUs from sm_80 on.

Where sequences are long, the prompts are a small part of the work, and on Hopper and Blackwell the vendor's kernels
(cuDNN's, flash-attention's) are expected to be faster than ours. So the tokens are left to them, forward and
backward, and Triton kernels add the gated prompt term in place. At gate 0 the output has the bits of the vendor's
attention.

auto takes it where `zinit tune` has measured on this chip that it is the fastest, and never before. On a CPU it runs
under Triton's interpreter, for the tests.

Two promises of the fused backends do not hold here, because the vendor does not make them. Its backward gives the same
bits every time only under `torch.use_deterministic_algorithms(True)`; the prompts' and gates' gradients always have
one order. A key or value that is NaN may reach a query of the same tile that does not see it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import operators
from ...call import AnyCall, CacheCall, Call, PromptCall
from ...call_keys import is_plain_state
from .. import fused, triton

CHECKS_VALUES = False  # the prompt kernels clamp; the host would have to wait for the device
_FLASH_IS_BUILT = torch.backends.cuda.is_flash_attention_available()
_LARGEST_GRID = 65535  # blocks in the second and third dimension of a launch
# (192, 224]: flash-attention has no backward for these head dimensions on the chips with 99 KB of shared memory
_NO_BACKWARD = range(193, 225)
_HAS_ALL_BACKWARDS = (80, 90, 100, 103)


def why_not(call: AnyCall, return_lse: bool) -> str:
    if not isinstance(call, Call):
        return "it takes whole sequences; a cache and the prompt branch alone stay with the fused kernels"
    return (
        triton.why_not(call, return_lse)
        or _why_not_vendor(call, return_lse)
        or _why_not_on_chip(call, call.query.device.type)
    )


def _why_not_vendor(call: Call, return_lse: bool) -> str:
    """The reason why PyTorch's attention kernels do not compute the tokens' part of a call."""
    seqlen_q, seqlen_k = call.query.shape[2], call.key.shape[2]
    if call.cu_seqlens_q is not None:
        return "the vendor's attention is called for sequences of one length, these are packed"
    if call.sinks is not None:
        return "the vendor's attention has no sinks"
    if call.softcap:
        return "the vendor's attention has no soft cap"
    if call.key_bias is not None:
        return "the vendor's attention takes no mask but the causal one, and there is a key-padding mask"
    if call.window_left >= 0 or call.window_right > 0:
        return f"the vendor's attention has no window, got {(call.window_left, call.window_right)}"
    if call.window_right == 0 and seqlen_q != seqlen_k:
        return (
            "the vendor aligns a causal mask at the first key, this function at the last one: as many queries as keys, "
            f"got {seqlen_q} and {seqlen_k}"
        )
    if call.scale <= 0:
        return f"the vendor's attention takes a scale above 0, got {call.scale}"
    if 0 in (*call.query.shape, seqlen_k):
        sequences = call.query.shape[0]
        return f"there must be some, got {seqlen_q} queries and {seqlen_k} keys of {sequences} sequences"
    if return_lse and fused.requires_grad(call):
        return "the vendor's backward takes no gradient of the log-sum-exp (backend='triton' does)"
    return ""


def _why_not_on_chip(call: Call, device: str) -> str:
    """What holds on a GPU alone: types, sizes and addresses. device: the type of the tensors' one."""
    query = call.query
    if device == "cpu":
        return ""
    if torch.version.hip:
        return "it was not tried on AMD GPUs"
    if not _FLASH_IS_BUILT:
        return f"torch {torch.__version__} was built without flash-attention"
    if query.dtype == torch.float32:
        return "the vendor's attention takes bfloat16 and float16, the tensors are float32"
    head_dim = query.shape[3]
    if head_dim % 8:
        return f"the vendor's attention takes a head_dim that is a multiple of 8, got {head_dim}"
    arch = fused.arch_of(query.device)
    if head_dim in _NO_BACKWARD and arch not in _HAS_ALL_BACKWARDS and fused.requires_grad(call):
        return f"flash-attention has no backward for head_dim 193 to 224 on sm_{arch}, got {head_dim}"
    if max(query.shape[:2]) > _LARGEST_GRID:
        return f"the vendor's attention takes up to {_LARGEST_GRID} sequences and heads, got {tuple(query.shape[:2])}"
    read = {"query": query, "key": call.key, "value": call.value}
    return next(filter(None, (fused.why_misaligned(name, tensor) for name, tensor in read.items())), "")


def attention(call: Call) -> tuple[Tensor, Tensor]:
    return fused.attention(call, "hybrid")


def attention_with_cache(call: CacheCall) -> tuple[Tensor, Tensor]:
    raise ValueError(f"backend 'hybrid' cannot run this call: {why_not(call, False)}")


def add_prompt_branch(call: PromptCall) -> None:
    raise ValueError(f"backend 'hybrid' cannot run this call: {why_not(call, False)}")


@functools.cache
def _function(stage: str) -> Callable[..., Any]:
    """Imports Triton."""
    found: Callable[..., Any] = getattr(importlib.import_module(".run", __name__), stage)
    return found


def _implement(stage: str) -> None:
    def run(*arguments: Any) -> Any:
        return _function(stage)(*arguments)

    def run_directly(*arguments: Any) -> Any:
        """Without torch's dispatcher, which takes 10 us; None where it has to see the operator."""
        if is_plain_state() and triton.may_be_kept(arguments[0]):
            return run(*arguments)
        return None

    operators.implement(stage, "hybrid", run, ("CUDA", "CPU") if triton.INTERPRETED else ("CUDA",))
    fused.DIRECT[stage, "hybrid"] = run_directly


for _stage in operators.STAGES["hybrid"]:
    _implement(_stage)
