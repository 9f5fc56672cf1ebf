"""The cases and dtypes that every backend is tested with, and what each can take of them where there is no GPU.

The backend "cuda" is emulated, and has no backward. "triton" is interpreted: it is slow, so the named cases run with
fewer heads and shorter sequences. Its tiles are 32 x 32 there, so 70 tokens still take whole, masked and cut tiles.
bfloat16 queries are left out: the interpreter computes them on bit patterns (triton issue 11584).
"hybrid" runs its prompt kernels in the interpreter too, and takes no masks.
"""

from dataclasses import replace

import pytest
import torch

from zinit_kernels.backends.cuda import HEAD_DIMS, MAX_DECODE_TOKENS
from zinit_kernels.testing import CACHE_CASES, CASES, SINK_CACHE_CASES, SINK_CASES, CacheCase, Case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DENSE = Case("dense", mask="dense", causal=False)
_MARKS = {"cpu": pytest.mark.native, "triton": pytest.mark.interpreted, "hybrid": pytest.mark.interpreted}


def backends(*names):
    """The parameters of a test's `backend`."""
    return [pytest.param(name, marks=_MARKS.get(name, ())) for name in names]


def _parameters(groups):
    return [
        pytest.param(backend, case, dtype, marks=_MARKS.get(backend, ()), id=f"{backend}-{case}-{dtype}")
        for backend, cases, dtypes in groups
        for case in cases
        for dtype in dtypes
    ]


_LONGEST = 70
_HALF_PRECISION = (
    "plain", "odd", "multi_query", "window_both_sides", "left_padding", "prompt_length_128", "indexed",
    "float32_prompts", "packed_grouped", "packed_bottom_right",
)  # fmt: skip


def short(case: Case) -> Case:
    """The case with at most _LONGEST tokens a sequence."""
    lengths_k = case.seqlens_k and tuple(min(n, _LONGEST) for n in case.seqlens_k)
    return replace(case, seqlens_q=tuple(min(n, _LONGEST) for n in case.seqlens_q), seqlens_k=lengths_k)


def small(case: Case) -> Case:
    """A short case with at most two query heads per key head, and two key heads."""
    heads_kv, group = min(case.heads_kv, 2), case.heads_q // case.heads_kv
    heads_kv = 1 if group == 1 and case.gate != "per_row" else heads_kv
    return replace(short(case), heads_q=heads_kv * min(group, 2), heads_kv=heads_kv)


