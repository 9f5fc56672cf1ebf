"""Which backend runs a call: one written table, and the reasons behind it.

"auto" takes the first usable backend of the device's row. A named backend never falls back.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import composed, ops, reference
from .backends import extension
from .backends.triton import configs
from .calls import CacheCall, Call
from .checks import check_values, has_values, is_transforming

# Triton and CUDA are taken by name only until a GPU has run their kernels; ZINIT_TRY_GPU=1 takes them all the same, for
# whole models that name no backend: bench.gpu_check times those. CUDA first: it refuses what wants gradients.
ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "composed", "reference")}
ORDER_ELSEWHERE: tuple[str, ...] = ("composed", "reference")
if os.environ.get("ZINIT_TRY_GPU") == "1":
    ORDER["cuda"] = ("cuda", "triton", *ORDER_ELSEWHERE)
BACKENDS = ("cpu", "triton", "cuda", "composed", "reference")
MAX_FUSED_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)
CUDA_HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_CUDA_DECODE_TOKENS = 16  # more are attention on tensor cores
_FUSED_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


_CPU_UNAVAILABLE = extension.why_unavailable("cpu")
_CUDA_UNAVAILABLE = extension.why_unavailable("cuda")
_TRITON_UNAVAILABLE = "" if _is_installed("triton") else "triton is not installed: pip install triton"
_LOG = os.environ.get("ZINIT_LOG") == "1"
_NATIVE_UNASKED = not _CPU_UNAVAILABLE and not _LOG
_logger = logging.getLogger("zinit_kernels")
_logged: set[tuple[object, ...]] = set()


class Explanation(dict[str, str]):
    """Backend -> "usable" or the reason why not; `selected` is the one that runs, "" if the named one cannot."""

    selected: str

    def __str__(self) -> str:
        return "\n".join(f"{'->' if name == self.selected else '  '} {name}: {self[name]}" for name in self)


def explain(call: Call | CacheCall, return_lse: bool, backend: str) -> Explanation:
    """What each backend says to a call, and the one that `backend` selects."""
    explanation = Explanation({name: why_not(name, call, return_lse) or "usable" for name in BACKENDS})
    is_refused = explanation.get(backend, "usable") != "usable"
    explanation.selected = "" if is_refused else select(backend, call, return_lse)
    return explanation


def select(backend: str, call: Call | CacheCall, return_lse: bool) -> str:
    """The backend that runs the call; raises with the reason where a named one cannot."""
    if backend == "auto":
        order = ORDER.get(call.query.device.type, ORDER_ELSEWHERE)
        if call.query.dtype == torch.float64 and call.query.device.type == "cpu":
            # float64 is for checking gradients, and SDPA's CPU kernel has no second derivative
            order = ("reference",)
        backend = next(name for name in order if not why_not(name, call, return_lse))
        if _CPU_UNAVAILABLE and call.query.is_cpu and not torch.compiler.is_compiling():
            extension.warn_without_cpu_kernels()
    elif backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")
    elif reason := why_not(backend, call, return_lse):
        instead = next(name for name in ("composed", "reference") if not why_not(name, call, return_lse))
        raise ValueError(
            f"backend {backend!r} cannot run this call: {reason}; use backend='auto' or {instead!r}"
        )
    if _LOG and not torch.compiler.is_compiling():
        _log_choice(backend, call, return_lse)
    return backend


def run(backend: str, call: Call | CacheCall, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """(out, lse) in the layout of the call; lse is None where it was not asked for. Calls against a cache record no
    gradient."""
    backend = select(backend, call, return_lse)
    if backend != "cpu":  # the native kernels read the values themselves
        check_values(call)
    lse: Tensor | None
    if isinstance(call, CacheCall):
        out, lse = _RUN_WITH_CACHE[backend](call)
    else:
        out, lse = _RUN[backend](call)
    return out, lse if return_lse else None


def add_prompt_branch(backend: str, out: Tensor, call: Call) -> None:
    """out [B, Hq, T, D] += the prompt branch of a canonical call that has no keys."""
    selected = select(backend, call, False)
    if selected == "cuda":
        reason = _no_gradients(ops.records(out)) or _misaligned("out", out) or _other_dtype(out, call.query)
        if not reason:
            check_values(call)
            return ops.add_prompt_branch(out, call, "cuda")
        if backend == "cuda":
            raise ValueError(f"backend 'cuda' cannot run this call: {reason}; use backend='auto'")
        selected = "composed"
    out.add_(run(selected, call, False)[0])


_RUN: dict[str, Callable[[Call], tuple[Tensor, Tensor | None]]] = {
    "cpu": partial(ops.attention, backend="cpu"),
    "triton": partial(ops.attention, backend="triton"),
    "cuda": partial(ops.attention, backend="cuda"),
    "composed": lambda call: (composed.attention(call), None),
    "reference": reference.attention,
}
_RUN_WITH_CACHE: dict[str, Callable[[CacheCall], tuple[Tensor, Tensor | None]]] = {
    "cpu": partial(ops.attention_with_cache, backend="cpu"),
    "triton": partial(ops.attention_with_cache, backend="triton"),
    "cuda": partial(ops.attention_with_cache, backend="cuda"),
    "composed": lambda call: (composed.attention_with_cache(call), None),
    "reference": reference.attention_with_cache,
}


def takes_native(query: Tensor) -> bool:
    """Whether a call of this query may go to the CPU operator without further questions."""
    return _NATIVE_UNASKED and query.is_cpu and not torch.compiler.is_compiling() and not _transformed()


def why_not(backend: str, call: Call | CacheCall, return_lse: bool) -> str:
    """The reason why a backend cannot run a call; '' if it can."""
    if backend == "cpu":
        return _CPU_UNAVAILABLE or _why_not_on_cpu(call) or _why_not_fused(call)
    if backend == "triton":
        return _TRITON_UNAVAILABLE or _why_not_triton(call) or _why_not_fused(call) or _why_too_large(call)
    if backend == "cuda":
        return _CUDA_UNAVAILABLE or _why_not_on_gpu(call) or _why_not_cuda(call) or _why_not_fused(call)
    return _why_not_composed(call, return_lse) if backend == "composed" else ""


_TRANSFORMED = "forward-mode AD and torch.func transforms need the formula in plain PyTorch"


def _transformed() -> bool:
    """Whether forward-mode AD or a torch.func transform is on: only plain PyTorch can be seen through then."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or is_transforming()


