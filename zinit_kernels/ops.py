"""The registered operators behind one differentiable function per call form: fakes, autograd, the in-place
version bump.

One registered boundary per hot call: the operators are plain `define` + `impl`, and autograd sits outside
them in a `torch.autograd.Function`; `register_autograd` costs 11 us per call even under no_grad.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference, schemas
from .calls import CacheCall, Call

STAGES = {
    "cpu": ("forward", "backward", "decode"),
    "triton": ("forward", "backward", "decode"),
    "cuda": ("forward", "decode", "prompt"),
}
_OPERATORS: dict[tuple[str, str], Any] = {
    (stage, backend): getattr(torch.ops.zinit, f"{stage}_{backend}").default
    for backend, stages in STAGES.items()
    for stage in stages
}
INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # Triton's interpreter runs the kernels on CPU tensors


def attention(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of a canonical call by a fused backend, differentiable in its six tensors and through both outputs."""
    if records(call.query, call.key, call.value, call.prompt_key, call.prompt_value, call.gate):
        args = _flatten(call)
        return _Attention.apply(backend, *(_unaliased(args) if torch.compiler.is_compiling() else args))
    return _OPERATORS["forward", backend](*_flatten(call))


def attention_with_cache(call: CacheCall, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse), no gradient; the caches are written in place and their version counters move on."""
    # entering no_grad costs 1.5 us, so only where it is needed
    if records(call.query, call.new_key, call.new_value, call.prompt_key, call.prompt_value, call.gate):
        with torch.no_grad():
            return attention_with_cache(call, backend)
    out, lse = _OPERATORS["decode", backend](*call)
    if call.new_key is not None and not torch.compiler.is_compiling():
        for cache in (call.key_cache, call.value_cache):
            if not cache.is_inference():
                torch.autograd.graph.increment_version(cache)
    return out, lse


def add_prompt_branch(out: Tensor, call: Call, backend: str) -> None:
    """out [B, Hq, T, D] += the prompt branch of a canonical call, no gradient; its keys are not looked at."""
    _OPERATORS["prompt", backend](
        out, call.query, call.prompt_key, call.prompt_value, call.gate, call.prompt_index, call.cu_seqlens_q,
        call.max_seqlen_q, call.scale, call.tanh_gate,
    )  # fmt: skip
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _flatten(call: Call) -> tuple[Any, ...]:
    return (
        call.query, call.key, call.value, call.prompt_key, call.prompt_value, call.gate, call.prompt_index,
        call.key_bias, call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k,
        call.scale, call.window_left, call.window_right, call.tanh_gate,
    )  # fmt: skip


def _unaliased(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """dynamo refuses one tensor in two places of a Function, as key and value, or as both cu_seqlens."""
    seen: list[Tensor] = []
    for arg in args:
        seen.append(arg.view_as(arg) if torch.is_tensor(arg) and any(arg is other for other in seen) else arg)
    return tuple(seen)


def _unflatten(args: tuple[Any, ...]) -> Call:
    return Call._make((*args[:8], None, *args[8:]))


class _Attention(torch.autograd.Function):
    """Saves the inputs, `out` and `lse`, nothing of size T x S. An input that wants no gradient costs none."""

    @staticmethod
    def forward(ctx: Any, backend: str, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = _OPERATORS["forward", backend](*args)
        ctx.save_for_backward(*args[:10], out, lse)
        ctx.backend, ctx.numbers = backend, args[10:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        *inputs, out, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:7]
        if grad_out is None and grad_lse is None:
            return (None,) * 17
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            call = _unflatten((*inputs, *ctx.numbers))
            grads = reference.differentiable_gradients(call, wanted, grad_out, grad_lse)
        else:
            grads = _fused_backward(
                ctx.backend, (*inputs, *ctx.numbers), wanted, out, lse, grad_out, grad_lse
            )
        return None, *grads, *(None,) * 10


def _fused_backward(
    backend: str,
    args: tuple[Any, ...],
    wanted: tuple[bool, ...],
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
) -> list[Tensor | None]:
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if grad_out.shape[-1] > 1 and grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    needs = sum(1 << i for i, want in enumerate(wanted) if want)
    query, key, value, *rest = args
    grads = _OPERATORS["backward", backend](grad_out, grad_lse, query, key, value, out, lse, *rest, needs)
    return [grad if want else None for grad, want in zip(grads, wanted, strict=True)]


def _token_major(tensor: Tensor) -> Tensor:
    batch, heads, seqlen, head_dim = tensor.shape
    return tensor.new_empty((batch, seqlen, heads, head_dim)).transpose(1, 2)


def _forward_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _token_major(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    prompt_key: Tensor | None,
    prompt_value: Tensor | None,
    gate: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    needs = rest[-1]
    grads = []
    for i, tensor in enumerate((query, key, value, prompt_key, prompt_value, gate)):
        if tensor is None or not needs >> i & 1:
            grads.append(query.new_empty((0,), dtype=torch.float32))
        else:
            grads.append(_token_major(tensor) if i < 3 else tensor.new_empty(tensor.shape))
    return tuple(grads)


def _decode_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, seqlen, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, seqlen), dtype=torch.float32)


_FAKES: dict[str, Callable[..., Any]] = {
    "forward": _forward_fake,
    "backward": _backward_fake,
    "decode": _decode_fake,
    "prompt": lambda *args: None,
}


def _register_fake(stage: str, backend: str) -> None:
    """The dispatcher calls a fake as soon as one argument is a meta tensor. Beside tensors with memory that is refused:
    the output would be allocated on their device, and no kernel would write it."""
    names = [argument.name for argument in _OPERATORS[stage, backend]._schema.arguments]

    def fake(*args: Any) -> Any:
        first, *rest = [(name, arg) for name, arg in zip(names, args, strict=True) if torch.is_tensor(arg)]
        for name, arg in rest:
            if arg.device != first[1].device:
                raise RuntimeError(
                    f"{name} must be on the device of {first[0]}, {first[1].device}, got {arg.device}"
                )
        return _FAKES[stage](*args)

    torch.library.register_fake(f"{schemas.NAMESPACE}::{stage}_{backend}", fake, lib=schemas.library)


for _backend, _stages in STAGES.items():
    for _stage in _stages:
        _register_fake(_stage, _backend)


def _register_triton(stage: str) -> None:
    """The Triton kernels are imported by the first call: importing the package needs no Triton."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(".backends.triton.launch", __package__), stage)(*args)

    for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        schemas.library.impl(f"{stage}_triton", run, key)


for _stage in STAGES["triton"]:
    _register_triton(_stage)
