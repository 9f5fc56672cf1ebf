"""The launch of a compiled Triton kernel without what Triton does around it.

`CompiledKernel.run` asks at every launch whether the kernel needs scratch memory; of 3.0 us it takes 1.9. A kernel of
ours needs none, so its launcher is called directly, with the arguments that `run` would hand to it. Where a version of
Triton has another launcher, or the kernel does need scratch memory, `run` itself is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch._C._dynamo import guards

VERSIONS = ((3, 6), (3, 7), (3, 9))  # of Triton: they launch a kernel by the same call
_VERSION = tuple(int(n) for n in triton.__version__.split(".")[:2])
IS_KNOWN = _VERSION in VERSIONS

# what torch.compile's generated code allocates with: 0.9 us instead of 1.7
_empty_strided_cuda = getattr(guards, "_empty_strided_cuda", None)


def allocator(
    device: torch.device,
) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]:
    """A function (shape, strides, dtype) -> a new tensor on a device, which must be the current one."""
    if device.type == "cuda" and _empty_strided_cuda is not None:
        found: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor] = _empty_strided_cuda
        return found
    return lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype, device=device)


def call_of(compiled: Any, programs: int, arguments: str, names: dict[str, Any], prefix: str) -> str:
    """Source that launches a compiled kernel on `stream`; what it needs goes into `names`, behind the prefix.

    arguments: the source of the kernel's arguments.
    """
    run = compiled.run
    names[f"{prefix}f"], names[f"{prefix}m"] = compiled.function, compiled.packed_metadata
    grid = f"{programs}, 1, 1, stream, {prefix}f"
    if not _is_plain(run):
        names[f"{prefix}r"] = run
        return f"{prefix}r({grid}, {prefix}m, None, None, None, {arguments})"
    names[f"{prefix}r"] = run.launch
    grid += f", {run.launch_cooperative_grid!r}, {run.launch_pdl!r}"
    if _VERSION == (3, 6):
        return f"{prefix}r({grid}, None, None, {prefix}m, None, None, None, {arguments})"
    names[f"{prefix}a"], names[f"{prefix}s"] = run.arg_annotations, run.kernel_signature
    return f"{prefix}r({grid}, {prefix}m, None, None, None, None, None, {prefix}a, {prefix}s, ({arguments},))"


def _is_plain(run: Any) -> bool:
    """Whether it is the launcher of a version that was looked at, for a kernel without scratch memory."""
    if not (IS_KNOWN and type(run).__name__ == "CudaLauncher" and hasattr(run, "launch")):
        return False
    if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        return False
    return _VERSION == (3, 6) or (hasattr(run, "arg_annotations") and hasattr(run, "kernel_signature"))