def _why_not_on_cpu(call: Call | CacheCall) -> str:
    device = call.query.device
    return "" if device.type == "cpu" else f"the tensors are on {device}"


def _why_not_triton(call: Call | CacheCall) -> str:
    if call.query.device.type == "cpu":
        return (
            ""
            if ops.INTERPRETED
            else "the tensors are on cpu (Triton's interpreter needs TRITON_INTERPRET=1)"
        )
    return _why_not_on_gpu(call)


def _why_too_large(call: Call | CacheCall) -> str:
    """Of Triton's tiles on the call's chip; the interpreter has no shared memory."""
    query = call.query
    if call.prompt_key is None or query.device.type != "cuda" or torch.version.hip:
        return ""
    chip = torch.cuda.get_device_properties(query.device)
    cached = isinstance(call, CacheCall)
    prompt_length = call.prompt_key.shape[1 if cached else 2]
    backward = not cached and ops.records(*call[:6])
    arch = 10 * chip.major + chip.minor
    return configs.why_too_large(query.shape[-1], prompt_length, query.element_size(), arch, cached, backward)


def _why_not_on_gpu(call: Call | CacheCall) -> str:
    device = call.query.device
    if device.type != "cuda":
        return f"the tensors are on {device}"
    # a constant to torch.compile, which get_device_capability is not
    chip = torch.cuda.get_device_properties(device)
    if (chip.major, chip.minor) < MIN_CAPABILITY:
        return f"{chip.name} is sm_{chip.major}{chip.minor}; the kernels are written for sm_80 and newer"
    return ""


