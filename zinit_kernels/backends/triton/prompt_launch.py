"""Launches of the kernels that add the prompt term to another attention: `prompt_terms`. Torch on the host side.

A launch is kept like those of the other stages (`kept`), so the next call of its kind takes microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ...call import CALL, Call
from ...call_keys import key_function
from . import configs, kept
from .configs import block_of
from .kept import Recorder
from .operands import addressable, arch_of, prompt_operands, view_of
from .primitives import LOG2E
from .prompt_terms import zinit_add_prompt_grad_query_kernel, zinit_add_prompts_kernel
from .ranges import named

_OUTPUT, _GRAD_QUERY = "prompt_output", "prompt_grad_query"
_INPUTS = ("query", "key", "prompt_key", "prompt_value", "gate", "prompt_index")
_NUMBERS = ("scale", "tanh_gate")
_OPTIONAL = {"prompt_index", "target"}
kept.key_of[_OUTPUT] = key_function(
    (*_INPUTS, "source", "target"), _OPTIONAL, (*_NUMBERS, "subtracts"), False
)
kept.key_of[_GRAD_QUERY] = key_function(
    (*_INPUTS, "grad_out", "source", "target"), _OPTIONAL, _NUMBERS, False
)
assert set((*_INPUTS, *_NUMBERS)) <= set(CALL.names)


def add_prompts(call: Call, source: Tensor, target: Tensor | None = None, subtracts: bool = False) -> Tensor:
    """source plus the prompt term of a call, or minus it; into `target`, or in place. Both [B, Hq, T, D]."""
    arguments = (*_given(call, _INPUTS), source, target, *_given(call, _NUMBERS), subtracts)
    kept.run(_OUTPUT, call.query, arguments, _add_prompts)
    return source if target is None else target


def add_grad_query(call: Call, grad_out: Tensor, source: Tensor, target: Tensor | None = None) -> Tensor:
    """source plus the prompts' part of the query's gradient; into `target`, or in place. All [B, Hq, T, D]."""
    arguments = (*_given(call, _INPUTS), grad_out, source, target, *_given(call, _NUMBERS))
    kept.run(_GRAD_QUERY, call.query, arguments, _add_grad_query)
    return source if target is None else target


def _given(call: Call, names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(getattr(call, name) for name in names)


def _add_prompts(recorder: Recorder, *arguments: Any) -> Sequence[Tensor | None]:
    *inputs, source, target, scale, tanh_gate, subtracts = arguments
    call = _call(inputs, scale, tanh_gate)
    sizes = {"scale_log2": scale * LOG2E.value}
    _launch(recorder, zinit_add_prompts_kernel, call, (), source, target, sizes, {"SUBTRACT": subtracts})
    return ()


def _add_grad_query(recorder: Recorder, *arguments: Any) -> Sequence[Tensor | None]:
    *inputs, grad_out, source, target, scale, tanh_gate = arguments
    call = _call(inputs, scale, tanh_gate)
    sizes = {"scale": scale, "scale_log2": scale * LOG2E.value}
    read = (("grad_out", addressable(grad_out)),)
    _launch(recorder, zinit_add_prompt_grad_query_kernel, call, read, source, target, sizes, {})
    return ()


def _call(inputs: Sequence[Any], scale: float, tanh_gate: bool) -> Call:
    given = dict(zip(_INPUTS, inputs, strict=True))
    return Call(**given, value=given["key"], scale=scale, tanh_gate=tanh_gate)


def _launch(
    recorder: Recorder,
    kernel: Any,
    call: Call,
    read: Sequence[tuple[str, Tensor]],
    source: Tensor,
    target: Tensor | None,
    sizes: dict[str, float],
    options: dict[str, Any],
) -> None:
    """Launches a kernel; what it is given stands in the order of its parameters."""
    query = call.query
    batch, heads_q, seqlen, head_dim = query.shape
    prompts = prompt_operands(call)
    block_p = prompts["BLOCK_P"]
    config = configs.candidates(
        "prompt_gradients", block_of(head_dim), block_p, query.element_size(), arch_of(query)
    )[0]
    table = ("prompt_key", "prompt_value", "gate_ptr", "prompt_index_ptr")
    arguments = {
        "query": view_of(addressable(query)),
        **{name: prompts[name] for name in table},
        **{name: view_of(tensor) for name, tensor in read},
        "source": view_of(source),
        "target": view_of(source if target is None else target),
        "num_heads_q": heads_q,
        "num_heads_kv": call.key.shape[1],
        "seqlen_q": seqlen,
        **{name: prompts[name] for name in ("prompt_length", "prompt_rows", "gate_stride")},
        **sizes,
        "HEAD_DIM": head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_P": block_p,
        "TANH": call.tanh_gate,
        **options,
    }
    programs = triton.cdiv(seqlen, config.block_m) * heads_q * batch
    compiled_with = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    if programs:
        with torch.cuda.device_of(query), named("hybrid.prompts"):
            recorder.launch(kernel, programs, arguments, compiled_with)
