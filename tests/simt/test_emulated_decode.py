"""The CUDA decode kernels on the emulator against the float64 reference. Nothing here has run on a GPU."""

import pytest
import torch
from backend_cases import EMULATED_DECODE

from zinit_kernels import zero_init_attention_with_kvcache
from zinit_kernels.arguments import from_cache
from zinit_kernels.backends.cuda import HEAD_DIMS
from zinit_kernels.testing import CACHE_CASES, CacheCase, make_cache_arguments

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCHEDULES = ("forward", "reverse", "random1")
SCHEDULED = (
    "lengths_grouped",
    "three_rows",
    "append_across_splits",
    "rotary_split",
    "paged",
    "indexed_split",
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in EMULATED_DECODE if c.name in SCHEDULED], ids=str)
def test_the_order_of_threads_and_blocks_changes_no_bit(cuda, monkeypatch, case, dtype):
    results = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("SIMT_SCHEDULE", schedule)
        given = make_cache_arguments(case, dtype)
        out, lse = zero_init_attention_with_kvcache(**given, backend="cuda", return_lse=True)
        results.append([t.nan_to_num(7.0) for t in (out, lse, given["k_cache"], given["v_cache"])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("way", ["gate_zero", "no_row", "row_outside"])
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_prompt_effect_it_is_plain_attention_bit_for_bit(emulator, way, num_splits, dtype):
    case = CacheCase("exact", heads_q=8, heads_kv=2, num_splits=num_splits)
    given = make_cache_arguments(case, dtype)
    if way == "gate_zero":  # whatever the table holds
        given["gate"] = 0.0
        for table in (given["prompt_k"], given["prompt_v"]):
            table[..., 3] = float("nan")
    else:  # an index outside the table means none too, where only the device can see it
        row = -1 if way == "no_row" else 1000000
        given["prompt_index"] = torch.full((3,), row, dtype=torch.int32)
    plain = make_cache_arguments(case, dtype) | {"prompt_k": None, "prompt_v": None, "gate": None}
    ours, expected = (emulator.decode(*canonical(arguments)) for arguments in (given, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("heads_q", [2, 8], ids=["cuda_cores", "tensor_cores"])
def test_a_head_at_gate_zero_is_plain_beside_one_that_is_not(emulator, heads_q):
    case = CacheCase("one_head", heads_q=heads_q, heads_kv=2, num_splits=1)
    given = make_cache_arguments(case, torch.bfloat16)
    given["gate"][..., 0] = 0.0
    given["prompt_v"][..., 0, :] = float("inf")
    plain = make_cache_arguments(case, torch.bfloat16) | {"prompt_k": None, "prompt_v": None, "gate": None}
    (out, _), (expected, _) = (emulator.decode(*canonical(arguments)) for arguments in (given, plain))
    assert torch.equal(out[:, :, 0], expected[:, :, 0])
    assert not torch.equal(out[:, :, 1], expected[:, :, 1])


def canonical(given):
    options = {**zero_init_attention_with_kvcache.__kwdefaults__, **given}
    return from_cache(**{k: v for k, v in options.items() if k not in ("return_lse", "backend")})


@pytest.mark.parametrize("heads_q", [2, 8], ids=["cuda_cores", "tensor_cores"])
def test_absurd_lengths_write_nothing_outside_the_sequence(emulator, heads_q):
    case = CacheCase("absurd", heads_q=heads_q, heads_kv=2, seqlens=(3, 3, 3), seqlen_q=2, page_size=16)
    given = make_cache_arguments(case, torch.bfloat16)
    for cache in (given["k_cache"], given["v_cache"]):
        cache.nan_to_num_(1.0)
    before = given["k_cache"].clone()
    given["cache_seqlens"] = torch.tensor([2000000000, -7, 3], dtype=torch.int32)
    given["block_table"][:, 1:] = torch.tensor([-2000000000, 2000000000, 12345, -1, 99, 77, 55])
    out, _ = emulator.decode(*canonical(given))
    # -7 counts as 0, and the full sequence appends nothing
    changed = (before != given["k_cache"]).any(dim=(1, 2, 3)).nonzero().flatten().tolist()
    assert torch.isfinite(out).all()
    assert sorted(changed) == sorted(given["block_table"][1:, 0].tolist())


def test_an_append_to_a_page_outside_the_pool_is_dropped(emulator):
    case = CacheCase("dropped", heads_kv=2, heads_q=2, seqlens=(16,), page_size=16)
    given = make_cache_arguments(case, torch.float32)
    for cache in (given["k_cache"], given["v_cache"]):
        cache.nan_to_num_(1.0)
    before = given["k_cache"].clone(), given["v_cache"].clone()
    given["block_table"][0, 1] = 2147483647
    out, _ = emulator.decode(*canonical(given))
    assert torch.isfinite(out).all()
    assert torch.equal(before[0], given["k_cache"]) and torch.equal(before[1], given["v_cache"])


@pytest.mark.parametrize("seqlen_q, batch", [(0, 3), (1, 0), (0, 0)])
def test_nothing_to_attend_with_still_appends(emulator, seqlen_q, batch):
    case = CacheCase("empty", heads_q=8, heads_kv=2, num_splits=2, seqlens=(0, 37, 100)[:batch])
    given, expected = (make_cache_arguments(case, torch.bfloat16) for _ in range(2))
    given["q"] = given["q"][:, :seqlen_q]
    out, lse = emulator.decode(*canonical(given))
    assert out.shape == (batch, seqlen_q, 8, 64) and lse.shape == (batch, 8, seqlen_q)
    zero_init_attention_with_kvcache(**expected, backend="reference")
    assert torch.equal(given["k_cache"].nan_to_num(9), expected["k_cache"].nan_to_num(9))
    assert torch.equal(given["v_cache"].nan_to_num(9), expected["v_cache"].nan_to_num(9))


def test_a_nan_that_is_seen_is_not_hidden(emulator):
    given = make_cache_arguments(CacheCase("nan", heads_q=8, heads_kv=2, num_splits=2), torch.bfloat16)
    given["q"][1, 0, 3] = float("nan")
    out, _ = emulator.decode(*canonical(given))
    assert out[1, :, 3].isnan().all() and torch.isfinite(out[1, :, :3]).all() and torch.isfinite(out[0]).all()


@pytest.mark.parametrize("case", [c for c in CACHE_CASES if c not in EMULATED_DECODE], ids=str)
def test_what_is_not_supported_is_said(cuda, case):
    with pytest.raises(
        ValueError, match="backend 'cuda' cannot run .*(head_dim must be one of|which take bfloat16 and)"
    ):
        zero_init_attention_with_kvcache(**make_cache_arguments(case, torch.float32), backend="cuda")


def test_misaligned_caches_are_refused(cuda):
    given = make_cache_arguments(CacheCase("misaligned", seqlens=(3,)), torch.bfloat16)
    wide = torch.zeros(1, 128, 4, 65, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="rows of k_cache must start at multiples of 16 bytes, got strides"):
        zero_init_attention_with_kvcache(**given | {"k_cache": wide[..., :64]}, backend="cuda")
    shifted = torch.zeros(128 * 4 * 64 + 1, dtype=torch.bfloat16)[1:].view(1, 128, 4, 64)
    with pytest.raises(ValueError, match="v_cache must start at a multiple of 16 bytes, got address"):
        zero_init_attention_with_kvcache(**given | {"v_cache": shifted}, backend="cuda")


# Shared memory: two blocks must fit into the 100 KB of sm_86, 89 and 120 in a usual call, and one always.
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("rows, element_bytes", [(1, 2), (4, 2), (16, 2), (1, 4), (4, 4)])
def test_shared_memory_within_budget(emulator, rows, element_bytes, head_dim):
    usual = emulator.shared_bytes(rows, head_dim, element_bytes, prompt_length=10, new_tokens=1)
    most = emulator.shared_bytes(rows, head_dim, element_bytes, prompt_length=128, new_tokens=16)
    print(f"{rows} rows, D {head_dim}, {element_bytes} bytes: {usual} to {most} bytes of shared memory")
    assert 2 * (usual + 1024) <= 100 * 1024 and most <= 99 * 1024
