"""The cache function: every backend against the float64 reference, what is written and what is not."""

import pytest
import torch
from backend_cases import CACHE, DTYPES, backends

from zinit_kernels import arguments, zero_init_attention_with_kvcache
from zinit_kernels.testing import CacheCase, check_cache_case, make_cache_arguments


@pytest.mark.parametrize("backend, case, dtype", CACHE, indirect=["backend"])
def test_against_the_reference(backend, case, dtype):
    check_cache_case(case, dtype, backend)


@pytest.mark.parametrize("backend", backends("cpu", "triton", "cuda"), indirect=True)
@pytest.mark.parametrize("num_splits", [2, 7, 20, 64])
def test_splitting_the_keys_changes_nothing_beyond_rounding(num_splits, backend):
    case = CacheCase("split", capacity=256, seqlens=(249, 3), heads_q=4, heads_kv=2)
    whole = make_cache_arguments(case, torch.float32) | {"num_splits": 1}
    expected = zero_init_attention_with_kvcache(**whole, backend=backend)
    given = make_cache_arguments(case, torch.float32) | {"num_splits": num_splits}
    out = zero_init_attention_with_kvcache(**given, backend=backend)
    torch.testing.assert_close(out, expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize(
    "backend, dtype",
    [
        *(pytest.param("cpu", dtype, marks=pytest.mark.native) for dtype in DTYPES),
        pytest.param("triton", torch.float16, marks=pytest.mark.interpreted),
        *(("cuda", dtype) for dtype in DTYPES),
    ],
    indirect=["backend"],
    ids=str,
)
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("way", ["gate_zero", "no_row", "no_prompts"])
def test_without_prompt_effect_it_is_plain_attention_bit_for_bit(way, num_splits, backend, dtype):
    case = CacheCase("exact", heads_q=8, heads_kv=2, num_splits=num_splits)
    given = make_cache_arguments(case, dtype)
    if way == "gate_zero":
        given["gate"] = 0.0
    elif way == "no_row":
        given["prompt_index"] = torch.full((3,), -1, dtype=torch.int32)
    else:
        given.update(prompt_k=given["prompt_k"][:, :0], prompt_v=given["prompt_v"][:, :0])
    plain = make_cache_arguments(case, dtype) | {"prompt_k": None, "prompt_v": None, "gate": None}
    outputs = [
        zero_init_attention_with_kvcache(**a, backend=backend, return_lse=True) for a in (given, plain)
    ]
    for ours, expected in zip(*outputs, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "backend, dtype",
    [
        pytest.param("cpu", torch.float32, marks=pytest.mark.native),
        pytest.param("triton", torch.float32, marks=pytest.mark.interpreted),
        *(("cuda", dtype) for dtype in DTYPES),
    ],
    indirect=["backend"],
    ids=str,
)
def test_token_by_token_equals_one_chunk(backend, dtype):
    tokens = 24 if backend == "cpu" else 6
    case = CacheCase("chunk", seqlens=(0, 0), seqlen_q=tokens, heads_q=4, heads_kv=2, rotary_dim=64)
    whole, steps = make_cache_arguments(case, dtype), make_cache_arguments(case, dtype)
    expected = zero_init_attention_with_kvcache(**whole, backend=backend)
    tolerance = 5e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for t in range(tokens):
        step = steps | {name: steps[name][:, t : t + 1] for name in ("q", "k", "v")}
        step["cache_seqlens"] = torch.full((2,), t, dtype=torch.int32)
        out = zero_init_attention_with_kvcache(**step, backend=backend)
        torch.testing.assert_close(out, expected[:, t : t + 1], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(steps["k_cache"][:, :tokens], whole["k_cache"][:, :tokens], rtol=0, atol=0)


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


WAYS = [
    CacheCase("plain", append=False, seqlens=(1, 37, 128)),
    CacheCase("append", heads_q=8, heads_kv=2, seqlen_q=3),
    CacheCase("paged", page_size=16, rotary_dim=32, causal=False),
    CacheCase("indexed", table="indexed", gate_activation="identity"),
    CacheCase("no_prompt", table="none", head_major=True),
]


@pytest.mark.native
@pytest.mark.parametrize("case", WAYS, ids=str)
def test_the_short_way_gives_the_bits_of_the_long_one(case, monkeypatch):
    short, long = make_cache_arguments(case, torch.bfloat16), make_cache_arguments(case, torch.bfloat16)
    long["cache_seqlens"] = long["cache_seqlens"].long()  # has to be converted
    expected = zero_init_attention_with_kvcache(**long, return_lse=True)
    monkeypatch.setattr(arguments, "from_cache", lambda *given: pytest.fail("took the long way"))
    found = zero_init_attention_with_kvcache(**short, return_lse=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(short[name].nan_to_num(7.0), long[name].nan_to_num(7.0))


def _convertible() -> dict[str, dict[str, object]]:
    given = make_cache_arguments(CacheCase("convertible"), torch.float32)
    angles = torch.rand(256, 8, dtype=torch.float64)
    return {
        "lengths": {"cache_seqlens": given["cache_seqlens"].long()},
        "gate": {"gate": given["gate"][:, :, None, None]},
        "one_gate": {"gate": torch.tensor(0.5)},
        "three_dimensions": {name: given[name][0] for name in ("prompt_k", "prompt_v")},
        "float64_gate": {"gate": given["gate"].double()},
        "strided_query": {"q": given["q"].mT.contiguous().mT},
        "window": {"window_size": [20, -1]},
        "parameter": {"gate": given["gate"].clone().requires_grad_()},
        "whole_scale": {"softmax_scale": 1},
        "float64_rotary": {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()},
        "rotary_of_two_dtypes": {"rotary_cos": angles.cos().float(), "rotary_sin": angles.sin().half()},
    }


@pytest.mark.native
@pytest.mark.parametrize("name", _convertible())
def test_what_has_to_be_converted_is(name):
    change = _convertible()[name]
    given = [make_cache_arguments(CacheCase("convertible"), torch.float32) | change for _ in range(2)]
    out = zero_init_attention_with_kvcache(**given[0], backend="cpu")
    expected = zero_init_attention_with_kvcache(**given[1], backend="reference")
    assert not out.requires_grad
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.native
def test_one_cache_twice_is_no_place_to_append_to():
    given = make_cache_arguments(CacheCase("aliased"), torch.float32)
    with pytest.raises(ValueError, match="must be two caches that share no memory"):
        zero_init_attention_with_kvcache(**given | {"v_cache": given["k_cache"]})
    shared = {name: given[name][:1].expand(3, -1, -1, -1) for name in ("k_cache", "v_cache")}
    slots = {"k_cache": given["k_cache"][:, :1].expand_as(given["k_cache"])}
    for expanded in (shared, {"v_cache": shared["v_cache"]}, slots):
        with pytest.raises(ValueError, match="slots of its own, not expanded ones"):
            zero_init_attention_with_kvcache(**given | expanded)


def _caches_of_one_buffer():
    """Pairs of views [2, 8, 2, 16] of one buffer: whether they share an element."""
    half = torch.zeros(2, 2, 8, 2, 16)
    fused, wide, windows = torch.zeros(2, 8, 4, 16), torch.zeros(2, 9, 2, 16), torch.zeros(2, 60, 16)
    sliding = windows.as_strided((2, 8, 2, 16), (960, 16, 16, 1))
    return {
        "halves": (half[0], half[1], False),
        "heads of one token": (fused[:, :, :2], fused[:, :, 2:], False),
        "every other head": (fused[:, :, ::2], fused[:, :, 1::2], False),
        "dimensions of one head": (torch.zeros(2, 8, 2, 32)[..., :16], torch.zeros(2, 8, 2, 32)[..., 16:], False),
        "layers of one buffer, head-major": (
            *(layer.transpose(1, 2) for layer in torch.zeros(4, 2, 2, 8, 16)[1:3]), False,
        ),
        "the same view": (wide[:, :8], wide[:, :8], True),
        "one token on": (wide[:, :8], wide[:, 1:], True),
        "other strides": (wide[:, :8], wide.flatten()[:512].view(2, 2, 8, 16).transpose(1, 2), True),
        "sliding windows": (sliding, torch.zeros(2, 8, 2, 16), True),
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", *backends("cpu", "composed", "reference")])
@pytest.mark.parametrize("name", _caches_of_one_buffer())
def test_caches_that_share_memory_are_no_place_to_append_to(name, backend):
    key, value, shared = _caches_of_one_buffer()[name]
    new = torch.randn(2, 1, 2, 16)
    call = dict(
        q=new, k_cache=key, v_cache=value, prompt_k=None, prompt_v=None, gate=None, cache_seqlens=3, causal=True,
        backend=backend,
    )  # fmt: skip
    zero_init_attention_with_kvcache(**call)  # reads
    if shared:
        with pytest.raises(ValueError, match="share no memory, in which every sequence has slots of its own"):
            zero_init_attention_with_kvcache(**call, k=new, v=new)
    else:
        zero_init_attention_with_kvcache(**call, k=new, v=new)
        assert torch.equal(key[:, 3], new[:, 0]) and torch.equal(value[:, 3], new[:, 0])


@pytest.mark.parametrize("backend", ["auto", *backends("cpu", "composed", "reference")])
@pytest.mark.parametrize("name", ["q", "k", "v", "prompt_k", "prompt_v"])
def test_what_is_read_may_not_lie_in_the_caches(name, backend):
    """An append would write over it before it is read."""
    given = make_cache_arguments(CacheCase("aliased"), torch.float32)
    cache, old = "v_cache" if name == "v" else "k_cache", given[name]
    expected = zero_init_attention_with_kvcache(**given | {cache: given[cache].clone()}, backend=backend)
    buffer = torch.zeros(3, 160, 4, 64)
    given[cache] = buffer[:, :128].copy_(given[cache])
    apart = buffer[: len(old), 130 : 130 + old.shape[1]].copy_(old)
    within = given[cache][: len(old), 5 : 5 + old.shape[1]]
    with pytest.raises(ValueError, match=rf"{name} shares memory with k_cache or v_cache.* {name}.clone\(\)"):
        zero_init_attention_with_kvcache(**given | {name: within}, backend=backend)
    assert torch.equal(zero_init_attention_with_kvcache(**given | {name: apart}, backend=backend), expected)


def test_an_index_without_prompts_is_refused():
    given = make_cache_arguments(CacheCase("aliased"), torch.float32)
    index = {
        "prompt_k": None,
        "prompt_v": None,
        "gate": None,
        "prompt_index": torch.zeros(3, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match="gate and prompt_index need"):
        zero_init_attention_with_kvcache(**given | index)


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
