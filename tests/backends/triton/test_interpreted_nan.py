"""NaN and infinities in the Triton kernels: what a mask hides reaches nobody.

A product of matrices adds 0 * NaN for a hidden pair. The kernels of float16 add such tiles again with care, those of
float32 take care at once. Here one token is NaN: the rows that depend on it are, and all others are what they are
without it.
"""

import functools

import pytest
import torch

from zinit_kernels import zero_init_attention_with_kvcache
from zinit_kernels.backends.reference import token_mask
from zinit_kernels.testing import CacheCase, Case, make_cache_arguments, make_inputs

pytestmark = pytest.mark.interpreted

TOLERANCE = {torch.float16: dict(rtol=4e-3, atol=4e-3), torch.float32: dict(rtol=1e-4, atol=1e-5)}
ONE_HEAD = {"batch": 1, "heads_q": 1, "heads_kv": 1, "head_dim": 16}
MASKS = [
    Case("causal", batch=1, heads_q=2, heads_kv=1, head_dim=16, seqlens_q=(40,)),
    Case("window", **ONE_HEAD, seqlens_q=(70,), window=(20, -1)),
    Case("both_sides", **ONE_HEAD, seqlens_q=(40,), causal=False, window=(9, 5)),
    Case("packed", packed=True, heads_q=1, heads_kv=1, head_dim=16, seqlens_q=(6, 30), seqlens_k=(4, 36)),
    Case("left_padding", **ONE_HEAD, seqlens_q=(40,), mask="left_padding"),
]


def results(inputs, grad_out):
    """Outputs and gradients, [.., token, D], of the tensors that have tokens."""
    out, lse = inputs.call("triton")
    names = ("query", "key", "value")
    grads = torch.autograd.grad(out, [inputs.tensors[name] for name in names], grad_out)
    if inputs.case.packed:
        grads = [grad.transpose(0, 1)[None] for grad in grads]
    return {"out": out.detach(), "lse": lse.detach()[..., None], **dict(zip(names, grads, strict=True))}


