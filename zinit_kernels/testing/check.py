"""Whole cases, judged by the one tolerance rule (`tolerance`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..api import zero_init_attention_with_kvcache
from ..backends import reference
from .cases import CacheCase, Case, Inputs, make_cache_arguments, make_inputs
from .magnitude import magnitudes
from .tolerance import assert_within_eager_error

WITHOUT_LSE = ("composed", "hybrid")  # backends that return no log-sum-exp, or none with a gradient


def projections(outputs: tuple[Tensor, Tensor | None], seed: int = 1) -> list[Tensor | None]:
    """Random gradients for the outputs. A row without keys has a constant lse and gets none.

    Every dtype holds these numbers exactly. Numbers that only the kernel had to round would count as its error: the
    gradient of a bfloat16 gate was then off by 5 times what is allowed.
    """
    random = torch.Generator().manual_seed(seed)
    return [
        None
        if o is None
        else torch.randn(o.shape, generator=random)
        .to(torch.bfloat16)
        .to(torch.float16)
        .float()
        .to(o.device)
        .masked_fill(o == float("-inf"), 0)
        for o in outputs
    ]


def gradients(outputs: tuple[Tensor, Tensor | None], inputs: Inputs) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of (out, lse) for every input that wants one; zeros where none flows."""
    loss = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for output, weight in zip(outputs, projections(outputs), strict=True):
        if output is not None:
            loss = loss + (output.masked_fill(output == float("-inf"), 0).double() * weight).sum()
    wanted = {name: t for name, t in inputs.tensors.items() if t is not None and t.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if grad is None else grad
        for (name, tensor), grad in zip(wanted.items(), found, strict=True)
    }


def check_case(
    case: Case, dtype: torch.dtype, backend: str, seed: int = 0, backward: bool = True, device: str = "cpu"
) -> None:
    """Forward, log-sum-exp and every gradient of a case by a backend, against the float64 reference."""
    with_lse = backend not in WITHOUT_LSE
    check_function(
        lambda inputs: inputs.call(backend, return_lse=with_lse), case, dtype, seed, backward, device
    )


def check_function(
    function: Callable[[Inputs], tuple[Tensor, Tensor | None]],
    case: Case,
    dtype: torch.dtype,
    seed: int = 0,
    backward: bool = True,
    device: str = "cpu",
    factor: float = 2.0,
) -> None:
    """Judges (out [B, H, T, D], lse or None) of any function of a case's inputs as a backend is judged.

    `factor`: how many times the error of eager PyTorch is allowed.
    """
    inputs = make_inputs(case, dtype, seed, device)
    eager_inputs, oracle_inputs = inputs.to(None), inputs.to(torch.float64)
    actual = function(inputs)
    with_lse = actual[1] is not None
    eager = reference.attention(eager_inputs.canonical(), compute_dtype=dtype)
    oracle = reference.attention(oracle_inputs.canonical())
    count = 2 if with_lse else 1
    weights = projections((oracle[0].detach(), oracle[1].detach() if with_lse else None))
    with torch.no_grad():
        terms = magnitudes(oracle_inputs.canonical(), weights[0].double(), weights[1], oracle[0], dtype)  # type: ignore[union-attr]
    assert_within_eager_error("out", actual[0], eager[0], oracle[0], dtype, terms["out"], factor)
    if with_lse:  # float32 whatever the dtype of the inputs, so judged by eager in float32
        eager_lse = reference.attention(eager_inputs.canonical(), compute_dtype=torch.float32)[1]
        assert_within_eager_error("lse", actual[1], eager_lse, oracle[1], torch.float32, terms["lse"])  # type: ignore[arg-type]
    if not backward:
        return
    expected = gradients(oracle[:count], oracle_inputs)  # type: ignore[arg-type]
    allowed = gradients(eager[:count], eager_inputs)  # type: ignore[arg-type]
    for name, grad in gradients(actual, inputs).items():
        source = inputs.tensors[name]
        assert source is not None and grad.dtype == source.dtype, f"d{name} is {grad.dtype}"
        assert_within_eager_error(
            f"d{name}", grad, allowed[name], expected[name], grad.dtype, terms[name], factor
        )


def check_cache_case(
    case: CacheCase, dtype: torch.dtype, backend: str, seed: int = 0, device: str = "cpu"
) -> None:
    """Output, log-sum-exp and the written caches of one call, against the float64 reference."""
    ours = make_cache_arguments(case, dtype, seed, device)
    eager = make_cache_arguments(case, dtype, seed, device)
    oracle = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in make_cache_arguments(case, dtype, seed, device).items()
    }
    with_lse = backend != "composed"
    result = zero_init_attention_with_kvcache(**ours, backend=backend, return_lse=with_lse)
    out, lse = result if with_lse else (result, None)
    expected_out, expected_lse = zero_init_attention_with_kvcache(
        **oracle, backend="reference", return_lse=True
    )
    eager_out, eager_lse = _eager_with_cache(eager, dtype)
    if not case.rotary_dim:  # else the rounding of the rotated keys in the cache is in lse too
        _, eager_lse = _eager_with_cache(make_cache_arguments(case, dtype, seed, device), torch.float32)
    assert_within_eager_error("out", out, eager_out, expected_out, dtype)
    if lse is not None:
        assert_within_eager_error("lse", lse, eager_lse, expected_lse, torch.float32)
    for name in ("k_cache", "v_cache"):
        written = ~torch.isnan(oracle[name])
        assert torch.equal(~torch.isnan(ours[name]), written), (
            f"{name}: other slots were written than expected"
        )
        assert_within_eager_error(
            name, ours[name][written], eager[name][written], oracle[name][written], dtype
        )


def _eager_with_cache(case_arguments: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    defaults = {**zero_init_attention_with_kvcache.__kwdefaults__, **case_arguments}  # type: ignore[dict-item]
    defaults.pop("return_lse")
    defaults.pop("backend")
    call = arguments.from_cache(**defaults)
    with torch.no_grad():
        return reference.attention_with_cache(call, compute_dtype=dtype)