INTERPRETED = [
    *(small(case) for case in (*CASES, *SINK_CASES)),
    Case(
        "window_with_whole_tiles",
        batch=1,
        heads_q=1,
        heads_kv=1,
        seqlens_q=(150,),
        window=(75, -1),
        head_dim=16,
    ),
    Case(
        "many_tiles",
        batch=1,
        heads_q=2,
        heads_kv=1,
        seqlens_q=(150,),
        seqlens_k=(130,),
        causal=False,
        head_dim=16,
    ),
    Case("negative_scale", batch=1, heads_q=2, heads_kv=1, seqlens_q=(40,), head_dim=16, scale=-0.3),
    Case("zero_scale", batch=1, heads_q=1, heads_kv=1, seqlens_q=(40,), head_dim=16, scale=0.0),
    Case("large_scores", batch=1, heads_q=1, heads_kv=1, seqlens_q=(70,), head_dim=16, scale=4.0),
    Case(
        "all_at_once", batch=3, heads_q=4, heads_kv=2, seqlens_q=(50,), window=(20, -1), mask="left_padding",
        table="indexed", gate="per_row", prompt_length=33, head_dim=48, layout="sliced", scale=0.3,
    ),
    Case(
        "packed_at_once", packed=True, heads_q=4, heads_kv=2, seqlens_q=(0, 41, 9), seqlens_k=(3, 50, 1),
        window=(15, -1), table="indexed", prompt_length=65, head_dim=20,
    ),
]  # fmt: skip
_UNMASKED = (
    "plain", "one_query", "odd", "tiny_head", "head_dim_256", "cross", "cross_short_keys", "grouped", "no_prompt",
    "prompt_length_0", "prompt_length_128", "indexed", "gate_zero", "float32_prompts", "sliced", "scaled",
)  # fmt: skip
_UNMASKED_HALF_PRECISION = ("odd", "multi_query", "cross", "indexed", "token_major", "float32_prompts")
_CACHE_HALF_PRECISION = (
    "grouped", "chunk", "paged_chunk", "rotary", "rotary_interleaved", "split", "odd_head", "indexed",
)  # fmt: skip
EMULATED_OWN = [
    Case("lengths", packed=True, seqlens_q=(0, 1, 15, 16, 17, 129), heads_q=4, heads_kv=2, head_dim=64),
    Case("lengths_bottom_right", packed=True, seqlens_q=(1, 15, 17), seqlens_k=(16, 129, 0), head_dim=128, batch=1),
    Case("head_dim_80", head_dim=80, heads_q=2, heads_kv=1, batch=1, seqlens_q=(129,)),
    Case("head_dim_96_padding", head_dim=96, heads_q=2, heads_kv=2, mask="padding", seqlens_q=(70,)),
    Case("head_dim_128_window", head_dim=128, heads_q=2, heads_kv=1, batch=1, window=(37, -1), seqlens_q=(150,)),
    Case("head_dim_256_cross", head_dim=256, heads_q=2, heads_kv=1, batch=1, causal=False, seqlens_k=(67,)),
    Case("prompts_of_two_tiles", head_dim=256, heads_q=2, heads_kv=1, batch=1, prompt_length=33, seqlens_q=(17,)),
    Case("prompts_of_four_tiles", head_dim=128, heads_q=2, heads_kv=1, batch=1, prompt_length=128, seqlens_q=(17,)),
    Case("prompts_converted", head_dim=128, heads_q=2, heads_kv=1, prompt_dtype=torch.float32, table="per_sample"),
    Case("additive_window", mask="additive", window=(20, 3), causal=False, heads_q=2, heads_kv=2),
    Case("negative_scale", scale=-0.2, heads_q=2, heads_kv=2),
    Case("scale_0", scale=0.0, heads_q=2, heads_kv=2),
]  # fmt: skip
EMULATED = [*(c for c in (*CASES, *SINK_CASES) if c.head_dim in HEAD_DIMS), *EMULATED_OWN]
EMULATED_PREFILL_OWN = [
    CacheCase("prefill_lengths", seqlens=(0, 1, 15, 16, 17), seqlen_q=17, heads_q=4, heads_kv=2),
    CacheCase("prefill_paged", seqlens=(0, 15, 16), seqlen_q=33, page_size=16, rotary_dim=64, heads_q=2, heads_kv=1),
    CacheCase("pages_of_48", seqlens=(100, 0), seqlen_q=20, page_size=48, capacity=144, head_dim=96, heads_kv=2),
    CacheCase("prefill_interleaved", seqlens=(9,), seqlen_q=130, capacity=144, rotary_dim=32, rotary_interleaved=True),
    CacheCase("prefill_bidirectional", seqlens=(3,), seqlen_q=18, rotary_dim=64, causal=False, head_dim=80, heads_kv=2),
    CacheCase("prefill_window", seqlens=(90, 3), seqlen_q=20, window=(30, -1), page_size=16, head_dim=128, heads_kv=1),
    CacheCase("prefill_head_dim_256", seqlens=(40,), seqlen_q=17, head_dim=256, heads_q=2, heads_kv=1, head_major=True),
    CacheCase("prefill_no_append", seqlens=(100, 0, 128), seqlen_q=21, append=False, table="indexed"),
    CacheCase("prefill_per_sample", seqlens=(20, 5), seqlen_q=17, table="per_sample", gate_activation="identity"),
]  # fmt: skip
_FITTING = [c for c in (*CACHE_CASES, *SINK_CACHE_CASES) if c.head_dim in HEAD_DIMS]
EMULATED_PREFILL = [
    *(c for c in _FITTING if c.seqlen_q > MAX_DECODE_TOKENS),
    *EMULATED_PREFILL_OWN,
]
EMULATED_DECODE = [
    *(c for c in _FITTING if c.seqlen_q <= MAX_DECODE_TOKENS),
    CacheCase("lengths", seqlens=(0, 1, 15, 16, 17), heads_q=4, heads_kv=2, num_splits=2),
    CacheCase("lengths_grouped", seqlens=(0, 1, 15, 16, 17), heads_q=8, heads_kv=2, num_splits=2, page_size=16),
    CacheCase("4095", capacity=4096, seqlens=(4095,), heads_q=8, heads_kv=2, page_size=16),
    CacheCase("head_dim_80", head_dim=80, heads_q=2, heads_kv=2),
    CacheCase("head_dim_96", head_dim=96, heads_q=8, heads_kv=2, page_size=48, capacity=144),
    CacheCase("head_dim_128_alone", head_dim=128, heads_q=2, heads_kv=2, num_splits=2),
    CacheCase("head_dim_256_grouped", head_dim=256, heads_q=8, heads_kv=2, seqlen_q=2),
    CacheCase("three_rows", heads_q=6, heads_kv=2),
    CacheCase("sixteen_tokens", heads_q=4, heads_kv=2, seqlen_q=16, page_size=16, seqlens=(5, 40)),
    CacheCase("seventeen_rows", heads_q=17, heads_kv=1, num_splits=2),
    CacheCase("splits_without_keys", heads_q=8, heads_kv=2, seqlens=(0, 3, 40), num_splits=30),
    CacheCase("append_across_splits", heads_q=4, heads_kv=1, seqlen_q=9, seqlens=(12, 28), num_splits=3),
    CacheCase("window_paged", window=(20, -1), seqlens=(100, 5), seqlen_q=5, heads_q=8, heads_kv=2, page_size=16),
    CacheCase("window_both_sides", window=(9, 2), causal=False, seqlens=(50, 5), seqlen_q=3, num_splits=2),
    CacheCase("rotary_split", rotary_dim=48, seqlen_q=4, heads_q=8, heads_kv=2, num_splits=2),
    CacheCase("prompt_length_128", prompt_length=128, heads_q=8, heads_kv=2, table="indexed"),
    CacheCase("indexed_split", table="indexed", num_splits=2, heads_q=8, heads_kv=2),
    CacheCase("per_sample_identity", table="per_sample", gate_activation="identity", num_splits=2),
]  # fmt: skip


