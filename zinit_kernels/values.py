"""The values of tensors: whether they may be read, and the checks that read them.

Kernels read lengths, pages and rows of tables out of tensors. What a wrong one would do is checked here, by backends
whose kernels do not check it themselves.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from .call import AnyCall, CacheCall, PromptCall

ON_DEVICES_TOO = os.environ.get("ZINIT_CHECK") == "1"


def has_values(tensor: Tensor) -> bool:
    """Whether it can be read: not while torch.compile or a torch.func transform looks on, and fake and meta tensors
    hold nothing."""
    if torch.compiler.is_compiling() or is_transforming():
        return False
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


# dynamo of torch 2.11 cannot trace torch.amp.is_autocast_available
_AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla")
    if torch.amp.is_autocast_available(device)
)


def has_autocast(device: str) -> bool:
    """Whether a type of device knows torch.autocast: meta tensors do not, and asking for its state raises there."""
    if device in _AUTOCAST_DEVICES:
        return True
    return not torch.compiler.is_compiling() and torch.amp.is_autocast_available(device)


def is_transforming() -> bool:
    """Whether a torch.func transform (vmap, grad, jvp) is on."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def why_transformed() -> str:
    """The reason why only plain PyTorch may run; '' unless forward-mode AD or a torch.func transform is on."""
    if torch.compiler.is_compiling() or (forward_ad._current_level < 0 and not is_transforming()):
        return ""
    return "forward-mode AD and torch.func transforms need the formula in plain PyTorch"


def may_look_at(tensor: Tensor) -> bool:
    """Whether a check may read the tensor: it has values, and no device stalls for them (ZINIT_CHECK=1: it may)."""
    return has_values(tensor) and (tensor.device.type == "cpu" or ON_DEVICES_TOO)


def check_values(call: AnyCall) -> None:
    """The checks that must read tensors. The native CPU kernels make the same ones.

    On a device they would stall it, so there they run only with ZINIT_CHECK=1; without it, kernels clamp.
    """
    if not may_look_at(call.query):
        return
    if call.prompt_index is not None and call.prompt_key is not None and len(call.prompt_index):
        low, high, rows = int(call.prompt_index.min()), int(call.prompt_index.max()), call.prompt_key.shape[0]
        if low < -1 or high >= rows:
            raise ValueError(
                f"prompt_index must lie in -1 (no prompt) .. {rows - 1}, the rows of the prompt table, got "
                f"{low if low < -1 else high}"
            )
    if isinstance(call, CacheCall):
        _check_cache_values(call)
    elif isinstance(call, PromptCall):
        _check_cumulative("cu_seqlens", call.cu_seqlens, call.query.shape[2], call.max_seqlen, "max_seqlen")
    else:
        _check_cumulative(
            "cu_seqlens_q", call.cu_seqlens_q, call.query.shape[2], call.max_seqlen_q, "max_seqlen_q"
        )
        _check_cumulative(
            "cu_seqlens_k", call.cu_seqlens_k, call.key.shape[2], call.max_seqlen_k, "max_seqlen_k"
        )


def _check_cache_values(call: CacheCall) -> None:
    appended = 0 if call.new_key is None else call.new_key.shape[1]
    page_size = call.key_cache.shape[1]
    capacity = page_size if call.block_table is None else page_size * call.block_table.shape[1]
    # without a causal mask or a window all queries are rotated at one position
    queries = call.query.shape[1]
    rotated = max(appended, min(queries, 1) if call.window_left == call.window_right == -1 else queries)
    for sequence, seqlen in enumerate(call.cache_seqlens.tolist()):
        if seqlen < 0 or seqlen + appended > capacity:
            raise ValueError(
                f"cache_seqlens[{sequence}] = {seqlen} plus {appended} new tokens must lie in 0 .. {capacity}, "
                "the capacity of the cache: make the cache longer (or give the sequence more pages)"
            )
        if call.cache_leftpad is not None and not 0 <= int(call.cache_leftpad[sequence]) <= seqlen:
            raise ValueError(
                f"cache_leftpad[{sequence}] = {int(call.cache_leftpad[sequence])} must lie in 0 .. {seqlen}, the "
                "sequence's cache_seqlens, which count the padding too"
            )
        if call.block_table is not None:
            used = call.block_table[sequence, : -(-(seqlen + appended) // max(page_size, 1))]
            if len(used) and (int(used.min()) < 0 or int(used.max()) >= call.key_cache.shape[0]):
                raise ValueError(
                    f"block_table[{sequence}] names pages {used.tolist()}, the pool has {call.key_cache.shape[0]} pages"
                )
        if call.rotary_cos is not None and rotated and seqlen + rotated > call.rotary_cos.shape[0]:
            raise ValueError(
                f"rotary_cos has {call.rotary_cos.shape[0]} positions, sequence {sequence} needs {seqlen + rotated}"
            )


def _check_cumulative(
    name: str, cu_seqlens: Tensor | None, total: int, longest: int, longest_name: str
) -> None:
    if cu_seqlens is None:
        return
    lengths = cu_seqlens.diff().tolist()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total or min(lengths, default=0) < 0:
        raise ValueError(
            f"{name} must start at 0, never decrease and end at the {total} packed rows, got {cu_seqlens.tolist()}"
        )
    if max(lengths, default=0) > longest:
        raise ValueError(
            f"{longest_name} must be at least the longest sequence, {max(lengths)}, got {longest}"
        )


def check_range(numbers: Tensor, available: int, must: str, what: str) -> None:
    """That each of the numbers, at least one, is one of 0 .. available - 1. Reads them: see `may_look_at`."""
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= available:
        raise ValueError(f"{must} 0 .. {available - 1}, {what}, got {low if low < 0 else high}")
