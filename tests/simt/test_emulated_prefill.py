"""The CUDA prefill kernels on the emulator against the float64 reference. Nothing here has run on a GPU."""

import pytest
import torch
from backend_cases import EMULATED, EMULATED_PREFILL_OWN
from orders import in_all_orders

from zinit_kernels import explain, zero_init_attention, zero_init_attention_with_kvcache
from zinit_kernels.backends.cuda import HEAD_DIMS
from zinit_kernels.call import CALL
from zinit_kernels.testing import (
    CacheCase,
    Case,
    check_case,
    make_cache_arguments,
    make_inputs,
)

DTYPES = [torch.bfloat16, torch.float16]
ORDERED = ("lengths", "head_dim_128_window", "prompts_of_two_tiles", "left_padding", "packed_grouped")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("case", [c for c in EMULATED if c.name in ORDERED], ids=str)
def test_the_order_of_threads_and_copies_changes_no_bit(cuda, monkeypatch, case):
    inputs = make_inputs(case, torch.bfloat16)
    assert in_all_orders(monkeypatch, lambda: inputs.call("cuda"))


def test_the_order_of_an_append_changes_no_bit(cuda, monkeypatch):
    def run():
        given = make_cache_arguments(EMULATED_PREFILL_OWN[1], torch.bfloat16)
        result = zero_init_attention_with_kvcache(**given, backend="cuda", return_lse=True)
        return [*result, given["k_cache"], given["v_cache"]]

    assert in_all_orders(monkeypatch, run)