ATTENTION = _parameters(
    [
        ("cpu", [*CASES, *SINK_CASES], DTYPES),
        ("composed", [*CASES, *SINK_CASES, DENSE], DTYPES[:1]),
        ("reference", [DENSE], DTYPES[:1]),
        ("triton", INTERPRETED, DTYPES[:1]),
        # with all heads: the rule compares with eager's largest error, and of one gate's gradient that is luck
        ("triton", [short(case) for case in CASES if case.name in _HALF_PRECISION], [torch.float16]),
        ("cuda", EMULATED, DTYPES[1:]),
        ("hybrid", [small(case) for case in CASES if case.name in _UNMASKED], DTYPES[:1]),
        ("hybrid", [short(case) for case in CASES if case.name in _UNMASKED_HALF_PRECISION], [torch.float16]),
    ]
)
CACHE = _parameters(
    [
        ("cpu", [*CACHE_CASES, *SINK_CACHE_CASES], DTYPES),
        ("composed", [*CACHE_CASES, *SINK_CACHE_CASES], DTYPES[:1]),
        ("triton", [*CACHE_CASES, *SINK_CACHE_CASES], DTYPES[:1]),
        ("triton", [c for c in CACHE_CASES if c.name in _CACHE_HALF_PRECISION], [torch.float16]),
        ("cuda", EMULATED_DECODE, DTYPES),
        ("cuda", EMULATED_PREFILL, DTYPES[1:]),
    ]
)