def _why_not_cuda(call: Call | CacheCall) -> str:
    query = call.query
    if query.shape[-1] not in CUDA_HEAD_DIMS:
        return f"head_dim must be one of {CUDA_HEAD_DIMS}, got {query.shape[-1]}"
    if isinstance(call, Call):
        if reason := _no_gradients(ops.records(*call[:6])):
            return reason
        tokens, read = None, {"query": query, "key": call.key, "value": call.value}
    else:
        tokens = max(query.shape[1], 0 if call.new_key is None else call.new_key.shape[1])
        read = {"k_cache": call.key_cache, "v_cache": call.value_cache}
        if tokens > MAX_CUDA_DECODE_TOKENS:
            read["q"] = query
    if query.dtype == torch.float32 and (tokens is None or tokens > MAX_CUDA_DECODE_TOKENS):
        return (
            f"its attention of more than {MAX_CUDA_DECODE_TOKENS} tokens runs on tensor cores, which take bfloat16 and "
            "float16; the tensors are float32 (backend='triton' takes them)"
        )
    return next(filter(None, (_misaligned(name, tensor) for name, tensor in read.items())), "")


def _no_gradients(recorded: bool) -> str:
    if not recorded:
        return ""
    return "the CUDA kernels have no backward: call them under torch.no_grad(), or use backend='triton'"


def _other_dtype(out: Tensor, query: Tensor) -> str:
    if out.dtype == query.dtype:
        return ""
    return f"out must have the dtype that q gets under torch.autocast, {query.dtype}, got {out.dtype}"


def _misaligned(name: str, tensor: Tensor) -> str:
    """Why a tensor cannot be read 16 bytes at a time; '' if it can."""
    steps = [
        n * tensor.element_size() for n, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    ]
    if any(step % 16 for step in steps[:-1]):
        return f"the rows of {name} must start at multiples of 16 bytes, got strides {tensor.stride()}"
    if not torch.compiler.is_compiling() and tensor.data_ptr() % 16:
        return f"{name} must start at a multiple of 16 bytes, got address {tensor.data_ptr():#x}"
    return ""


def _why_not_fused(call: Call | CacheCall) -> str:
    query = call.query
    if _transformed():
        return _TRANSFORMED
    if query.dtype == torch.float64:
        return "the fused kernels compute in float32, the tensors are float64"
    if not 1 <= query.shape[-1] <= MAX_FUSED_HEAD_DIM:
        return f"head_dim must be 1 to {MAX_FUSED_HEAD_DIM}, got {query.shape[-1]}"
    if call.prompt_key is not None and call.prompt_value is not None:
        dtype = call.prompt_key.dtype
        if dtype != call.prompt_value.dtype:
            return f"both prompt tables must have one dtype, got {dtype} and {call.prompt_value.dtype}"
        if dtype not in _FUSED_DTYPES:
            return f"prompts must be float32, bfloat16 or float16, got {dtype}"
    if isinstance(call, Call) and call.dense_mask is not None:
        return "attn_mask depends on the query (or requires grad); only key-padding masks [B, S] are fused"
    return ""


def _why_not_composed(call: Call | CacheCall, return_lse: bool) -> str:
    if return_lse:
        return "scaled_dot_product_attention does not return the log-sum-exp"
    if _transformed():
        return _TRANSFORMED
    has_lengths = isinstance(call, CacheCall) or call.cu_seqlens_q is not None
    if has_lengths and not has_values(call.query):
        return "it reads sequence lengths on the host: torch.compile cannot trace that, fake and meta tensors have none"
    return ""


def _log_choice(backend: str, call: Call | CacheCall, return_lse: bool) -> None:
    form = "cache" if isinstance(call, CacheCall) else "packed" if call.cu_seqlens_q is not None else "batch"
    query = call.query
    shape_class = (backend, form, query.device.type, query.dtype, query.shape[-1])
    if shape_class in _logged:
        return
    _logged.add(shape_class)
    if not _logger.handlers and not logging.getLogger().handlers:
        _logger.addHandler(logging.StreamHandler())
    _logger.setLevel(min(_logger.getEffectiveLevel(), logging.INFO))
    passed_over = "; ".join(
        f"{name}: {reason}"
        for name in BACKENDS
        if name != backend and (reason := why_not(name, call, return_lse))
    )
    _logger.info(
        "zinit_kernels: %s for %s %s head_dim %d on %s%s",
        backend, form, query.dtype, query.shape[-1], query.device, f" ({passed_over})" if passed_over else "",
    )  # fmt: skip
