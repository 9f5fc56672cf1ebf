"""Which of a kernel's candidates a call runs: the written choice, or with ZINIT_AUTOTUNE=1 the fastest on this chip.

Timing happens once per key and process, at the first such call; never inside a CUDA graph's capture. Every candidate's
time goes to stderr, in one line per key. Sums have the order of their tiles, so bits repeat within a process, and
between processes only where the same candidate won.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
from triton import testing
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.errors import OutOfResources, PTXASError

from .configs import Config

ENABLED = os.environ.get("ZINIT_AUTOTUNE") == "1"
_fastest: dict[Hashable, Config] = {}


def run(key: Hashable, candidates: Sequence[Config], launch: Callable[[Config], None]) -> None:
    """Calls `launch` with the choice; while timing also with the others, so it may only overwrite its outputs.

    key: all that the fastest candidate depends on. candidates: the written choice first.
    """
    choice = candidates[0]
    if ENABLED and len(candidates) > 1:
        if key not in _fastest and not torch.cuda.is_current_stream_capturing():
            times = {config: _milliseconds(config, launch) for config in candidates}
            ranking = sorted(times, key=times.__getitem__)
            _fastest[key] = ranking[0]
            listed = ", ".join(f"{tuple(config)} {times[config]:.4f} ms" for config in ranking)
            print(f"zinit: tuned {key}: {listed}; written choice {tuple(choice)}", file=sys.stderr)
        choice = _fastest.get(key, choice)
    launch(choice)


def key_of(operands: Mapping[str, Any], *sizes: int) -> Iterator[Hashable]:
    """What the fastest candidate depends on: what is compiled in, which tensors there are, sizes to a factor of two."""
    for name, operand in operands.items():
        if name.isupper():
            yield operand
        elif isinstance(operand, tuple):  # a View
            yield operand[0] is None
        elif isinstance(operand, int):
            yield triton.next_power_of_2(operand)
        elif not isinstance(operand, float):
            yield operand is None
    yield from map(triton.next_power_of_2, sizes)


def _milliseconds(config: Config, launch: Callable[[Config], None]) -> float:
    """Median time; infinite where the compiler says that the candidate does not fit the chip."""
    try:
        return testing.do_bench(lambda: launch(config), warmup=10, rep=40, return_mode="median")
    except (OutOfResources, PTXASError, CompileTimeAssertionFailure):
        return float("inf")
