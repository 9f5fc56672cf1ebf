"""The cache function: every backend against the float64 reference, what is written and what is not."""

import pytest
import torch

from zinit_kernels import zero_init_attention_with_kvcache
from zinit_kernels.testing import CACHE_CASES, CacheCase, check_cache_case, make_cache_arguments

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CACHE_CASES, ids=str)
@pytest.mark.native
def test_cpu(case, dtype):
    check_cache_case(case, dtype, "cpu")


@pytest.mark.parametrize("case", CACHE_CASES, ids=str)
def test_composed(case):
    check_cache_case(case, torch.float32, "composed")


@pytest.mark.native
@pytest.mark.parametrize("num_splits", [1, 2, 7, 64])
def test_splitting_the_keys_changes_nothing_beyond_rounding(num_splits):
    case = CacheCase("split", capacity=500, seqlens=(499, 3), heads_q=4, heads_kv=2)
    expected = zero_init_attention_with_kvcache(**make_cache_arguments(case, torch.float32), backend="cpu")
    given = make_cache_arguments(case, torch.float32) | {"num_splits": num_splits}
    out = zero_init_attention_with_kvcache(**given, backend="cpu")
    torch.testing.assert_close(out, expected, rtol=3e-6, atol=3e-6)


@pytest.mark.native
@pytest.mark.parametrize("way", ["gate_zero", "no_row", "no_prompts"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_prompt_effect_it_is_plain_attention_bit_for_bit(way, dtype):
    case = CacheCase("exact", heads_q=8, heads_kv=2, num_splits=2)
    given = make_cache_arguments(case, dtype)
    if way == "gate_zero":
        given["gate"] = 0.0
    elif way == "no_row":
        given["prompt_index"] = torch.full((3,), -1, dtype=torch.int32)
    else:
        given.update(prompt_k=given["prompt_k"][:, :0], prompt_v=given["prompt_v"][:, :0])
    plain = make_cache_arguments(case, dtype) | {"prompt_k": None, "prompt_v": None, "gate": None}
    outputs = [zero_init_attention_with_kvcache(**a, backend="cpu", return_lse=True) for a in (given, plain)]
    for ours, expected in zip(*outputs, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.native
def test_token_by_token_equals_one_chunk():
    case = CacheCase("chunk", seqlens=(0, 0), seqlen_q=24, heads_q=4, heads_kv=2, rotary_dim=64)
    whole = make_cache_arguments(case, torch.float32)
    expected = zero_init_attention_with_kvcache(**whole, backend="cpu")
    steps = make_cache_arguments(case, torch.float32)
    for t in range(24):
        step = steps | {name: steps[name][:, t : t + 1] for name in ("q", "k", "v")}
        step["cache_seqlens"] = torch.full((2,), t, dtype=torch.int32)
        out = zero_init_attention_with_kvcache(**step, backend="cpu")
        torch.testing.assert_close(out, expected[:, t : t + 1], rtol=5e-6, atol=5e-6)
    torch.testing.assert_close(steps["k_cache"][:, :24], whole["k_cache"][:, :24], rtol=0, atol=0)


@pytest.mark.native
def test_version_counters_move_so_that_autograd_notices():
    given = make_cache_arguments(CacheCase("version"), torch.float32)
    before = given["k_cache"]._version, given["v_cache"]._version
    zero_init_attention_with_kvcache(**given, backend="cpu")
    assert (given["k_cache"]._version, given["v_cache"]._version) > before
    with torch.inference_mode():
        zero_init_attention_with_kvcache(
            **make_cache_arguments(CacheCase("inference"), torch.float32), backend="cpu"
        )


BAD_VALUES = {
    "too_long": ({"cache_seqlens": torch.tensor([0, 128, 3], dtype=torch.int32)}, "cache_seqlens.*128"),
    "negative": ({"cache_seqlens": torch.tensor([0, -2, 3], dtype=torch.int32)}, "cache_seqlens.*-2"),
    "page": ({"block_table": torch.full((3, 8), 99, dtype=torch.int32)}, "block_table.*99"),
    "negative_page": ({"block_table": torch.full((3, 8), -1, dtype=torch.int32)}, "block_table.*-1"),
    "row": ({"prompt_index": torch.tensor([0, 1, 0], dtype=torch.int32)}, "prompt_index.*1"),
    "negative_row": ({"prompt_index": torch.tensor([0, -2, 0], dtype=torch.int32)}, "prompt_index.*-2"),
}


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=pytest.mark.native), "composed", "reference"])
@pytest.mark.parametrize("wrong", BAD_VALUES)
def test_bad_values_are_named_and_nothing_is_written(wrong, backend):
    change, message = BAD_VALUES[wrong]
    case = CacheCase("bad", page_size=16) if "page" in wrong else CacheCase("bad")
    given = make_cache_arguments(case, torch.float32) | change
    before = given["k_cache"].clone(), given["v_cache"].clone()
    with pytest.raises((RuntimeError, ValueError), match=message):
        zero_init_attention_with_kvcache(**given, backend=backend)
    for cache, old in zip((given["k_cache"], given["v_cache"]), before, strict=True):
        assert torch.equal(cache.isnan(), old.isnan()) and torch.equal(cache.nan_to_num(), old.nan_to_num())
