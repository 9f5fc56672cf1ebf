"""What the proof asks of CUDA: which chip a device is, and whether a graph is being captured. Tests put another in."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from ..backends import extension

_PACKAGE = Path(__file__).resolve().parent.parent
_DRIVER = Path("/proc/driver/nvidia/version")
# what decides what the kernels compute, beside the libraries that `facts` names
_SOURCES = ("backends/**/*.py", "call.py", "call_keys.py", "operators.py", "_C_cuda.so")


def facts(device: torch.device) -> dict[str, str]:
    """What a verdict is valid for; its values are strings."""
    from .. import __version__

    chip = torch.cuda.get_device_properties(device)
    return {
        "chip": chip.name,
        "capability": f"{chip.major}.{chip.minor}",
        "multiprocessors": str(chip.multi_processor_count),
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "zinit_kernels": __version__,
        "build": _build(),
    }


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream records a CUDA graph: nothing may be compiled, allocated or waited for then."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def make_current(device: torch.device) -> None:
    """For the thread of a trial, in which torch's current device is the first one."""
    torch.cuda.set_device(device)


def synchronize(device: torch.device) -> None:
    """Waits for the device. Raises where an earlier kernel has broken the context."""
    torch.cuda.synchronize(device)


def milliseconds(device: torch.device, run: Callable[[], object]) -> float:
    """The median time of a call on a device, of at most 50 calls in 0.1 s; the first three are not counted.

    A call that takes its kernels less time than the host needs to launch them takes as long as the host.
    """
    with torch.cuda.device(device):
        for _ in range(3):
            run()
        torch.cuda.synchronize(device)
        found: list[float] = []
        until = time.monotonic() + 0.1
        while len(found) < 5 or (len(found) < 50 and time.monotonic() < until):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            run()
            ended.record()
            ended.synchronize()
            found.append(began.elapsed_time(ended))
    return max(sorted(found)[len(found) // 2], 1e-4)


def repeatable(device: torch.device, run: Callable[[], object]) -> Callable[[], object]:
    """A call as a CUDA graph, whose time is the kernels' alone; the call itself where it cannot be captured."""
    with torch.cuda.device(device):
        run()  # kernels are compiled and memory is found outside of the capture
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                run()
        except RuntimeError:
            return run
    return graph.replay


def _driver() -> str:
    """The version of the kernel module where it says so, and of the CUDA that the driver knows."""
    try:
        words = _DRIVER.read_text().split()
    except (OSError, UnicodeDecodeError):
        words = []
    module = next((word for word in words if word[0].isdigit() and word.count(".") >= 1), "unknown")
    return f"{module}, CUDA {'.'.join(map(str, extension.driver_version()))}"


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _build() -> str:
    """A hash of the kernels, as installed here."""
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(_PACKAGE.glob(pattern)):
            digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
