"""The CUDA kernels (`csrc/cuda`): inference on NVIDIA GPUs from sm_80 on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import AnyCall, CacheCall, Call, PromptCall
from . import extension, fused

CHECKS_VALUES = False  # kernels clamp; the host would have to wait for the device
UNAVAILABLE = extension.why_unavailable("cuda")
HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_DECODE_TOKENS = 16  # more are attention on tensor cores


def why_not(call: AnyCall, return_lse: bool) -> str:
    return (
        UNAVAILABLE
        or fused.why_not_on_gpu(call)
        or _why_not_built_for(call.query.device.index)
        or _why_not_kernels(call)
        or fused.why_not(call)
    )


_built_for: dict[int, str] = {}  # device -> the reason why its chip does not take the library's machine code


def _why_not_built_for(index: int | None) -> str:
    """The reason why a GPU, or its driver, does not take the machine code of the library."""
    if index is None:  # a CPU: its tests put an emulator here
        return ""
    if index not in _built_for:
        chip = torch.cuda.get_device_properties(index)
        build, number = extension.cuda_build(), 10 * chip.major + chip.minor
        _built_for[index] = build.why_not_on(number, extension.driver_version())
    return _built_for[index]


# what torch.compiler.assume_constant_result does: dynamo cannot trace the questions; importing it takes seconds
_why_not_built_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _why_not_kernels(call: AnyCall) -> str:
    query = call.query
    if query.shape[-1] not in HEAD_DIMS:
        return f"head_dim must be one of {HEAD_DIMS}, got {query.shape[-1]}"
    read = {"query": query}
    on_tensor_cores = True
    if isinstance(call, CacheCall):
        tokens = max(query.shape[1], 0 if call.new_key is None else call.new_key.shape[1])
        on_tensor_cores = tokens > MAX_DECODE_TOKENS
        read = {"k_cache": call.key_cache, "v_cache": call.value_cache}
        if on_tensor_cores:
            read["q"] = query
    else:
        if fused.requires_grad(call):
            return (
                "the CUDA kernels have no backward: call them under torch.no_grad(), or use backend='triton'"
            )
        if isinstance(call, PromptCall):
            if call.out.dtype != query.dtype:
                return f"out must have the dtype that q gets under torch.autocast, {query.dtype}, got {call.out.dtype}"
            read["out"] = call.out
        else:
            read |= {"key": call.key, "value": call.value}
    if query.dtype == torch.float32 and on_tensor_cores:
        return (
            f"its attention of more than {MAX_DECODE_TOKENS} tokens runs on tensor cores, which take bfloat16 and "
            "float16; the tensors are float32 (backend='triton' takes them)"
        )
    return next(filter(None, (fused.why_misaligned(name, tensor) for name, tensor in read.items())), "")


def attention(call: Call) -> tuple[Tensor, Tensor]:
    return fused.attention(call, "cuda")


def attention_with_cache(call: CacheCall) -> tuple[Tensor, Tensor]:
    return fused.attention_with_cache(call, "cuda")


def add_prompt_branch(call: PromptCall) -> None:
    fused.add_prompt_branch(call, "cuda")
