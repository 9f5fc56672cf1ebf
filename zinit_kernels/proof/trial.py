"""The trial of a kernel family on a device: small calls against the float64 reference on the CPU, by the one rule.

The rule allows twice the error of eager PyTorch at the kernel's dtype. The reference and that eager formula both run
on the CPU, so only the kernels can be wrong.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from ..backends import cuda, few_rows, hybrid, reference, triton
from ..backends.triton.operands import num_processors
from ..call import CALL, AnyCall, CacheCall, Call, PromptCall
from ..testing.magnitude import magnitudes
from ..testing.tolerance import assert_within_eager_error
from .calls import calls, products
from .families import Subject

SEEDS = (0, 1)
ROOMS: dict[str, Any] = {"triton": triton, "cuda": cuda, "hybrid": hybrid}
WITHOUT_GRAD_LSE = ("hybrid",)  # backends whose log-sum-exp has no gradient
_T = TypeVar("_T", bound=AnyCall)


def run(subject: Subject, device: torch.device) -> None:
    """Raises AssertionError where a result is wrong, and whatever the launch of a kernel raises."""
    if subject.head_dim is None:
        processors = num_processors(torch.empty(0, device=device))
        for seed in SEEDS:
            for number, product in enumerate(products(subject.dtype, seed, processors)):
                _try_few_rows(product, subject.dtype, device, f"product {number}, seed {seed}: ")
        return
    room = ROOMS[subject.backend]
    for seed in SEEDS:
        for number, call in enumerate(calls(subject.family, subject.dtype, subject.head_dim, seed)):
            where = f"call {number}, seed {seed}: "
            if isinstance(call, CacheCall):
                _try_cache(room, call, subject.dtype, device, where)
            elif isinstance(call, PromptCall):
                _try_prompts(room, call, subject.dtype, device, where)
            else:
                backward = subject.family.endswith("backward")
                differentiable = 1 if subject.backend in WITHOUT_GRAD_LSE else 2
                _try_attention(room, call, subject.dtype, device, backward, differentiable, where)


def _poison(call: AnyCall, device: torch.device) -> None:
    """Leaves NaN in the memory that the kernel's outputs are likely to get, so that an element never written shows."""
    if device.type == "cpu":
        return  # its tests fill all new memory
    sizes = [tensor.numel() for tensor in call if isinstance(tensor, Tensor)]
    kept = [
        torch.full((size,), float("nan"), dtype=dtype, device=device)
        for size in sizes
        for dtype in (call.query.dtype, torch.float32)
    ]
    del kept


def converted(call: _T, dtype: torch.dtype | None, device: torch.device | None = None) -> _T:
    """Fresh tensors of a call: elsewhere, or with floating-point numbers of another dtype."""
    fresh: dict[str, Any] = {
        name: tensor.detach().to(
            device=device or tensor.device,
            dtype=dtype if dtype and tensor.is_floating_point() else tensor.dtype,
            copy=True,
        )
        for name, tensor in call._asdict().items()
        if isinstance(tensor, Tensor)
    }
    return call._replace(**fresh)  # type: ignore[return-value]


