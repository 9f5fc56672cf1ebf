"""python -m zinit_kernels.check: what this machine has, which backends it can run, and whether they are right.

Each usable backend runs a small forward, backward and decode on each device, judged against the float64 reference by
the rule of `zinit_kernels.testing`. The exit code is 0 if all that could run was right, else 1.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from . import __version__, dispatch, explain
from .backends import extension
from .console import Parser, run
from .testing import CacheCase, Case, check_cache_case, check_case, make_cache_arguments, make_inputs

CASE = Case("check", seqlens_q=(65,), heads_q=4, heads_kv=2, head_dim=64)
CACHE_CASE = CacheCase("check", heads_q=8, heads_kv=2, seqlens=(0, 37, 100), page_size=16, rotary_dim=32)
DTYPES = (torch.float32, torch.bfloat16)


def devices() -> list[str]:
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def describe(device: str) -> str:
    if device == "cpu":
        return f"cpu      {platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{device}   {properties.name}, sm_{properties.major}{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
    )


def versions() -> str:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return (
        f"zinit_kernels {__version__}, torch {torch.__version__} ({cuda}), Python {platform.python_version()}"
    )


Stage = tuple[str, str, Callable[[], None]]  # what is run, why it cannot be, how


def attention_stage(backend: str, device: str, dtype: torch.dtype) -> Stage:
    call = make_inputs(CASE, dtype, device=device).canonical()
    if not (reason := dispatch.why_not(backend, call, False)):
        return "forward and backward", "", lambda: check_case(CASE, dtype, backend, device=device)
    with torch.no_grad():  # a backend may have no backward
        reason_forward = dispatch.why_not(backend, call, False)
    stage = "forward and backward" if reason_forward else "forward"
    return stage, reason if reason_forward else "", lambda: check_forward(backend, device, dtype)


@torch.no_grad()
def check_forward(backend: str, device: str, dtype: torch.dtype) -> None:
    check_case(CASE, dtype, backend, backward=False, device=device)


def cache_stage(backend: str, device: str, dtype: torch.dtype) -> Stage:
    reason = explain(**make_cache_arguments(CACHE_CASE, dtype, device=device))[backend]
    said = "" if reason == "usable" else reason
    return "decode", said, lambda: check_cache_case(CACHE_CASE, dtype, backend, device=device)


def results(backend: str, device: str) -> Iterator[tuple[str, str]]:
    """(what was run, "right", or why it is not or cannot be); a reason that all dtypes share is said once."""
    for stage_of in (attention_stage, cache_stage):
        said = None
        for dtype in DTYPES:
            stage, reason, run = stage_of(backend, device, dtype)
            if reason and reason == said:
                continue
            if reason:
                said = reason
                yield stage, f"not usable: {reason}"
                continue
            try:
                run()
            except Exception as error:
                yield f"{stage}, {dtype}", f"WRONG: {type(error).__name__}: {error}"
            else:
                yield f"{stage}, {dtype}", "right"


def main(arguments: Sequence[str] = ()) -> int:
    """The program; the exit status."""
    Parser(
        prog="python -m zinit_kernels.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(arguments)
    print(versions())
    print(extension.describe())
    wrong = 0
    for device in devices():
        print(f"\n{describe(device)}")
        for backend in dispatch.BACKENDS:
            for what, verdict in results(backend, device):
                wrong += verdict.startswith("WRONG")
                print(f"  {backend:<10} {what:<38} {verdict}")
    print(f"\n{wrong} wrong" if wrong else "\nall that could run was right")
    return 1 if wrong else 0


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
