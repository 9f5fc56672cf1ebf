"""The counters of interpreted kernels: by hand, and what they say of the Triton kernels."""

import importlib.util

import numpy as np
import pytest
import torch
from ptx_counters import Counters

from bench.problem import Shape
from zinit_kernels.testing import CacheCase, Case, check_cache_case, check_case

WARP = np.arange(32)
SHARED = {  # addresses of a warp's lanes, bytes each -> (passes, passes without conflicts)
    "side by side": (4 * WARP, 4, 1, 1),
    "one word": (0 * WARP, 4, 1, 1),
    "every second word": (8 * WARP, 4, 2, 1),
    "one bank": (128 * WARP, 4, 32, 1),
    "halves": (2 * WARP, 2, 1, 1),
    "16 bytes side by side": (16 * WARP, 16, 4, 4),
    "16 bytes in rows of 128": (128 * WARP, 16, 32, 4),
    "rows of 128, pieces exchanged": (128 * WARP + (WARP % 8) * 16, 16, 4, 4),
    "rows of 144": (144 * WARP, 16, 4, 4),
}


@pytest.mark.parametrize("name", SHARED)
def test_passes_over_shared_memory(name):
    at, size, passes, needed = SHARED[name]
    counters = Counters()
    counters.shared(at, size, WARP, "here:1")
    assert (counters.wavefronts, counters.needed) == (passes, needed)
    assert counters.conflicts["here:1"] == passes - needed


GLOBAL = {  # addresses, bytes each -> (sectors, share of their bytes that is asked for)
    "side by side": (4096 + 4 * WARP, 4, 4, 1.0),
    "not aligned": (4096 + 4 + 4 * WARP, 4, 5, 128 / 160),
    "every second": (4096 + 8 * WARP, 4, 8, 0.5),
    "far apart": (4096 + 64 * WARP, 2, 32, 1 / 16),
    "one": (4096 + 0 * WARP, 4, 1, 1 / 8),
}


@pytest.mark.parametrize("name", GLOBAL)
def test_sectors_of_global_memory(name):
    at, size, sectors, efficiency = GLOBAL[name]
    counters = Counters()
    counters.global_memory(at, size, WARP, False, "here:1")
    counters.global_memory(at, size, WARP, False, "here:1")
    assert (counters.requests, counters.sectors, counters.efficiency) == (2, 2 * sectors, efficiency)
    assert counters.read == 32 * sectors and counters.written == 0


def test_instructions_are_counted_by_warp():
    counters = Counters()
    counters.instruction("ex2.approx.ftz.f32", np.arange(128) < 33)
    counters.instruction("bar.sync", np.arange(128) < 128)
    counters.instruction("wgmma.fence.sync.aligned", np.arange(128) < 128)
    counters.instruction("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", np.arange(128) < 128)
    assert counters.pipes == {"special": 2, "control": 8, "tensor": 4} and counters.barriers == 4


TRAINING = Case("training", batch=1, heads_q=2, heads_kv=1, seqlens_q=(150,), layout="token_major")
DECODE = CacheCase("decode", heads_q=8, heads_kv=2, seqlens=(300, 500), capacity=512, num_splits=2)


def projected_products(name, arch):
    """Products of warps in TRAINING by `python -m bench project`: trips through the loops of the machine code."""
    from bench.project import launches, machine_code, model
    from bench.project.chips import CHIPS

    shape = Shape("training", 1, TRAINING.heads_q, TRAINING.heads_kv, TRAINING.head_dim, 150, 150)
    launch = getattr(launches, name)(shape, CHIPS[{80: "a100", 90: "h100"}[arch]])
    loops = [model.product_loops(launch.kernel.code)[which] for which in launch.kernel.loops]
    codes = [*loops, model.straight_code(launch.kernel)]
    trips = [*map(sum, zip(*launch.trips, strict=True)), len(launch.trips)]
    products = [sum(map(machine_code.is_product, code)) for code in codes]
    return launch.kernel.warps * sum(n * count for n, count in zip(trips, products, strict=True))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("arch", (80, 90))
def test_the_kernels_take_whole_sectors_and_have_no_bank_conflicts(chip, arch):
    """Of the stages that have loops over tiles; what they read once is read once."""
    found = chip(arch)
    found.counted = {}
    check_case(TRAINING, torch.bfloat16, "triton")
    check_cache_case(DECODE, torch.bfloat16, "triton")
    for name in ("forward", "partial_sums", "grad_key_value", "grad_query", "decode"):
        counters = found.counted[f"zinit_{name}_kernel"]
        assert counters.wavefronts == counters.needed > 0, (name, counters.summary(3))
        assert counters.efficiency > 0.97, (name, counters.summary(3))
        if name != "decode":
            assert counters.pipes["tensor"] == projected_products(name, arch)
    counters = found.counted["zinit_add_partials_kernel"]
    assert counters.wavefronts == counters.barriers == 0, "its threads add up what they load"
    assert counters.efficiency > 0.97, counters.summary(3)
    counters = found.counted["zinit_combine_kernel"]
    assert counters.wavefronts == counters.needed and counters.efficiency > 0.98, counters.summary(3)
    row, rows = 2 * 64, 150
    ideal = (2 + 1 + 1) * rows * row + 2 * 10 * row + 2 * 4  # query, key, value; the prompts; the gates
    assert ideal <= found.counted["zinit_forward_kernel"].read <= 1.002 * ideal + 64


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("arch", (80, 90))
def test_the_prompt_terms_of_hybrid_move_what_they_must(chip, arch):
    """Forward's launch and backward's read the query and the output, and write one tensor each."""
    found = chip(arch)
    found.counted = {}
    check_case(TRAINING, torch.bfloat16, "hybrid")
    tensor, tables = 2 * 150 * 2 * 64, 2 * 10 * 2 * 64 + 2 * 4
    for name, read, written in (("add_prompts", 2, 2), ("add_prompt_grad_query", 3, 1)):
        counters = found.counted[f"zinit_{name}_kernel"]
        assert counters.wavefronts == counters.needed > 0, (name, counters.summary(3))
        assert counters.efficiency > 0.97, (name, counters.summary(3))
        assert read * tensor + tables <= counters.read <= 1.002 * (read * tensor + tables) + 64
        assert counters.written == written * tensor