@functools.cache
def clean_results(case, dtype):
    """(results, grad_out, which keys each query sees) of a case without NaN."""
    inputs = make_inputs(case, dtype)
    call = inputs.canonical()
    shape = (1, 1, call.query.shape[2], call.key.shape[2])
    _, visible = token_mask(call)
    grad_out = torch.randn(call.query.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return results(inputs, grad_out), grad_out, visible.expand(shape)[0, 0]


@pytest.mark.parametrize("where", ["query", "key", "value", "grad_out"])
@pytest.mark.parametrize(
    "case, dtype",
    [(case, torch.float16) for case in MASKS] + [(case, torch.float32) for case in MASKS[1:3]],
    ids=str,
)
def test_one_token_reaches_those_that_see_it(case, dtype, where):
    clean, grad_out, visible = clean_results(case, dtype)
    inputs, grad_out = make_inputs(case, dtype), grad_out.clone()
    token = 13 if where in ("query", "grad_out") else 28
    if where == "grad_out":
        grad_out[:, :, token] = float("nan")
    else:
        inputs.tensors[where].data.select(0 if case.packed else 2, token).fill_(float("nan"))
    poisoned = results(inputs, grad_out)

    queries = torch.zeros(len(visible), dtype=torch.bool)  # those whose own gradient is NaN
    if where in ("query", "grad_out"):
        queries[token] = True
    else:
        queries = visible[:, token]
    keys = visible[queries].any(0)  # those that such a query sees
    nothing = torch.zeros_like
    expected = {
        "out": nothing(queries) if where == "grad_out" else queries,
        "lse": queries if where in ("query", "key") else nothing(queries),
        "query": queries,
        "key": keys,
        "value": nothing(keys) if where == "value" else keys,
    }
    assert queries.any() and not queries.all()
    for name, rows in expected.items():
        found = poisoned[name][0]
        assert found[:, rows].isnan().any(-1).all(), f"{name}: NaN is lost"
        torch.testing.assert_close(
            found[:, ~rows], clean[name][0][:, ~rows], **TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("infinite", ["value", "grad_out"])
def test_an_infinity_stays_with_those_that_see_it(infinite, dtype):
    inputs = make_inputs(MASKS[0], dtype)
    grad_out = torch.ones(inputs.canonical().query.shape, dtype=dtype)
    (grad_out if infinite == "grad_out" else inputs.tensors["value"].data)[:, :, 28, 3] = float("inf")
    found = results(inputs, grad_out)
    if infinite == "value":
        assert torch.isfinite(found["out"][0, :, :28]).all()
        assert (found["out"][0, :, 28:, 3] == float("inf")).all()
        assert torch.isfinite(found["out"][0, :, 28:, :3]).all()
    else:
        assert (
            torch.isfinite(found["value"][0, :, 29:]).all() and torch.isfinite(found["key"][0, :, 29:]).all()
        )
        assert not torch.isfinite(found["value"][0, :, :29, 3]).any()


def test_a_query_that_is_nan_gives_masked_keys_no_gradient():
    inputs = make_inputs(
        Case("padding", **ONE_HEAD, seqlens_q=(40,), mask="padding", causal=False), torch.float32
    )
    masked = ~inputs.options["attn_mask"][0, 0, 0]
    inputs.tensors["query"].data[:, :, 5] = float("nan")
    grads = results(inputs, torch.ones(1, 1, 40, 16))
    for name in ("key", "value"):
        assert masked.any() and (grads[name][0, :, masked] == 0).all(), name
        assert grads[name][0, :, ~masked].isnan().all(), name


@pytest.mark.parametrize("num_splits, dtype", [(1, torch.float16), (3, torch.float32)], ids=str)
@pytest.mark.parametrize(
    "case, token, name",
    [
        (CacheCase("new_value", seqlen_q=5, seqlens=(40,), heads_q=2, heads_kv=1, head_dim=16), 43, "v"),
        (CacheCase("new_key", seqlen_q=5, seqlens=(40,), heads_q=2, heads_kv=1, head_dim=16), 43, "k"),
        (CacheCase("cached", append=False, seqlen_q=20, seqlens=(70,), heads_q=2, heads_kv=1, head_dim=16), 60, "v"),
        (CacheCase("prefill", seqlen_q=20, seqlens=(40,), heads_q=2, heads_kv=1, head_dim=16, page_size=16), 50, "v"),
        (CacheCase("before_window", window=(9, -1), seqlens=(70,), heads_q=2, heads_kv=1, head_dim=16), 50, "v"),
        (CacheCase("window", window=(9, -1), seqlen_q=3, seqlens=(70,), heads_q=2, heads_kv=1, head_dim=16), 62, "v"),
    ],
    ids=str,
)  # fmt: skip
def test_one_cached_token_reaches_those_that_see_it(case, token, name, num_splits, dtype):
    """token: its position; name: whether its key or its value is NaN."""

    def run(poison):
        given = make_cache_arguments(case, dtype) | {"num_splits": num_splits}
        if poison and token >= case.seqlens[0]:
            given[name][0, token - case.seqlens[0]] = float("nan")
        elif poison:
            given[f"{name}_cache"][0, token] = float("nan")
        return zero_init_attention_with_kvcache(**given, backend="triton", return_lse=True)

    clean, clean_lse = run(False)
    poisoned, lse = run(True)
    length = case.seqlens[0] + (case.seqlen_q if case.append else 0)
    position = torch.arange(length - case.seqlen_q, length)
    left = case.window[0] if case.window[0] >= 0 else length
    sees = (position >= token) & (position - left <= token)
    assert poisoned[0, sees].isnan().all() and lse[0, :, sees].isnan().all() == (
        name == "k" or not sees.any()
    )
    torch.testing.assert_close(poisoned[0, ~sees], clean[0, ~sees], **TOLERANCE[dtype])
    torch.testing.assert_close(lse[0, :, ~sees], clean_lse[0, :, ~sees], **TOLERANCE[dtype])
