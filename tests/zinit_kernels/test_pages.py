"""Keys and values at places that a table names: `block_table` of packed calls, `cache_batch_idx` and `cache_leftpad`
of caches."""

import pytest
import torch

from zinit_kernels import zero_init_attention_varlen, zero_init_attention_with_kvcache
from zinit_kernels.testing import CacheCase, Case, make_cache_arguments, make_inputs
from zinit_kernels.testing.cases import GRADIENTS

BACKENDS = [pytest.param("cpu", marks=pytest.mark.native), "composed", "reference"]
CASES = [
    Case("bottom_right", packed=True, seqlens_q=(7, 40, 3), seqlens_k=(31, 12, 3), heads_q=4, heads_kv=2, head_dim=16),
    Case("empty", packed=True, seqlens_q=(5, 0, 3), seqlens_k=(0, 12, 17), causal=False, head_dim=5),
    Case("window", packed=True, seqlens_q=(33, 1), window=(11, 0), head_dim=16),
]  # fmt: skip


def paged(case, page_size):
    """(packed inputs, the same with keys and values in pages): unused slots and dead pages hold NaN."""
    inputs = make_inputs(case, torch.float32)
    lengths = case.seqlens_k or case.seqlens_q
    pages_each = -(-max(lengths) // page_size) + 1
    order = torch.randperm(len(lengths) * pages_each + 2)[: len(lengths) * pages_each].view(
        len(lengths), pages_each
    )
    pages = {}
    for name in ("key", "value"):
        packed = inputs.tensors[name].detach()
        pool = packed.new_full((len(lengths) * pages_each + 2, page_size, *packed.shape[1:]), float("nan"))
        for row, start, length in zip(order, inputs.options["cu_seqlens_k"].tolist(), lengths, strict=False):
            for i in range(length):
                pool[row[i // page_size], i % page_size] = packed[start + i]
        pages[name] = pool.requires_grad_()
    table = order.to(torch.int32)
    for row, length in zip(table, lengths, strict=True):
        row[-(-length // page_size) :] = 2**31 - 1
    other = inputs.to(None)
    other.tensors |= pages
    other.options = other.options | {"block_table": table}
    return inputs, other


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_pages_are_the_packed_keys(case, page_size, backend):
    packed, pages = paged(case, page_size)
    outputs = [one.call(backend, return_lse=False)[0] for one in (packed, pages)]
    assert torch.equal(*outputs)
    weights = torch.randn_like(outputs[0])
    grads = [
        dict(zip(GRADIENTS, torch.autograd.grad(out, one.tensors.values(), weights), strict=True))
        for out, one in zip(outputs, (packed, pages), strict=True)
    ]
    table, starts = pages.options["block_table"], packed.options["cu_seqlens_k"].tolist()
    for name in ("key", "value"):
        found = torch.zeros_like(grads[1][name])
        for row, start, end in zip(table.tolist(), starts, starts[1:], strict=False):
            for i in range(end - start):
                found[row[i // page_size], i % page_size] = grads[0][name][start + i]
        assert torch.equal(grads[1].pop(name), found)  # 0 where no sequence has a key
    for name, grad in grads[1].items():
        assert torch.equal(grad, grads[0][name]), name


def test_a_shared_page_gets_the_sum_of_its_gradients():
    key = torch.randn(1, 4, 2, 8, dtype=torch.float64, requires_grad=True)
    q = torch.randn(2, 2, 8, dtype=torch.float64)
    cu = {"cu_seqlens_q": torch.tensor([0, 1, 2]), "cu_seqlens_k": torch.tensor([0, 4, 7])}
    given = {"prompt_k": None, "prompt_v": None, "gate": None, "max_seqlen_q": 1, "max_seqlen_k": 4}
    table = torch.zeros(2, 1, dtype=torch.int32)
    torch.autograd.gradcheck(
        lambda k: zero_init_attention_varlen(q, k, k, **cu, **given, block_table=table), key
    )


def packed_pages(**changed):
    x = torch.randn
    given = {
        "q": x(3, 4, 8), "k": x(4, 2, 2, 8), "v": x(4, 2, 2, 8), "prompt_k": None, "prompt_v": None, "gate": None,
        "cu_seqlens_q": torch.tensor([0, 1, 3]), "cu_seqlens_k": torch.tensor([0, 3, 5]), "max_seqlen_q": 2,
        "max_seqlen_k": 3, "block_table": torch.tensor([[0, 1], [2, 99]], dtype=torch.int32),
    }  # fmt: skip
    return given | changed


REFUSED = {
    "not_paged": ({"k": torch.randn(5, 2, 8)}, r"k must have 4 dimensions \[num_pages, page_size"),
    "value": ({"v": torch.randn(4, 3, 2, 8)}, "v must have shape"),
    "head_dim": ({"k": torch.randn(4, 2, 2, 9), "v": torch.randn(4, 2, 2, 9)}, "k must have shape"),
    "rows": ({"block_table": torch.zeros(3, 2, dtype=torch.int32)}, r"block_table must have shape \(2, \*\)"),
    "dims": ({"block_table": torch.zeros(2, dtype=torch.int32)}, "block_table must have 2 dimensions"),
    "page": (
        {"block_table": torch.tensor([[0, 4], [2, 99]])},
        r"block_table must name pages in 0 \.\. 3.*got 4",
    ),
    "negative": ({"block_table": torch.tensor([[0, -1], [2, 99]])}, r"block_table must name pages.*got -1"),
    "capacity": ({"cu_seqlens_k": torch.tensor([0, 5, 6])}, "cu_seqlens_k must rise by 0 to 4.*0 then 5"),
    "falling": ({"cu_seqlens_k": torch.tensor([0, 3, 2])}, "cu_seqlens_k must rise by 0 to 4.*3 then 2"),
    "start": ({"cu_seqlens_k": torch.tensor([1, 3, 5])}, "cu_seqlens_k must (begin|start)"),
    "longest": ({"max_seqlen_k": 2}, "cu_seqlens_k must rise|max_seqlen_k must be at least"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", REFUSED)
def test_packed_pages_are_refused(wrong, backend):
    change, message = REFUSED[wrong]
    with pytest.raises((ValueError, RuntimeError), match=message):
        zero_init_attention_varlen(**packed_pages(**change), backend=backend)
    zero_init_attention_varlen(**packed_pages(), backend=backend)


def test_pages_need_lengths_that_can_be_read():
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(t) if torch.is_tensor(t) else t for n, t in packed_pages().items()}
        with pytest.raises(TypeError, match="block_table needs cu_seqlens_k to be read on the host"):
            zero_init_attention_varlen(**fake)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [{}, {"seqlen_q": 20, "rotary_dim": 8, "causal": False}, {"append": False}])
def test_cache_batch_idx_is_the_gathered_caches(page, backend):
    rows = torch.tensor([4, 0, 2], dtype=torch.int32)
    case = CacheCase("rows", cache_rows=tuple(rows.tolist()), heads_q=4, heads_kv=2, head_dim=16, **page)
    given, gathered = make_cache_arguments(case, torch.float32), make_cache_arguments(case, torch.float32)
    for name in ("k_cache", "v_cache"):
        gathered[name] = gathered[name][rows]
    gathered["cache_batch_idx"] = None
    before = given["k_cache"].clone()
    out, expected = (zero_init_attention_with_kvcache(**one, backend=backend) for one in (given, gathered))
    torch.testing.assert_close(out, expected, rtol=3e-6, atol=3e-6)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(given[name][rows].nan_to_num(7), gathered[name].nan_to_num(7))
    others = [1, 3, 5]
    assert torch.equal(given["k_cache"][others].nan_to_num(7), before[others].nan_to_num(7))


REFUSED_ROWS = {
    "beyond": (torch.tensor([0, 6, 1]), r"cache_batch_idx must lie in 0 \.\. 5, the rows of k_cache, got 6"),
    "negative": (torch.tensor([0, -1, 1]), "cache_batch_idx must lie in 0 .* got -1"),
    "count": (torch.tensor([0, 1]), r"cache_batch_idx must have shape \(3,\)"),
    "dims": (torch.tensor([[0, 1, 2]]), "cache_batch_idx must have 1 dimension"),
    "dtype": (torch.tensor([0.0, 1.0, 2.0]), "cache_batch_idx must be an int32 tensor"),
    "list": ([0, 1, 2], "cache_batch_idx must be an int32 tensor, got list"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", REFUSED_ROWS)
def test_cache_batch_idx_is_refused_by_its_name(wrong, backend):
    rows, message = REFUSED_ROWS[wrong]
    given = make_cache_arguments(CacheCase("rows", cache_rows=(4, 0, 2)), torch.float32)
    before = given["k_cache"].clone()
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        zero_init_attention_with_kvcache(**given | {"cache_batch_idx": rows}, backend=backend)
    assert "block_table" not in str(caught.value)
    assert torch.equal(given["k_cache"].nan_to_num(), before.nan_to_num())


def test_cache_batch_idx_and_block_table_exclude_each_other():
    given = make_cache_arguments(CacheCase("pages", page_size=16), torch.float32)
    with pytest.raises(ValueError, match="cache_batch_idx and block_table both"):
        zero_init_attention_with_kvcache(**given | {"cache_batch_idx": torch.arange(3)})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": (7, 0), "seqlen_q": 6},
        {"seqlen_q": 20, "causal": False},
        {"append": False},
        {"page_size": 16},
    ],
    ids=str,
)
def test_cache_leftpad_is_a_cache_that_begins_later(options, backend):
    """The padding holds NaN; without it the same keys stand at slot 0, in a cache of their own for each sequence."""
    padding = (0, 17, 30)
    case = CacheCase(
        "padded", seqlens=(9, 20, 37), leftpad=padding, heads_q=4, heads_kv=2, head_dim=16, **options
    )
    given = make_cache_arguments(case, torch.float32)
    untouched = make_cache_arguments(case, torch.float32)
    out = zero_init_attention_with_kvcache(**given, backend=backend)
    for b, hidden in enumerate(padding):
        alone = dict(untouched, cache_leftpad=None, block_table=None)
        for name in ("q", "k", "v"):
            alone[name] = None if alone[name] is None else alone[name][b : b + 1]
        for name in ("k_cache", "v_cache"):
            cache = untouched[name]
            if untouched["block_table"] is None:
                slots = cache[b]
            else:
                slots = cache[untouched["block_table"][b].clamp(0, len(cache) - 1).long()].flatten(0, 1)
            alone[name] = slots[None, hidden:].clone()
        alone["cache_seqlens"] = untouched["cache_seqlens"][b : b + 1] - hidden
        expected = zero_init_attention_with_kvcache(**alone, backend="reference")
        torch.testing.assert_close(out[b : b + 1], expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotary_positions_count_the_padding(backend):
    case = CacheCase("rotary", leftpad=(0, 17), seqlens=(9, 20), rotary_dim=16, head_dim=16, seqlen_q=3)
    given, plain = make_cache_arguments(case, torch.float32), make_cache_arguments(case, torch.float32)
    zero_init_attention_with_kvcache(**given, backend=backend)
    zero_init_attention_with_kvcache(**plain | {"cache_leftpad": None}, backend="reference")
    for b, length in enumerate(case.seqlens):
        new = slice(length, length + 3)
        torch.testing.assert_close(given["k_cache"][b, new], plain["k_cache"][b, new], rtol=1e-6, atol=1e-6)


REFUSED_PADDING = {
    "beyond": (
        torch.tensor([0, 38, 1]),
        "cache_leftpad.1. = 38 must lie in 0 .. 37, the sequence's cache_seqlens",
    ),
    "negative": (torch.tensor([0, -1, 1]), "cache_leftpad.1. = -1 must lie in 0 .. 37"),
    "count": (torch.tensor([0, 1]), r"cache_leftpad must have shape \(3,\)"),
    "dtype": (torch.tensor([0.0, 1.0, 2.0]), "cache_leftpad must be an int32 tensor"),
    "int": (3, "cache_leftpad must be an int32 tensor, got int"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", REFUSED_PADDING)
def test_cache_leftpad_is_refused_by_its_name(wrong, backend):
    padding, message = REFUSED_PADDING[wrong]
    given = make_cache_arguments(CacheCase("padded"), torch.float32)
    before = given["k_cache"].clone()
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        zero_init_attention_with_kvcache(**given | {"cache_leftpad": padding}, backend=backend)
    assert torch.equal(given["k_cache"].nan_to_num(), before.nan_to_num())
