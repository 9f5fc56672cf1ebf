"""What the fused backends share: autograd around their operators, and the calls that none of them takes.

Autograd sits outside the operators, in one `torch.autograd.Function`: `register_autograd` costs 11 us a call,
even under no_grad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import operators
from ..call import CALL, FLOATS, PUBLIC_TENSORS, AnyCall, CacheCall, Call, PromptCall, Saved
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
    return why_not_on_chip(call.query.device)


def why_not_on_chip(device: torch.device) -> str:
    """The reason why a device is no chip that the kernels for GPUs are written for."""
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


def why_misaligned(name: str, tensor: Tensor) -> str:
    """Why a tensor cannot be read 16 bytes at a time; '' if it can."""
    steps = [
        n * tensor.element_size() for n, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    ]
    if any(step % 16 for step in steps[:-1]):
        return f"the rows of {name} must start at multiples of 16 bytes, got strides {tensor.stride()}"
    if not torch.compiler.is_compiling() and tensor.data_ptr() % 16:
        return f"{name} must start at a multiple of 16 bytes, got address {tensor.data_ptr():#x}"
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
    return run("forward", backend, arguments)


def launched(
    call: KeptCall, addresses: list[int], tensors: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a kept call, differentiable in the public function's tensors, `PUBLIC_TENSORS`.

    Who looks at saved tensors sees the same ones at every call: a checkpoint compares those of a call that was checked
    with those of a kept one.
    """
    if _saved_tensors_hooks(True) is not None:
        operands = call.operands((*tensors, *_NOT_PUBLIC))
        return _Attention.apply(call.backend, lambda: call.plan.run(addresses), *operands)
    return _Launched.apply(call, addresses, *tensors)


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


# What may stand for an operator: a function of its arguments that returns its results, or None where it has to be
# called. A backend adds it where torch's dispatcher takes longer than the launch of its kernels.
DIRECT: dict[tuple[str, str], Callable[..., tuple[Tensor, ...] | None]] = {}
OPERATORS: dict[tuple[str, str], Any] = {
    (stage, backend): operators.operator(stage, backend)
    for backend, stages in operators.STAGES.items()
    for stage in stages
}


def run(stage: str, backend: str, arguments: tuple[Any, ...]) -> Any:
    """The results of an operator, or of what stands for it."""
    if not torch.compiler.is_compiling() and (direct := DIRECT.get((stage, backend))):
        found = direct(*arguments)
        if found is not None:
            return found
    return OPERATORS[stage, backend](*arguments)


_NOT_PUBLIC = (None,) * (len(CALL.specs) - len(PUBLIC_TENSORS))
# (True): the hooks that see what autograd saves, or None; True leaves out whether somebody traces
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


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
    def forward(
        ctx: Any, backend: str, launch: Callable[[], tuple[Tensor, ...]] | None, *arguments: Any
    ) -> tuple[Tensor, Tensor]:
        out, lse = run("forward", backend, arguments) if launch is None else launch()
        tensors, numbers = CALL.split(arguments)
        ctx.save_for_backward(out, lse, *tensors)
        ctx.backend, ctx.numbers = backend, numbers
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        _, _, *needed = ctx.needs_input_grad
        nothing = (None,) * len(needed)
        if grad_out is None and grad_lse is None:
            return None, None, *nothing
        out, lse, *tensors = ctx.saved_tensors
        wanted = needed[: len(CALL.differentiable)]
        grads = _gradients(ctx.backend, (*tensors, *ctx.numbers), wanted, grad_out, grad_lse, out, lse)
        return None, None, *grads, *nothing[len(grads) :]


class KeptCall(Protocol):
    """A call of the public function whose launches are kept."""

    @property
    def backend(self) -> str: ...
    @property
    def plan(self) -> Any:
        """.run(addresses) -> (out, lse)."""

    @property
    def gradients(self) -> Any:
        """A `triton.kept_gradients.Gradients`."""

    def operands(self, tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """The arguments of the operator, of its tensors as the public function was given them."""

    def without_rows(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients of the public function's tensors, of those of the operator's."""


class _Launched(torch.autograd.Function):
    """`_Attention` of a kept call. It takes the tensors of the public function: a view of each prompt table and of the
    gate, as the operator takes them, cost 7 us of autograd's engine each and 3 us of the forward."""

    @staticmethod
    def forward(
        ctx: Any, call: KeptCall, addresses: list[int], *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = call.plan.run(addresses)
        ctx.save_for_backward(out, lse, *tensors)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        if grad_out is None and grad_lse is None:
            return (None,) * len(needed)
        saved, call, key = (grad_out, grad_lse, *ctx.saved_tensors), ctx.call, None
        wanted = needed[2 : 2 + len(CALL.differentiable)]
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            grads, key = call.gradients.find(saved, wanted)
            if grads is not None:
                return None, None, *grads, None
        _, _, out, lse, *tensors = saved
        arguments = call.operands((*tensors, *_NOT_PUBLIC))
        grads = _gradients(call.backend, arguments, wanted, grad_out, grad_lse, out, lse)
        if key is not None:
            call.gradients.learn(key, saved, _operands(arguments, wanted, grad_out, grad_lse, out, lse))
        return None, None, *call.without_rows(grads), None


def _gradients(
    backend: str,
    arguments: tuple[Any, ...],
    wanted: Sequence[bool],
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> list[Tensor | None]:
    """The gradients of an operator's arguments, None where one is not wanted."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return formula.differentiable_gradients(Call(*arguments), wanted, grad_out, grad_lse)
    operands = _operands(arguments, wanted, grad_out, grad_lse, out, lse)
    grads = run("backward", backend, operands)
    return [grad if want else None for grad, want in zip(grads, wanted, strict=True)]


def _operands(
    arguments: tuple[Any, ...],
    wanted: Sequence[bool],
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Any, ...]:
    """The arguments of the backward operator."""
    saved = Saved(_dense(grad_out, out), None if grad_lse is None else grad_lse.contiguous(), out, lse)
    return (*saved, *arguments, sum(1 << i for i, want in enumerate(wanted) if want))


def _dense(grad_out: Tensor | None, out: Tensor) -> Tensor:
    if grad_out is None:
        return torch.zeros_like(out)
    return grad_out.contiguous() if grad_out.shape[-1] > 1 and grad_out.stride(-1) != 1 else grad_out
