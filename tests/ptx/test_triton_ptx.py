"""What Triton compiles for sm_80 and sm_90, as it chooses tiles there, against the float64 reference.

A few small cases of every kernel. `make test-ptx` runs all named cases, in bfloat16 and float16. Nothing here has run
on a GPU.
"""

import importlib.util
import itertools
import os
import re

import pytest
import torch
from ptx_memory import Fault

from zinit_kernels import dispatch, proof
from zinit_kernels.proof import trial
from zinit_kernels.testing import (
    CACHE_CASES,
    CASES,
    SINK_CACHE_CASES,
    SINK_CASES,
    CacheCase,
    Case,
    check_cache_case,
    check_case,
    make_inputs,
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CHIPS = (80, 90)
WHOLE_LIST_OF = [int(chip) for chip in os.environ.get("ZINIT_PTX_CHIPS", "").split()]
HALVES = (torch.bfloat16, torch.float16)
TRAINING = Case("training", batch=1, heads_q=2, heads_kv=1, seqlens_q=(150,))
ONE_TOKEN = CacheCase("one_token", heads_q=8, heads_kv=2, seqlens=(60, 200), capacity=256, num_splits=2)
CHUNK = CacheCase("chunk", heads_q=2, heads_kv=1, seqlens=(0, 100), seqlen_q=19, rotary_dim=64, page_size=16)
TRAINING_KERNELS = [
    "zinit_forward_kernel", "zinit_partial_sums_kernel", "zinit_add_partials_kernel", "zinit_grad_key_value_kernel",
    "zinit_grad_query_kernel",
]  # fmt: skip


HYBRID_KERNELS = [
    "zinit_add_prompts_kernel", "zinit_add_prompts_kernel", "zinit_add_prompt_grad_query_kernel",
    "zinit_partial_sums_kernel", "zinit_add_partials_kernel",
]  # fmt: skip


def check(case, dtype, backend="triton"):
    run = check_cache_case if isinstance(case, CacheCase) else check_case
    run(case, dtype, backend)


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize(
    ("case", "dtype", "kernels"),
    [
        (TRAINING, torch.bfloat16, TRAINING_KERNELS),
        (ONE_TOKEN, torch.float16, ["zinit_decode_kernel", "zinit_combine_kernel"]),
        (CHUNK, torch.bfloat16, ["zinit_append_kernel", "zinit_decode_kernel"]),
    ],
    ids=lambda value: str(value) if isinstance(value, Case | CacheCase) else "",
)
def test_against_the_reference(chip, case, dtype, kernels, arch):
    launches = chip(arch)
    check(case, dtype)
    assert launches.launched == kernels


@pytest.mark.parametrize("arch", CHIPS)
def test_the_prompts_of_hybrid(chip, arch):
    """Around PyTorch's CPU kernel; bfloat16, which Triton's own interpreter cannot compute."""
    launches = chip(arch)
    check(TRAINING, torch.bfloat16, "hybrid")
    assert launches.launched == HYBRID_KERNELS


@pytest.mark.parametrize(
    "arch, dtype",
    itertools.product(WHOLE_LIST_OF, HALVES) if WHOLE_LIST_OF else zip(CHIPS, HALVES, strict=True),
)
def test_linear_layers_of_a_few_rows(chip, dtype, arch, monkeypatch):
    """By their trial: odd and even sizes, 1 to 20 rows, NaN around every tensor."""
    launches = chip(arch)
    monkeypatch.setattr(trial, "SEEDS", (0,))
    trial.run(proof.Subject(proof.FEW_ROWS, dtype, None), torch.device("cpu"))
    assert launches.launched == ["zinit_few_rows_kernel"] * 12


if WHOLE_LIST_OF:

    @pytest.mark.parametrize("arch", WHOLE_LIST_OF)
    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize(
        "case",
        [*CASES, *SINK_CASES, *CACHE_CASES, *SINK_CACHE_CASES],
        ids=lambda case: f"cache_{case}" if isinstance(case, CacheCase) else str(case),
    )
    def test_every_named_case(chip, case, dtype, arch):
        chip(arch)
        check(case, dtype)

    @pytest.mark.parametrize("arch", WHOLE_LIST_OF)
    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_every_named_case_of_hybrid(chip, case, dtype, arch):
        chip(arch)
        reason = dispatch.why_not("hybrid", make_inputs(case, dtype).canonical(), False)
        if reason:
            with pytest.raises(ValueError, match=re.escape(reason)):
                check(case, dtype, "hybrid")
        else:
            check(case, dtype, "hybrid")


# Bugs in the code: (chip, kernel, pattern, replacement, how many of its occurrences are wrong)
HOPPER = 4611686018427387904 + (1024 >> 4 << 32)  # a descriptor's mode and stride offset
SWAPPED = 4611686018427387904 + (1024 >> 4 << 16)
NARROWER = HOPPER + 4611686018427387904  # the mode of 64 bytes
# a mask of scores: two columns that are compared with the limit of one row, and then with that of another one
LESS = (
    r"setp\.lt\.s32(\s+%p\d+, (%r\d+), (%r\d+);\s+setp\.lt\.s32\s+%p\d+, %r\d+, \3;"
    r"\s+setp\.lt\.s32\s+%p\d+, \2, (?!\3))"
)
BUGS = {
    "copies_not_waited_for": (80, "forward", r"cp.async.wait_group\s+2", "cp.async.wait_group 4", 1),
    "no_barrier_after_the_wait": (80, "forward", r"(wait_group\s+2;\s+)bar.sync\s+0;", r"\1", 1),
    "matrix_not_transposed": (80, "forward", r"x4\.trans", "x4", 1),
    "words_of_a_matrix_swapped": (80, "grad_query", r"(ldmatrix\S+ \{)(%r\d+), (%r\d+)", r"\1\3, \2", 1),
    "shuffle_of_another_lane": (80, "forward", r"bfly.b32(\s+%r\d+, %r\d+), 2", r"bfly.b32\1, 4", 1),
    "sum_over_half_of_the_keys": (80, "partial_sums", r"(add.f32\s+(%r\d+), (%r\d+)), %r\d+", r"\1, \3", 1),
    # one comparison of the many of a tile: a key too far for some rows, a query too few for some keys
    "mask_off_by_one": (80, "forward", LESS, r"setp.le.s32\1", 1),
    "mask_off_by_one_on_hopper": (90, "forward", LESS, r"setp.le.s32\1", 1),
    "mask_of_the_queries_off_by_one": (80, "grad_key_value", LESS.replace("lt", "ge"), r"setp.gt.s32\1", 1),
    "products_not_waited_for": (90, "forward", r"(wgmma.wait_group.sync.aligned) 0", r"\1 1", 1),
    "no_fence_of_the_registers": (90, "grad_query", r"wgmma.fence.sync.aligned;", "", 1),
    "no_fence_of_the_proxy": (90, "grad_key_value", r"fence.proxy.async.shared::cta;", "", 2),
    "descriptor_with_its_offsets_swapped": (90, "forward", rf"\b{HOPPER}\b", str(SWAPPED), 1),
    "descriptor_of_another_swizzle": (90, "forward", rf"\b{HOPPER}\b", str(NARROWER), 1),
    "descriptor_not_advanced": (90, "grad_query", rf"\b{HOPPER + 2}\b", str(HOPPER), 1),
    "operand_not_transposed": (90, "forward", r"(%p\d+, 1, 1), 1;", r"\1, 0;", 1),
    "words_of_a_stored_matrix_swapped": (
        90, "partial_sums", r"(stmatrix\S+ \[\S+\]), \{(%r\d+), (%r\d+)", r"\1, {\3, \2", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_in_the_code_is_caught(chip, name):
    arch, kernel, pattern, replacement, count = BUGS[name]
    planted = []

    def plant(text):
        if f"zinit_{kernel}_kernel" not in text:
            return text
        changed, found = re.subn(pattern, replacement, text, count=count)
        planted.append(found)
        return changed

    chip(arch, change=plant)
    with pytest.raises((AssertionError, Fault)) as caught:
        check(TRAINING, torch.bfloat16)
    print(caught.value)
    assert planted == [count], "the pattern is not in the code: plant the bug elsewhere"
