"""What only the Triton kernels of the cache function have, under Triton's interpreter. tests/backends: all others."""

import pytest
import torch
from far_memory import far_apart

from zinit_kernels import zero_init_attention_with_kvcache
from zinit_kernels.arguments import from_cache
from zinit_kernels.testing import CacheCase, check_cache_case, make_cache_arguments

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize(("num_new", "num_splits"), [(1, 3), (None, 1), (None, 3)])
@pytest.mark.parametrize(
    "case",
    [
        CacheCase("rotary", heads_q=4, heads_kv=2, rotary_dim=16, head_dim=16, seqlen_q=3),
        CacheCase("window", window=(9, -1), seqlen_q=12, seqlens=(3, 60), head_dim=16, heads_q=2, heads_kv=2),
        CacheCase("both_sides", causal=False, window=(9, 2), seqlen_q=5, seqlens=(0, 60), head_dim=16),
        CacheCase("paged", page_size=16, heads_q=4, heads_kv=1, seqlen_q=5, seqlens=(14, 16), capacity=64),
        CacheCase("tiles", heads_q=6, heads_kv=2, seqlen_q=16, seqlens=(40, 0), head_dim=16),
    ],
    ids=str,
)  # fmt: skip
def test_appending_in_the_decode_kernel_is_appending_before_it(monkeypatch, case, num_new, num_splits):
    """With as many new keys as queries, and with fewer."""
    from zinit_kernels.backends.triton import launch

    results = []
    for most in (launch._MOST_FUSED, 0):
        given = make_cache_arguments(case, torch.float32) | {"num_splits": num_splits}
        given |= {name: given[name][:, :num_new] for name in ("k", "v")}
        monkeypatch.setattr(launch, "_MOST_FUSED", most)
        out, lse = zero_init_attention_with_kvcache(**given, backend="triton", return_lse=True)
        results.append({"out": out, "lse": lse, "k_cache": given["k_cache"], "v_cache": given["v_cache"]})
    for name, fused in results[0].items():
        torch.testing.assert_close(
            fused, results[1][name], rtol=3e-6, atol=3e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale, num_splits):
    case = CacheCase("scale", seqlen_q=3, heads_q=2, heads_kv=1, seqlens=(40,), head_dim=16)
    outputs = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        given = make_cache_arguments(case, torch.float32) | {"softmax_scale": scale, "num_splits": num_splits}
        given = {
            name: t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t
            for name, t in given.items()
        }
        outputs.append(zero_init_attention_with_kvcache(**given, backend=backend, return_lse=True))
    for ours, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_more_splits_than_are_combined_at_once(seqlen_q):
    """8 at head dimension 64; most of them without keys in the short sequence."""
    case = CacheCase(
        "many", seqlens=(300, 5), seqlen_q=seqlen_q, heads_q=4, heads_kv=2, capacity=320, num_splits=11
    )
    check_cache_case(case, torch.float32, "triton")


def test_no_queries_still_append():
    given = make_cache_arguments(CacheCase("no_queries", rotary_dim=16), torch.float32)
    expected = make_cache_arguments(CacheCase("no_queries", rotary_dim=16), torch.float32)
    zero_init_attention_with_kvcache(**given | {"q": given["q"][:, :0]}, backend="triton")
    zero_init_attention_with_kvcache(**expected, backend="triton")
    torch.testing.assert_close(given["k_cache"], expected["k_cache"], rtol=0, atol=0, equal_nan=True)


def test_caches_beyond_int32():
    case = CacheCase("far", seqlens=(20, 31), capacity=40, head_dim=16, heads_q=2, heads_kv=2)
    results = []
    for move in (False, True):
        given = make_cache_arguments(case, torch.float16)
        if move:
            given |= {"k_cache": far_apart(given["k_cache"], 0), "v_cache": far_apart(given["v_cache"], 0)}
        out = zero_init_attention_with_kvcache(**given, backend="triton")
        results.append((out, given["k_cache"].nan_to_num(), given["v_cache"].nan_to_num()))
    for near, far in zip(*results, strict=True):
        assert torch.equal(near, far)


def test_opcheck_decode():
    given = make_cache_arguments(CacheCase("paged", page_size=16, head_dim=16, rotary_dim=16), torch.float32)
    for name in ("k_cache", "v_cache"):
        given[name] = torch.nan_to_num(given[name])
    torch.library.opcheck(torch.ops.zinit.decode_triton.default, _canonical_cache(given))


def test_compiles_as_one_graph():
    case = CacheCase("compiled", page_size=16, head_dim=16, rotary_dim=16, seqlen_q=3, num_splits=2)

    def step(given):
        out = zero_init_attention_with_kvcache(**given, backend="triton")
        return out, given["k_cache"].nan_to_num(), given["v_cache"].nan_to_num()

    results = [
        run(make_cache_arguments(case, torch.float32))
        for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))
    ]
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def _canonical_cache(given):
    defaults = {**zero_init_attention_with_kvcache.__kwdefaults__, **given}
    defaults.pop("return_lse")
    defaults.pop("backend")
    return tuple(from_cache(**defaults))


def test_pages_that_do_not_exist_are_named_and_the_kernels_leave_them():
    given = make_cache_arguments(CacheCase("bad", page_size=16), torch.float32)
    given["block_table"] = torch.full((3, 8), 99, dtype=torch.int32)
    before = given["k_cache"].clone()
    with pytest.raises(ValueError, match="block_table.*99"):
        zero_init_attention_with_kvcache(**given, backend="triton")
    torch.ops.zinit.decode_triton(*_canonical_cache(given))
    assert torch.equal(before.isnan(), given["k_cache"].isnan())


def test_every_kernel_has_a_range_for_profilers():
    given = make_cache_arguments(CacheCase("profiled", head_dim=16, seqlen_q=17, seqlens=(3,)), torch.float32)
    with torch.profiler.profile() as profile:
        zero_init_attention_with_kvcache(**given, backend="triton")
    names = [event.name for event in profile.events() if event.name.startswith("zinit.")]
    assert names == ["zinit.decode.append", "zinit.decode"]