@pytest.mark.parametrize("way", ["gate_zero", "no_row", "row_outside"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_prompt_effect_it_is_plain_attention_bit_for_bit(emulator, way, dtype):
    case = Case("exact", table="indexed", heads_q=4, heads_kv=2, seqlens_q=(140,))
    call = make_inputs(case, dtype).canonical()
    if way == "gate_zero":
        call = call._replace(gate=torch.zeros_like(call.gate), prompt_index=torch.zeros(2, dtype=torch.int32))
        call.prompt_key.nan_to_num_(), call.prompt_value.nan_to_num_()
    else:  # an index outside the table means none too, where only the device can see it
        row = -1 if way == "no_row" else 1000000
        call = call._replace(prompt_index=torch.full((2,), row, dtype=torch.int32))
    plain = call._replace(prompt_key=None, prompt_value=None, gate=None, prompt_index=None)
    ours, expected = (emulator.forward(*CALL.arguments(c)) for c in (call, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_no_bank_is_met_twice(cuda, emulator, head_dim):
    emulator.bank_conflicts()
    check_case(
        Case("banks", head_dim=head_dim, seqlens_q=(33,), batch=1), torch.bfloat16, "cuda", backward=False
    )
    assert emulator.bank_conflicts() == 0


def test_absurd_packed_lengths_stay_inside(emulator):
    case = Case("absurd", packed=True, seqlens_q=(40, 30, 10, 5), heads_q=2, heads_kv=1)
    call = make_inputs(case, torch.bfloat16).canonical()
    absurd = torch.tensor([-5, 2000000000, -2000000000, 60, 2147483647], dtype=torch.int32)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        emulator.forward(*CALL.arguments(call._replace(**{name: absurd})))


def test_absurd_cache_lengths_write_nothing_outside_the_sequence(emulator):
    from test_emulated_decode import canonical

    case = CacheCase("absurd", heads_q=2, heads_kv=1, seqlens=(3, 3, 3), seqlen_q=18, page_size=16)
    given = make_cache_arguments(case, torch.bfloat16)
    for cache in (given["k_cache"], given["v_cache"]):
        cache.nan_to_num_(1.0)
    before = given["k_cache"].clone()
    given["cache_seqlens"] = torch.tensor([2000000000, -7, 3], dtype=torch.int32)
    given["block_table"][:, 2:] = torch.tensor([2000000000, 12345, -1, 99, 77, 55])
    out, _ = emulator.decode(*canonical(given))
    # -7 counts as 0, and the full sequence appends nothing
    changed = (before != given["k_cache"]).any(dim=(1, 2, 3)).nonzero().flatten().tolist()
    assert torch.isfinite(out).all()
    assert sorted(changed) == sorted(given["block_table"][1:, :2].flatten().tolist())


def test_a_chip_that_is_too_small_leaves_the_cache_as_it_was(cuda, monkeypatch):
    case = CacheCase("small_chip", heads_q=2, heads_kv=1, seqlens=(3,), seqlen_q=18, head_dim=256)
    given, before = make_cache_arguments(case, torch.bfloat16), make_cache_arguments(case, torch.bfloat16)
    monkeypatch.setenv("SIMT_SHARED_BYTES", str(64 << 10))
    with pytest.raises(RuntimeError, match="bytes of shared memory asked for, the chip has 65536"):
        zero_init_attention_with_kvcache(**given, backend="cuda")
    for name in ("k_cache", "v_cache"):
        assert torch.equal(given[name].nan_to_num(9), before[name].nan_to_num(9))


def test_a_nan_that_is_seen_is_not_hidden(cuda):
    inputs = make_inputs(Case("nan", heads_q=2, heads_kv=1, seqlens_q=(40,)), torch.bfloat16)
    inputs.tensors["query"][1, 1, 30] = float("nan")
    out, _ = inputs.call("cuda")
    assert out[1, 1, 30].isnan().all()
    out[1, 1, 30] = 0
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [9000.0, 21000.0, 30000.0, 50000.0])
def test_huge_scores_that_are_equal_give_the_mean(cuda, size, dtype):
    # exponents of 2^29 to 2^35: their last bit is 32 or more
    query = torch.full((1, 1, 5, 64), size, dtype=dtype)
    value = torch.randint(-8, 9, (1, 1, 64, 64), generator=torch.Generator().manual_seed(0)).to(dtype)
    key = query[:, :, :1].expand(1, 1, 64, 64).contiguous()
    out = zero_init_attention(query, key, value, None, None, None, is_causal=False, backend="cuda")
    mean = value.double().mean(dim=2, keepdim=True).expand(1, 1, 5, 64)
    torch.testing.assert_close(out.double(), mean, rtol=torch.finfo(dtype).eps, atol=0)


def test_queries_without_keys_and_keys_without_queries(cuda):
    for seqlen_q, seqlen_k in ((0, 5), (5, 0), (0, 0)):
        case = Case("empty", seqlens_q=(seqlen_q,), seqlens_k=(seqlen_k,), causal=False)
        check_case(case, torch.bfloat16, "cuda", backward=False)


def test_what_is_not_supported_is_said(cuda):
    def call(dtype=torch.bfloat16, head_dim=64, **changes):
        inputs = make_inputs(Case("refused", head_dim=head_dim, seqlens_q=(20,)), dtype)
        inputs.tensors.update({name: change(inputs.tensors[name]) for name, change in changes.items()})
        return inputs.call("cuda")

    with pytest.raises(ValueError, match=r"tensor cores, which take bfloat16 and float16.*float32.*triton"):
        call(torch.float32)
    with pytest.raises(ValueError, match=r"head_dim must be one of \(64, 80, 96, 128, 256\), got 72"):
        call(head_dim=72)
    with pytest.raises(ValueError, match="rows of key must start at multiples of 16 bytes, got strides"):
        call(key=lambda t: torch.zeros(*t.shape[:-1], 65, dtype=t.dtype)[..., :64])
    with (
        torch.enable_grad(),
        pytest.raises(ValueError, match="have no backward: call them under torch.no_grad"),
    ):
        call()
    given = make_cache_arguments(EMULATED_PREFILL_OWN[0], torch.float32)
    assert "float32 (backend='triton' takes them)" in explain(**given)["cuda"]
    assert explain(**make_cache_arguments(EMULATED_PREFILL_OWN[0], torch.bfloat16))["cuda"] == "usable"


def test_a_cache_gives_what_fresh_keys_give(cuda):
    inputs = make_inputs(Case("fresh", heads_q=4, heads_kv=2, seqlens_q=(50,)), torch.bfloat16)
    query, key, value, prompt_key, prompt_value, gate = inputs.tensors.values()
    expected = zero_init_attention(*inputs.tensors.values(), is_causal=True, backend="cuda")
    shape = (2, 64, 2, 64)
    out = zero_init_attention_with_kvcache(
        query.transpose(1, 2), torch.zeros(shape).to(query), torch.zeros(shape).to(query), key.transpose(1, 2),
        value.transpose(1, 2), prompt_k=prompt_key.transpose(1, 2), prompt_v=prompt_value.transpose(1, 2), gate=gate,
        cache_seqlens=torch.zeros(2, dtype=torch.int32), causal=True, backend="cuda",
    )  # fmt: skip
    assert torch.equal(out.transpose(1, 2), expected)


# One block must fit into the 99 KB of sm_86, 89 and 120, two into the 164 KB of sm_80 up to head_dim 128.
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_shared_memory_within_budget(emulator, head_dim):
    prefill, prompt = emulator.tile_bytes(head_dim)
    print(f"D {head_dim}: {prefill} bytes of shared memory for prefill, {prompt} for the prompt branch alone")
    assert prefill <= 99 * 1024 and (head_dim > 128 or 2 * (prefill + 1024) <= 164 * 1024)
    assert prompt <= 99 * 1024 and (head_dim > 128 or 2 * (prompt + 1024) <= 100 * 1024)
