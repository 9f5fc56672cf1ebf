"""What a query does not see has no influence on it, whatever it holds; and nothing seen still has a gradient."""

import itertools

import pytest
import torch

from zinit_kernels import (
    zero_init_attention,
    zero_init_attention_varlen,
    zero_init_attention_with_kvcache,
)

BACKENDS = [pytest.param("cpu", marks=pytest.mark.native), "composed", "reference"]
MASKS = ["causal", "window", "padding", "padding_and_causal"]
DENSE_MASKS = ["dense", "additive"]  # no kernel takes these
BROKEN = {"nan": float("nan"), "inf": float("inf"), "minus_inf": float("-inf")}


def whole(hidden):
    """query, key, value, the masks, and [B, H, T, S]: which pairs these leave."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 9, 8).unbind()
    visible = torch.ones(2, 2, 9, 9, dtype=torch.bool)
    options = {}
    if hidden == "causal":
        options = {"is_causal": True}
        visible = visible.tril()
    elif hidden == "window":
        options = {"window_size": (3, 1)}
        visible = visible.tril(1).triu(-3)
    elif hidden == "dense":
        visible = torch.rand(2, 2, 9, 9) > 0.4
        options = {"attn_mask": visible}
    elif hidden == "additive":
        visible = torch.rand(2, 1, 9, 9) > 0.4
        options = {"attn_mask": torch.randn(2, 1, 9, 9).masked_fill(~visible, float("-inf"))}
    elif hidden == "padding":
        visible = torch.rand(2, 1, 1, 9) > 0.4
        options = {"attn_mask": visible}
    elif hidden == "padding_and_causal":
        visible = (torch.rand(2, 1, 1, 9) > 0.4) & visible.tril()
        options = {"attn_mask": visible.any(2).any(1), "is_causal": True}
        visible = options["attn_mask"][:, None, None] & torch.ones(9, 9, dtype=torch.bool).tril()
    return query, key, value, options, visible.expand(2, 2, 9, 9)


@pytest.mark.parametrize(
    "hidden, backend",
    [
        *(pytest.param(hidden, "cpu", marks=pytest.mark.native) for hidden in MASKS),
        *(pytest.param(hidden, "triton", marks=pytest.mark.interpreted) for hidden in MASKS[:2]),
        *itertools.product([*MASKS, *DENSE_MASKS], ["composed", "reference"]),
    ],
)
@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("where", ["key", "value"])
def test_a_broken_key_reaches_only_the_queries_that_see_it(hidden, where, what, backend):
    query, key, value, options, visible = whole(hidden)
    prompts = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), 0.5
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    clean = zero_init_attention(*leaves, *prompts, **options, backend=backend)
    (key if where == "key" else value)[1, 1, 4, 2] = BROKEN[what]
    sees = visible[1, 1, :, 4]
    broken = [t.clone().requires_grad_() for t in (query, key, value)]
    out = zero_init_attention(*broken, *prompts, **options, backend=backend)
    expected, found = clean[1, 1], out[1, 1]
    torch.testing.assert_close(found[~sees], expected[~sees])
    torch.testing.assert_close(out[0], clean[0])
    torch.testing.assert_close(out[1, 0], clean[1, 0])
    if where == "value":
        assert torch.equal(found[sees][:, 2].isfinite(), torch.zeros(int(sees.sum()), dtype=torch.bool))
        if what != "nan":
            assert (found[sees][:, 2] == BROKEN[what]).all()
    elif what == "nan":
        assert found[sees].isnan().all()
    # and backward, of a loss of the queries that do not see it
    alone = torch.ones_like(out)
    alone[1, 1, sees] = 0
    if sees.any():
        rows = [(o * alone).masked_fill(alone == 0, 0) for o in (out, clean)]
        grads, expected = (
            torch.autograd.grad(r.sum(), ls[0])[0] for r, ls in zip(rows, (broken, leaves), strict=True)
        )
        torch.testing.assert_close(grads[1, 1, ~sees], expected[1, 1, ~sees])
        torch.testing.assert_close(grads[0], expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["key", "value"])
def test_packed_sequences_keep_theirs_to_themselves(where, backend):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 12, 2, 8).unbind()
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    options = dict(causal=True, window_size=(3, -1), backend=backend)
    run = lambda: zero_init_attention_varlen(q, k, v, None, None, None, bounds, bounds, 7, 7, **options)  # noqa: E731
    clean = run()
    # the second sequence's second token: seen by tokens 6 .. 9
    (k if where == "key" else v)[6] = float("nan")
    out = run()
    assert out[6:10].isnan().any(-1).all()
    rows = [*range(6), 10, 11]
    torch.testing.assert_close(out[rows], clean[rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("where", ["k_cache", "v_cache"])
@pytest.mark.parametrize("window", [(5, -1), (-1, -1), (5, 0)])
def test_keys_before_the_window_of_a_cache(window, where, paged, backend):
    torch.manual_seed(0)
    given = {"k_cache": torch.randn(2, 32, 2, 8), "v_cache": torch.randn(2, 32, 2, 8)}
    if paged:
        given = {name: cache.reshape(8, 8, 2, 8) for name, cache in given.items()}
        given["block_table"] = torch.arange(8, dtype=torch.int32).reshape(2, 4)
    seqlens, queries = torch.tensor([20, 31], dtype=torch.int32), 4

    def run():
        return zero_init_attention_with_kvcache(
            torch.randn(2, queries, 2, 8, generator=torch.Generator().manual_seed(1)), **given, prompt_k=None,
            prompt_v=None, gate=None, cache_seqlens=seqlens, causal=True, window_size=window, backend=backend,
        )  # fmt: skip

    clean = run()
    rows = given[where].view(2, 32, 2, 8)
    rows[0, 20:], rows[1, 31:] = float("nan"), float("nan")  # not written yet
    torch.testing.assert_close(run(), clean)
    # the first query, at 16, sees 11 .. 16 through the window; the third and fourth do not
    rows[0, 12] = float("nan")
    out = run()
    torch.testing.assert_close(out[1], clean[1])
    seen = 2 if window[0] == 5 else 4
    assert out[0, :seen].isnan().any(-1).all()
    torch.testing.assert_close(out[0, seen:], clean[0, seen:])


def empty_cases():
    x = torch.randn
    prompts = (x(1, 2, 3, 8), x(1, 2, 3, 8), x(1, 4))
    return {
        "no_keys": (x(2, 4, 5, 8), x(2, 2, 0, 8), x(2, 2, 0, 8), None, None, None),
        "no_keys_but_prompts": (x(2, 4, 5, 8), x(2, 2, 0, 8), x(2, 2, 0, 8), *prompts),
        "no_queries": (x(2, 4, 0, 8), x(2, 2, 5, 8), x(2, 2, 5, 8), *prompts),
        "no_batch": (x(0, 4, 5, 8), x(0, 2, 5, 8), x(0, 2, 5, 8), *prompts),
        "no_batch_no_prompts": (x(0, 4, 5, 8), x(0, 2, 5, 8), x(0, 2, 5, 8), None, None, None),
        "no_prompts_in_the_table": (x(2, 4, 5, 8), x(2, 2, 5, 8), x(2, 2, 5, 8), x(1, 2, 0, 8), x(1, 2, 0, 8), x(1, 4)),
    }  # fmt: skip


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("name", empty_cases())
def test_nothing_to_attend_to_still_has_gradients(name, backend):
    given = [None if t is None else t.requires_grad_() for t in empty_cases()[name]]
    for tensor in given[:1]:
        tensor.data.flatten()[:1] = float("nan")  # an output of zeros is no product with it
    out = zero_init_attention(*given, backend=backend)
    assert out.requires_grad and out.shape == given[0].shape
    leaves = [tensor for tensor in given if tensor is not None]
    for leaf, grad in zip(leaves, torch.autograd.grad(out.nan_to_num().sum(), leaves), strict=True):
        assert grad.shape == leaf.shape and (name != "no_keys" or not grad.any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [([0], [0]), ([0, 0], [0, 0]), ([0, 3], [0, 0])], ids=str)
def test_packed_nothing_still_has_gradients(lengths, backend):
    bounds_q, bounds_k = (torch.tensor(b, dtype=torch.int32) for b in lengths)
    q = torch.randn(int(bounds_q[-1]), 2, 8, requires_grad=True)
    k = torch.randn(int(bounds_k[-1]), 2, 8, requires_grad=True)
    out = zero_init_attention_varlen(q, k, k, None, None, None, bounds_q, bounds_k, 3, 3, backend=backend)
    for leaf, grad in zip((q, k), torch.autograd.grad(out.sum(), (q, k)), strict=True):
        assert grad.shape == leaf.shape and not grad.any()
