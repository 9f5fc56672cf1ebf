"""The composed path's cache calls as they run on a device: all slots under a mask, no length read on the host."""

import pytest
import torch
from backend_cases import DTYPES

from zinit_kernels import zero_init_attention_with_kvcache
from zinit_kernels.arguments import from_cache
from zinit_kernels.backends import composed, whole_cache
from zinit_kernels.testing import (
    CACHE_CASES,
    SINK_CACHE_CASES,
    CacheCase,
    check_cache_case,
    make_cache_arguments,
)

OWN = [
    CacheCase("no_token", append=False, seqlen_q=0),
    CacheCase("append_alone", seqlen_q=3, heads_q=8, heads_kv=2, window=(0, 0)),
    CacheCase("window_of_one_token", window=(20, 0), seqlens=(90, 40, 0), heads_q=8, heads_kv=2),
    CacheCase("window_paged", window=(20, -1), seqlens=(90, 5, 0), page_size=16, append=False),
    CacheCase("window_as_long_as_the_cache", window=(127, 0), seqlens=(127, 5), table="per_sample"),
    CacheCase("window_to_the_right", window=(3, 2), causal=False, seqlen_q=6, leftpad=(0, 30, 90)),
    CacheCase("more_queries_than_keys", append=False, seqlen_q=9, seqlens=(0, 4, 128), heads_q=8, heads_kv=2),
]


@pytest.fixture
def on_a_device(monkeypatch):
    monkeypatch.setattr(composed, "_reads_lengths", lambda call: False)
    called = []
    append = whole_cache.append
    monkeypatch.setattr(whole_cache, "append", lambda call: called.append(call) or append(call))
    yield called
    assert called


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CACHE_CASES, *SINK_CACHE_CASES, *OWN], ids=str)
def test_against_the_reference(case, dtype, on_a_device):
    """The unused slots of these caches are NaN."""
    check_cache_case(case, dtype, "composed")


def shapes_and_reads(case, seqlens):
    """The shapes of all operations of a call against a cache, and those that read a tensor on the host."""
    from torch.utils._python_dispatch import TorchDispatchMode

    shapes, reads = [], []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique"):
                reads.append(name)
            shapes.append((name, *(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))))
            return func(*args, **(kwargs or {}))

    given = make_cache_arguments(case, torch.bfloat16)
    given["cache_seqlens"] = torch.tensor(seqlens, dtype=torch.int32)
    call = from_cache(
        **dict.fromkeys(("softmax_scale", "prompt_index", "rotary_cos", "rotary_sin", "sinks")) | given
    )
    with torch.no_grad(), Record():
        composed.attention_with_cache(call)
    return shapes, reads


@pytest.mark.parametrize("page_size, window", [(0, (-1, -1)), (0, (30, 0)), (16, (-1, -1))])
def test_every_token_asks_for_the_same_shapes_and_reads_nothing(page_size, window, on_a_device):
    """A new shape costs cuDNN a new plan, and a read makes the host wait for the device."""
    case = CacheCase("steps", heads_q=8, heads_kv=2, page_size=page_size, window=window, leftpad=(0, 3, 5))
    first, reads = shapes_and_reads(case, (5, 37, 100))
    assert not reads
    assert shapes_and_reads(case, (6, 38, 101)) == (first, [])
    assert len(first) < 70


def test_the_guard_above_sees_slices_and_reads():
    case = CacheCase("steps", heads_q=8, heads_kv=2)
    (first, reads), (second, _) = (
        shapes_and_reads(case, lengths) for lengths in ((5, 37, 100), (6, 38, 101))
    )
    assert first != second


def test_it_compiles_as_one_graph(on_a_device):
    case = CacheCase("compiled", heads_q=8, heads_kv=2)
    given, expected = make_cache_arguments(case, torch.float32), make_cache_arguments(case, torch.float32)
    step = torch.compile(
        lambda **named: zero_init_attention_with_kvcache(**named, backend="composed"),
        backend="aot_eager",
        fullgraph=True,
    )
    torch.testing.assert_close(step(**given), zero_init_attention_with_kvcache(**expected))
    assert torch.equal(given["k_cache"].isnan(), expected["k_cache"].isnan())
