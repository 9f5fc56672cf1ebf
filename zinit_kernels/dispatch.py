"""Which backend runs a call: one written table, and the reasons behind it.

"auto" takes the first usable backend of the device's row. On an NVIDIA GPU it takes a fused one only after the kernels
have passed their trial on this chip (`proof`), and what `zinit tune` has measured there changes the order. A named
backend never falls back, and is not asked for a proof.
"""

from __future__ import annotations

import logging
import os
from typing import Protocol

import torch
from torch import Tensor

from . import proof
from .backends import composed, cpu, cuda, hybrid, reference, triton
from .call import AnyCall, CacheCall, Call, PromptCall
from .values import check_values


class Backend(Protocol):
    """What the module of each backend has.

    why_not: the reason why it cannot run a call, '' if it can. attention and attention_with_cache: (out, lse or
    None) in the layout of the call; calls against a cache record no gradient. add_prompt_branch: adds the prompt
    branch to `out`. CHECKS_VALUES: whether its kernels check the lengths, pages and rows that they read.
    """

    CHECKS_VALUES: bool

    def why_not(self, call: AnyCall, return_lse: bool) -> str: ...
    def attention(self, call: Call) -> tuple[Tensor, Tensor | None]: ...
    def attention_with_cache(self, call: CacheCall) -> tuple[Tensor, Tensor | None]: ...
    def add_prompt_branch(self, call: PromptCall) -> None: ...


BACKENDS: dict[str, Backend] = {
    "cpu": cpu,
    "triton": triton,
    "cuda": cuda,
    "hybrid": hybrid,
    "composed": composed,
    "reference": reference,
}
PLAIN: tuple[str, ...] = ("composed", "reference")
ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu", *PLAIN)}
# On an NVIDIA GPU. The CUDA kernels are written for decoding; of whole sequences they are expected to reach 0.6 of
# Triton's speed on Hopper, and they have no backward.
CUDA_ORDER: dict[type, tuple[str, ...]] = {
    Call: ("triton", "cuda", *PLAIN),
    CacheCall: ("cuda", "triton", *PLAIN),
    PromptCall: ("cuda", "triton", *PLAIN),
}
# On an NVIDIA GPU too, but only where `zinit tune` has found them faster on this chip.
IF_FASTER: dict[type, tuple[str, ...]] = {Call: ("hybrid",), CacheCall: (), PromptCall: ()}
# devices of CUDA_ORDER; AMD's chips have the same name in torch, and nobody has tried the kernels there
PROVED = set() if torch.version.hip else {"cuda"}
IS_LOGGED = os.environ.get("ZINIT_LOG") == "1"
# whether "auto" takes the CPU kernels without a question, and nobody wants to read about it
CPU_IS_FIRST = not cpu.UNAVAILABLE and not IS_LOGGED
_logger = logging.getLogger("zinit_kernels")
_logged: set[tuple[object, ...]] = set()


class Explanation(dict[str, str]):
    """Backend -> "usable" or the reason why not; `selected` is the one that runs, "" if the named one cannot.

    `proof`: backend -> what is known of its trial on this chip, and of its time where `zinit tune` was run there.
    """

    selected: str
    proof: dict[str, str]

    def __str__(self) -> str:
        lines = []
        for name, reason in self.items():
            arrow, trial = "->" if name == self.selected else "  ", self.proof.get(name)
            lines.append(f"{arrow} {name}: {reason}{f' ({trial})' if trial else ''}")
        return "\n".join(lines)


def explain(call: AnyCall, return_lse: bool, backend: str) -> Explanation:
    """What each backend says to a call, and the one that `backend` selects. Runs no trial.

    A family that was not tried yet counts as one that will pass. Raises ValueError for lengths, pages and rows that no
    backend takes.
    """
    check_values(call)
    explanation = Explanation(
        {name: room.why_not(call, return_lse) or "usable" for name, room in BACKENDS.items()}
    )
    explanation.proof = {}
    if call.query.device.type in PROVED:
        usable = [name for name, reason in explanation.items() if reason == "usable"]
        for name in usable:
            time = proof.describe_time(name, call)
            if name in IF_FASTER[type(call)] and not time:
                explanation.proof[name] = "auto takes it only where `zinit tune` has found it the fastest"
            elif text := "; ".join(filter(None, (proof.describe(name, call), time))):
                explanation.proof[name] = text
    if backend == "auto":
        explanation.selected = next(
            name
            for name in _order(call)
            if explanation[name] == "usable"
            and not (call.query.device.type in PROVED and proof.known_why_not(name, call))
        )
    else:
        is_refused = explanation.get(backend, "usable") != "usable"
        explanation.selected = "" if is_refused else select(backend, call, return_lse)
    return explanation


