"""Counts what a profiler would count of the Triton kernels, with no GPU: sectors, bank conflicts, bytes, instructions.

    python tests/ptx/count_kernels.py 80 90 [--head-dims 64,128] [--lines 3]

One JSON line per kernel, as it is compiled for the chip and interpreted at a small size: a causal training call of 512
tokens, a decode call and a chunk of new tokens. `conflicts` and `wasted` name the source lines that cost most. These
are counts, not times, and nothing has run on a GPU.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ptx")]
import triton_kernels  # noqa: E402 (needs the line above)

from zinit_kernels.testing import CacheCase, Case, check_cache_case, check_case  # noqa: E402


def cases(head_dim: int) -> list[Case | CacheCase]:
    sizes = {"head_dim": head_dim, "heads_kv": 2}
    return [
        Case("training", batch=1, heads_q=2, seqlens_q=(512,), layout="token_major", **sizes),
        CacheCase("decode", heads_q=8, seqlens=(500, 1000), capacity=1024, num_splits=2, **sizes),
        CacheCase("chunk", heads_q=8, seqlens=(500,), seqlen_q=19, capacity=1024, page_size=16, **sizes),
    ]


def count(arch: int, case: Case | CacheCase, lines: int, backend: str) -> list[dict[str, object]]:
    """Of every kernel that the call launches, whose results are checked too. Of hybrid, those that others lack."""
    chip = triton_kernels.Chip(arch)
    chip.counted = {}
    with pytest.MonkeyPatch.context() as patch, triton_kernels.operators():
        triton_kernels.install(patch, chip)
        run = check_cache_case if isinstance(case, CacheCase) else check_case
        run(case, torch.bfloat16, backend)
    return [
        {
            "kernel": name,
            "arch": arch,
            "head_dim": case.head_dim,
            "call": case.name,
            **counters.summary(lines),
        }
        for name, counters in chip.counted.items()
        if backend == "triton" or name.startswith("zinit_add_prompt")
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("archs", nargs="+", type=int)
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--lines", type=int, default=3)
    options = parser.parse_args()
    head_dims = [int(head_dim) for head_dim in options.head_dims.split(",")]
    for chosen, head_dim in itertools.product(options.archs, head_dims):
        every = [(case, "triton") for case in cases(head_dim)]
        for case, backend in (*every, (every[0][0], "hybrid")):
            for line in count(chosen, case, options.lines, backend):
                print(json.dumps(line), flush=True)
