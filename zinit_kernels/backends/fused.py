"""What the fused backends share: autograd around their operators, and the calls that none of them takes.

Autograd sits outside the operators, in one `torch.autograd.Function`: `register_autograd` costs 11 us a call,
even under no_grad.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import operators
from ..call import CALL, FLOATS, AnyCall, CacheCall, Call, PromptCall, Saved
from ..values import why_transformed
from . import formula

MAX_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)


def why_not(call: AnyCall) -> str:
    """The reason why no fused backend runs a call; '' if some may."""
    query = call.query
    if reason := why_transformed():
        return reason
    if query.dtype == torch.float64:
        return "the fused kernels compute in float32, the tensors are float64"
    if not 1 <= query.shape[-1] <= MAX_HEAD_DIM:
        return f"head_dim must be 1 to {MAX_HEAD_DIM}, got {query.shape[-1]}"
    if call.prompt_key is not None and call.prompt_value is not None:
        dtype = call.prompt_key.dtype
        if dtype != call.prompt_value.dtype:
            return f"both prompt tables must have one dtype, got {dtype} and {call.prompt_value.dtype}"
        if dtype not in FLOATS:
            return f"prompts must be float32, bfloat16 or float16, got {dtype}"
    if isinstance(call, Call) and call.dense_mask is not None:
        return "attn_mask depends on the query (or requires grad); only key-padding masks [B, S] are fused"
    return ""


def why_not_on_gpu(call: AnyCall) -> str:
    """The reason why the tensors are on no chip that the kernels for GPUs are written for."""
    device = call.query.device
    if device.type != "cuda":
        return f"the tensors are on {device}"
    return _why_not_chip(device.index)


_chips: dict[int, tuple[str, int]] = {}  # device -> its name, and 90 for sm_90


def _chip(index: int) -> tuple[str, int]:
    """A GPU's name and number; ("", 0) where there is none."""
    if index not in _chips:
        if torch.cuda.device_count() == 0:
            return "", 0
        found = torch.cuda.get_device_properties(index)
        _chips[index] = found.name, 10 * found.major + found.minor
    return _chips[index]


# what torch.compiler.assume_constant_result does: dynamo cannot trace the questions; importing it takes seconds
_chip._dynamo_marked_constant = True  # type: ignore[attr-defined]


def arch_of(device: torch.device) -> int:
    """90 for sm_90, asked once per device: torch takes 4 us to answer. 0 on a CPU, on AMD chips, and without a GPU."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    return _chip(device.index)[1]


def _why_not_chip(index: int) -> str:
    name, arch = _chip(index)
    if not arch:  # fake tensors may be on a device that is not there
        return f"the tensors are on cuda:{index}, and torch finds no NVIDIA GPU"
    if arch < 10 * MIN_CAPABILITY[0] + MIN_CAPABILITY[1]:
        return f"{name} is sm_{arch}; the kernels are written for sm_80 and newer"
    return ""


def attention(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse) by a backend's operator, differentiable in the call's differentiable tensors."""
    return attention_of(backend, *CALL.arguments(call))


def attention_of(backend: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    """`attention` of the operator's arguments."""
    if requires_grad(arguments[: len(CALL.differentiable)]):
        if torch.compiler.is_compiling():
            arguments = _unaliased(arguments)
        return _Attention.apply(backend, None, *arguments)
    return OPERATORS["forward", backend](*arguments)


def launched(backend: str, launch: Launch, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """`attention_of` with gradients, where `launch` stands for the forward operator with these arguments."""
    return _Attention.apply(backend, launch, *arguments)


def attention_with_cache(call: CacheCall, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse), no gradient; the caches are written in place and their version counters move on."""
    written = () if call.new_key is None else (call.key_cache, call.value_cache)
    # entering no_grad costs 1.5 us, so only where it is needed
    if requires_grad(call):
        with torch.no_grad():
            return decode(OPERATORS["decode", backend], call, written)
    return decode(OPERATORS["decode", backend], call, written)


def decode(
    operator: Callable[..., tuple[Tensor, Tensor]], arguments: tuple[Any, ...], written: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """A cache operator's (out, lse); autograd learns which caches it has written."""
    result = operator(*arguments)
    if written and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(written)
    return result


def add_prompt_branch(call: PromptCall, backend: str) -> None:
    """By the backend's own operator, no gradient."""
    OPERATORS["prompt", backend](*call)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(call.out)


def requires_grad(arguments: tuple[Any, ...]) -> bool:
    """Whether autograd would record an operation on these arguments."""
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


Launch = Callable[[], tuple[Tensor, ...]]
# What may stand for an operator: a function of its arguments that returns its results, or None where it has to be
# called. A backend adds it where torch's dispatcher takes longer than the launch of its kernels.
DIRECT: dict[tuple[str, str], Callable[..., tuple[Tensor, ...] | None]] = {}
OPERATORS: dict[tuple[str, str], Any] = {
    (stage, backend): operators.operator(stage, backend)
    for backend, stages in operators.STAGES.items()
    for stage in stages
}


def _unaliased(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """dynamo refuses one tensor in two places of a Function, as key and value, or as both cu_seqlens."""
    seen: list[Tensor] = []
    for argument in arguments:
        repeated = torch.is_tensor(argument) and any(argument is other for other in seen)
        seen.append(argument.view_as(argument) if repeated else argument)
    return tuple(seen)


class _Attention(torch.autograd.Function):
    """Saves the tensors, `out` and `lse`, nothing of size T x S. An input that wants no gradient costs none."""

    @staticmethod
    def forward(ctx: Any, backend: str, launch: Launch | None, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = OPERATORS["forward", backend](*arguments) if launch is None else launch()
        tensors, numbers = CALL.split(arguments)
        ctx.save_for_backward(out, lse, *tensors)
        ctx.backend, ctx.numbers = backend, numbers
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        _, _, *needed = ctx.needs_input_grad
        wanted = needed[: len(CALL.differentiable)]
        nothing = (None,) * len(needed)
        if grad_out is None and grad_lse is None:
            return None, None, *nothing
        out, lse, *tensors = ctx.saved_tensors
        arguments = (*tensors, *ctx.numbers)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = formula.differentiable_gradients(Call(*arguments), wanted, grad_out, grad_lse)
        else:
            saved = Saved(
                _dense(grad_out, out), None if grad_lse is None else grad_lse.contiguous(), out, lse
            )
            grads = _gradients(ctx.backend, saved, arguments, wanted)
        return None, None, *grads, *nothing[len(grads) :]


def _dense(grad_out: Tensor | None, out: Tensor) -> Tensor:
    if grad_out is None:
        return torch.zeros_like(out)
    return grad_out.contiguous() if grad_out.shape[-1] > 1 and grad_out.stride(-1) != 1 else grad_out


def _gradients(
    backend: str, saved: Saved, arguments: tuple[Any, ...], wanted: list[bool]
) -> list[Tensor | None]:
    needs = sum(1 << i for i, want in enumerate(wanted) if want)
    operands = (*saved, *arguments, needs)
    grads = None
    if not torch.compiler.is_compiling() and (direct := DIRECT.get(("backward", backend))):
        grads = direct(*operands)
    if grads is None:
        grads = OPERATORS["backward", backend](*operands)
    return [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