def why_not(backend: str, call: AnyCall, return_lse: bool) -> str:
    """The reason why a backend cannot run a call; '' if it can."""
    return BACKENDS[backend].why_not(call, return_lse)


def select(backend: str, call: AnyCall, return_lse: bool) -> str:
    """The backend that runs the call; raises with the reason where a named one cannot."""
    if backend == "auto":
        device = call.query.device.type
        if device in PROVED:
            backend = next(
                name
                for name in _order(call)
                if not why_not(name, call, return_lse) and not proof.why_not(name, call)
            )
        else:
            backend = next(name for name in _order(call) if not why_not(name, call, return_lse))
        if cpu.UNAVAILABLE and call.query.is_cpu and not torch.compiler.is_compiling():
            cpu.warn_unavailable()
    elif backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {tuple(BACKENDS)}, got {backend!r}")
    elif reason := why_not(backend, call, return_lse):
        instead = next(name for name in ("composed", "reference") if not why_not(name, call, return_lse))
        raise ValueError(
            f"backend {backend!r} cannot run this call: {reason}; use backend='auto' or {instead!r}"
        )
    if IS_LOGGED and not torch.compiler.is_compiling():
        _log_choice(backend, call, return_lse)
    return backend


def settled(backend: str, call: AnyCall) -> str:
    """The backend that runs this call and every later one like it; '' where that may change without a new verdict."""
    if backend != "auto":
        return backend
    for name in _order(call):
        if why_not(name, call, False):
            continue
        if call.query.device.type not in PROVED or not proof.why_not(name, call):
            return name
        if not proof.is_settled(name, call):
            return ""
    return ""


def _order(call: AnyCall) -> tuple[str, ...]:
    """The backends that auto asks, in this order."""
    device = call.query.device.type
    if device in PROVED:
        return proof.ordered(call, CUDA_ORDER[type(call)], IF_FASTER[type(call)])
    if call.query.dtype == torch.float64 and device == "cpu":
        # float64 is for checking gradients, and SDPA's CPU kernel has no second derivative
        return ("reference",)
    return ORDER.get(device, PLAIN)


def run(backend: str, call: Call | CacheCall, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """(out, lse) in the layout of the call; lse is None where it was not asked for."""
    room = _checking(select(backend, call, return_lse), call)
    lse: Tensor | None
    if isinstance(call, CacheCall):
        out, lse = room.attention_with_cache(call)
    else:
        out, lse = room.attention(call)
    return out, lse if return_lse else None


def add_prompt_branch(backend: str, call: PromptCall) -> None:
    """call.out += the prompt branch."""
    _checking(select(backend, call, False), call).add_prompt_branch(call)


def _checking(backend: str, call: AnyCall) -> Backend:
    """The backend, after the checks of values that it does not make itself."""
    room = BACKENDS[backend]
    if not room.CHECKS_VALUES:
        check_values(call)
    return room


def _log_choice(backend: str, call: AnyCall, return_lse: bool) -> None:
    if isinstance(call, PromptCall):
        form = "prompt branch"
    elif isinstance(call, CacheCall):
        form = "cache"
    else:
        form = "batch" if call.cu_seqlens_q is None else "packed"
    query = call.query
    shape_class = (backend, form, query.device.type, query.dtype, query.shape[-1])
    if shape_class in _logged:
        return
    _logged.add(shape_class)
    if not _logger.handlers and not logging.getLogger().handlers:
        _logger.addHandler(logging.StreamHandler())
    _logger.setLevel(min(_logger.getEffectiveLevel(), logging.INFO))
    reasons = {name: why_not(name, call, return_lse) for name in BACKENDS if name != backend}
    passed_over = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    _logger.info(
        "zinit_kernels: %s for %s %s head_dim %d on %s%s",
        backend,
        form,
        query.dtype,
        query.shape[-1],
        query.device,
        f" ({passed_over})" if passed_over else "",
    )