def _try_attention(
    room: Any,
    call: Call,
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
    differentiable: int,
    where: str,
) -> None:
    """differentiable: of how many of (out, log-sum-exp) the gradients are compared."""
    actual_call, eager_call, oracle_call = (
        converted(call, None, device), converted(call, None), converted(call, torch.float64)
    )  # fmt: skip
    wanted = [name for name in CALL.differentiable if backward and getattr(call, name) is not None]
    for one in (actual_call, eager_call, oracle_call):
        for name in wanted:
            getattr(one, name).requires_grad_()
    with torch.set_grad_enabled(backward):
        _poison(actual_call, device)
        actual = room.attention(actual_call)
        eager = reference.attention(eager_call, compute_dtype=dtype)
        eager_lse = reference.attention(converted(call, None), compute_dtype=torch.float32)[1]
        oracle = reference.attention(oracle_call)
    random = torch.Generator(device="cpu").manual_seed(2)
    # numbers that every dtype holds exactly: else their rounding would count as the kernel's
    grads = [
        torch.randint(-16, 17, o.shape, generator=random, device="cpu").to(torch.float32) / 8
        for o in oracle[:differentiable]
    ]
    with torch.no_grad():
        plain = converted(call, torch.float64)
        grad_lse = grads[1].double() if differentiable > 1 else None
        terms = magnitudes(plain, grads[0].double(), grad_lse, oracle[0].detach(), dtype)
        pairs = {"out": (actual[0], eager[0], oracle[0], dtype)}
        pairs["lse"] = (actual[1], eager_lse, oracle[1], torch.float32)
    if wanted:
        found = [
            torch.autograd.grad(
                outputs[:differentiable],
                [getattr(one, name) for name in wanted],
                [g.to(o.device, o.dtype) for g, o in zip(grads, outputs, strict=False)],
            )
            for outputs, one in ((actual, actual_call), (eager, eager_call), (oracle, oracle_call))
        ]
        for name, ours, near, exact in zip(wanted, *found, strict=True):
            pairs[name] = (ours, near, exact, getattr(call, name).dtype)
    for name, (ours, near, exact, kind) in pairs.items():
        label = f"{where}gradient of {name}" if name in wanted else where + name
        assert_within_eager_error(label, ours.cpu(), near, exact, kind, terms[name])


def _try_cache(room: Any, call: CacheCall, dtype: torch.dtype, device: torch.device, where: str) -> None:
    actual_call, eager_call, oracle_call = (
        converted(call, None, device), converted(call, None), converted(call, torch.float64)
    )  # fmt: skip
    single_call = converted(call, None)
    with torch.no_grad():
        _poison(actual_call, device)
        out, lse = room.attention_with_cache(actual_call)
        eager_out, eager_lse = reference.attention_with_cache(eager_call, compute_dtype=dtype)
        if call.rotary_cos is None:  # else the rounding of the rotated keys in the cache is in lse too
            _, eager_lse = reference.attention_with_cache(single_call, compute_dtype=torch.float32)
        oracle_out, oracle_lse = reference.attention_with_cache(oracle_call)
    assert_within_eager_error(f"{where}out", out.cpu(), eager_out, oracle_out, dtype)
    assert_within_eager_error(f"{where}lse", lse.cpu(), eager_lse, oracle_lse, torch.float32)
    for name in ("key_cache", "value_cache"):
        ours, near, exact = (getattr(one, name).cpu() for one in (actual_call, eager_call, oracle_call))
        written = ~exact.isnan()
        assert torch.equal(~ours.isnan(), written), f"{where}{name}: other slots were written than expected"
        assert_within_eager_error(where + name, ours[written], near[written], exact[written], dtype)


def _try_prompts(room: Any, call: PromptCall, dtype: torch.dtype, device: torch.device, where: str) -> None:
    actual, eager, oracle = (
        converted(call, None, device), converted(call, None), converted(call, torch.float64)
    )  # fmt: skip
    with torch.no_grad():
        room.add_prompt_branch(actual)
        eager.out.add_(reference.attention(eager.attention(), compute_dtype=dtype)[0])
        oracle.out.add_(reference.attention(oracle.attention())[0])
    assert_within_eager_error(f"{where}out", actual.out.cpu(), eager.out, oracle.out, dtype)


def _try_few_rows(product: few_rows.Product, dtype: torch.dtype, device: torch.device, where: str) -> None:
    """One launch; NaN lies before and behind each tensor that it reads."""
    with torch.no_grad():
        actual = few_rows.launched(product.mapped(lambda tensor: _between_nan(tensor, device)))
        eager = few_rows.composed(product)
        oracle = few_rows.composed(product.mapped(Tensor.double))
    for number, (ours, near, exact) in enumerate(zip(actual, eager, oracle, strict=True)):
        assert_within_eager_error(f"{where}out {number}", ours.cpu(), near, exact, dtype)


def _between_nan(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device. It starts at a multiple of 256 bytes, and NaN fills the 4 KB or more around it."""
    room = 4096
    memory = torch.full((tensor.numel() + 2 * room,), float("nan"), dtype=tensor.dtype, device=device)
    memory[room : room + tensor.numel()] = tensor.flatten()
    return memory[room : room + tensor.numel()].view(tensor.shape)
