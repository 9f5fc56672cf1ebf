"""Forward and every gradient of every backend against the float64 reference, over the named and over random cases."""

from dataclasses import replace

import pytest
import torch
from backend_cases import ATTENTION, DTYPES, backends
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from zinit_kernels import (
    prompt_attention_,
    zero_init_attention,
    zero_init_attention_varlen,
    zero_init_attention_with_kvcache,
)
from zinit_kernels.backends import reference
from zinit_kernels.testing import Case, assert_within_eager_error, check_case, gradients, make_inputs


@pytest.mark.parametrize("backend, case, dtype", ATTENTION, indirect=["backend"])
def test_against_the_reference(backend, case, dtype):
    check_case(case, dtype, backend, backward=backend != "cuda")


@pytest.mark.parametrize("shape", [(6, 9), (4, 6, 9), (6, 1), (1, 4, 1, 9), (2, 1, 6, 9)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_of_any_broadcastable_shape(shape, kind):
    query, key = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 9, 16)
    mask = torch.rand(shape) > 0.4 if kind == "bool" else torch.randn(shape)
    out = zero_init_attention(query, key, key, attn_mask=mask)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, key, attn_mask=mask, enable_gqa=True
    )
    empty = expected.isnan()
    torch.testing.assert_close(out.masked_fill(empty, 0), expected.masked_fill(empty, 0))


def test_gradcheck_of_the_reference():
    case = Case("gradcheck", heads_kv=2, seqlens_q=(5,), head_dim=3, prompt_length=2, table="indexed")
    inputs = make_inputs(case, torch.float64)
    named = list(inputs.tensors.values())
    named[5] = named[5].detach().double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *t: zero_init_attention(*t, **inputs.options, return_lse=True, backend="reference"), named
    )


@pytest.mark.native
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    heads_kv=st.integers(1, 3),
    group=st.integers(1, 4),
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=4),
    head_dim=st.integers(1, 140),
    prompt_length=st.integers(0, 20),
    causal=st.booleans(),
    window=st.tuples(st.integers(-1, 40), st.integers(-1, 40)),
    table=st.sampled_from(["shared", "per_sample", "indexed"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_random_packed_shapes(
    heads_kv, group, lengths, head_dim, prompt_length, causal, window, table, dtype
):
    case = Case(
        "random", packed=True, heads_q=heads_kv * group, heads_kv=heads_kv, head_dim=head_dim, causal=causal,
        prompt_length=prompt_length, seqlens_q=tuple(q for q, _ in lengths), seqlens_k=tuple(k for _, k in lengths),
        window=window, table=table,
    )  # fmt: skip
    check_case(case, dtype, "cpu")


@pytest.mark.parametrize("backend", backends("cpu", "composed", "triton", "hybrid"), indirect=True)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3, 4, 5), (5,), (4,), (0, 5), (1, 2)], ids=str)
def test_gradients_of_some_inputs_equal_those_of_all(backend, wanted):
    small = backend in ("triton", "hybrid")
    case = Case(
        "subset",
        batch=1 if small else 2,
        heads_q=4,
        heads_kv=2,
        seqlens_q=(50 if small else 75,),
        head_dim=16,
    )
    inputs = make_inputs(case, torch.float32)
    with_lse = backend not in ("composed", "hybrid")
    everything = gradients(inputs.call(backend, return_lse=with_lse), inputs)
    some = inputs.to(None)
    for i, tensor in enumerate(some.tensors.values()):
        tensor.requires_grad_(i in wanted)
    found = gradients(some.call(backend, return_lse=with_lse), some)
    assert set(found) == {name for i, name in enumerate(everything) if i in wanted}
    tolerance = 0 if small else 1e-5
    for name, grad in found.items():
        torch.testing.assert_close(grad, everything[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", backends("cpu", "composed", "triton", "cuda"), indirect=True)
def test_huge_finite_mask_is_not_minus_infinity(backend):
    """transformers' older masks hold finfo.min: a row of nothing else averages its keys, as SDPA's does."""
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    inputs = make_inputs(Case("finfo_min", causal=False, seqlens_q=(19,), table="none"), dtype)
    inputs.options["attn_mask"] = torch.full((2, 1, 1, 19), torch.finfo(torch.float32).min)
    out, _ = inputs.call(backend, return_lse=False)
    mean = inputs.tensors["value"].float().mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, mean.to(dtype))
    if out.requires_grad:
        grads = torch.autograd.grad(out.sum(), [inputs.tensors[name] for name in ("query", "key", "value")])
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    "backend, dtype",
    [
        *(pytest.param("cpu", dtype, marks=pytest.mark.native) for dtype in DTYPES),
        pytest.param("triton", torch.float16, marks=pytest.mark.interpreted),
        *(("cuda", dtype) for dtype in DTYPES[1:]),
    ],
    indirect=["backend"],
    ids=str,
)
@pytest.mark.parametrize("way", ["gate_zero", "no_row", "no_prompts"])
def test_without_prompt_effect_it_is_plain_attention_bit_for_bit(way, backend, dtype):
    case = Case("exact", seqlens_q=(50 if backend == "triton" else 133,), heads_q=4, heads_kv=2, head_dim=80)
    inputs = make_inputs(case, dtype)
    if way == "gate_zero":
        inputs.tensors["gate"] = torch.zeros(4, requires_grad=True)
    elif way == "no_row":
        inputs.options["prompt_index"] = torch.tensor([-1, -1], dtype=torch.int32)
    else:
        for name in ("prompt_key", "prompt_value"):
            inputs.tensors[name] = inputs.tensors[name].detach()[:, :, :0].requires_grad_()
    plain = inputs.to(None)
    plain.tensors.update(prompt_key=None, prompt_value=None, gate=None)
    plain.options = {name: value for name, value in plain.options.items() if name != "prompt_index"}
    (out, lse), (plain_out, plain_lse) = inputs.call(backend), plain.call(backend)
    assert torch.equal(out, plain_out) and torch.equal(lse, plain_lse)
    if backend == "cuda":
        return  # it has no backward
    grads, plain_grads = gradients((out, lse), inputs), gradients((plain_out, plain_lse), plain)
    for name in ("query", "key", "value"):
        assert torch.equal(grads[name], plain_grads[name]), name
    if way == "gate_zero":
        assert grads["prompt_key"].count_nonzero() == 0 and grads["gate"].count_nonzero() == 4
    else:
        assert grads["gate"].count_nonzero() == 0


@pytest.mark.native
@pytest.mark.parametrize("size", [1e3, 1e5, 1e8])
@pytest.mark.parametrize("mask", ["none", "padding"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_huge_scores_pick_their_largest(dtype, mask, size):
    """Up to 1e17 with differences as large: the softmax is one-hot, though float32 steps by millions there."""
    inputs = make_inputs(Case("huge", seqlens_q=(150,), mask=mask), dtype)
    for name in ("query", "key", "prompt_key"):
        inputs.tensors[name].data.mul_(size)
    exact = inputs.to(torch.float64)
    (out, lse), (exact_out, exact_lse) = inputs.call("cpu"), exact.call("reference")
    torch.testing.assert_close(out.double(), exact_out.double(), rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(lse.double(), exact_lse.double(), rtol=1e-5, atol=0)
    grads, exact_grads = gradients((out, lse), inputs), gradients((exact_out, exact_lse), exact)
    for name, grad in grads.items():
        assert torch.isfinite(grad).all(), name
        if name in ("value", "prompt_value", "gate"):  # the others are differences that cancel, times `size`
            torch.testing.assert_close(grad.double(), exact_grads[name].double(), rtol=2e-2, atol=5e-2)


@pytest.mark.native
def test_a_bound_far_above_the_longest_sequence_costs_nothing():
    inputs = make_inputs(Case("bound", packed=True, seqlens_q=(40, 60)), torch.float32)
    expected = inputs.call("cpu")[0]
    inputs.options.update(max_seqlen_q=2**40, max_seqlen_k=2**40)
    out, lse = inputs.call("cpu")
    assert torch.equal(out, expected)
    gradients((out, lse), inputs)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=pytest.mark.native), "composed"])
@pytest.mark.parametrize(
    "case", [Case("plain", seqlens_q=(7,)), Case("packed", packed=True, seqlens_q=(3, 5))], ids=str
)
def test_double_backward_takes_the_written_out_formula(case, backend):
    mask = "dense" if backend == "composed" and not case.packed else "none"
    inputs = make_inputs(replace(case, head_dim=8, mask=mask), torch.float32)
    results = []
    for chosen, by in ((inputs, backend), (inputs.to(torch.float64), "reference")):
        out, _ = chosen.call(by, return_lse=False)
        leaves = list(chosen.tensors.values())
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        results.append(torch.autograd.grad(penalty, leaves))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=pytest.mark.native), "composed"])
def test_double_backward_of_the_inputs_that_want_it(backend):
    inputs = make_inputs(Case("some", seqlens_q=(7,), head_dim=8), torch.float32)
    for name in ("query", "value", "prompt_key"):
        inputs.tensors[name] = inputs.tensors[name].detach()
    leaves = [inputs.tensors[name] for name in ("key", "prompt_value", "gate")]
    seconds = []
    for by in (backend, "reference"):
        out, _ = inputs.call(by, return_lse=False)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for ours, expected in zip(*seconds, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.native
@pytest.mark.parametrize("how", ["same", "dependent"])
def test_create_graph_does_not_change_the_first_gradient(how):
    x = torch.randn(1, 2, 8, 16, requires_grad=True)
    gradients_ = []
    for create_graph in (False, True):
        query = x if how == "same" else x * 2
        key = x if how == "same" else query * 0.7
        out = zero_init_attention(query, key, key, is_causal=True, backend="cpu")
        gradients_.append(torch.autograd.grad(out.square().sum(), x, create_graph=create_graph)[0])
    torch.testing.assert_close(*gradients_, rtol=1e-4, atol=1e-5 * gradients_[0].abs().max().item())


def test_second_derivatives_of_the_default_path():
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    gate = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    prompts = torch.randn(2, 1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x, p, g: zero_init_attention(x, x, x, p[0], p[1], g, is_causal=True), (x, prompts, gate)
    )


def test_forward_mode_and_functional_transforms_see_through():
    x, t = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    attend = lambda query: zero_init_attention(query, x, x, is_causal=True)  # noqa: E731
    _, tangent = torch.func.jvp(attend, (x,), (t,))
    step = 1e-2
    numeric = (attend(x + step * t) - attend(x - step * t)) / (2 * step)
    torch.testing.assert_close(tangent, numeric, rtol=1e-2, atol=1e-3)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(attend(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda q: attend(q).square().sum())(x), expected)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=pytest.mark.native), "composed", "reference"])
def test_autocast_casts_as_torch_does(backend):
    query, key = torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, key.bfloat16())
        out = zero_init_attention(query, key, key.bfloat16(), backend=backend)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.native
def test_values_the_kernel_reads_are_checked():
    inputs = make_inputs(Case("indexed", table="indexed", batch=4), torch.float32)
    inputs.options["prompt_index"] = torch.tensor([0, 1, 3, 0], dtype=torch.int32)
    with pytest.raises((RuntimeError, ValueError), match="prompt_index.*3"):
        inputs.call("cpu")
    packed = make_inputs(Case("packed", packed=True, seqlens_q=(5, 6)), torch.float32)
    for bad in ([0, 5, 12], [1, 5, 11], [0, 12, 11], [0, -1, 11]):
        packed.options["cu_seqlens_q"] = torch.tensor(bad, dtype=torch.int32)
        for backend in ("cpu", "reference"):
            with pytest.raises((RuntimeError, ValueError), match="cu_seqlens_q"):
                packed.call(backend)


def test_the_rule_catches_a_wrong_result():
    """The net itself: an error a little beyond the rule fails."""
    oracle = torch.randn(50, dtype=torch.float64)
    eager = oracle + 1e-7
    assert_within_eager_error("near", oracle.float(), eager, oracle, torch.float32)
    with pytest.raises(AssertionError, match="error"):
        assert_within_eager_error("far", (oracle + 3e-6).float(), eager, oracle, torch.float32)


@pytest.mark.native
@pytest.mark.parametrize("mutation", ["no_prompt_on_one_head", "wrong_window", "other_scale"])
def test_the_rule_catches_mutations_in_bfloat16(mutation):
    inputs = make_inputs(Case("mutant", seqlens_q=(40,), window=(9, -1)), torch.bfloat16)
    eager = reference.attention(inputs.canonical(), compute_dtype=torch.bfloat16)[0]
    oracle = reference.attention(inputs.to(torch.float64).canonical())[0]
    assert_within_eager_error("whole", inputs.call("cpu")[0], eager, oracle, torch.bfloat16)
    if mutation == "no_prompt_on_one_head":
        inputs.tensors["gate"].data[2] = 0.0
    else:
        changed = {"window_size": (8, -1)} if mutation == "wrong_window" else {"scale": 0.13}
        inputs.options.update(changed)
    with pytest.raises(AssertionError, match="error"):
        assert_within_eager_error("mutant", inputs.call("cpu")[0], eager, oracle, torch.bfloat16)


def test_varlen_of_nothing():
    empty, zero = torch.empty(0, 4, 16), torch.zeros(1, dtype=torch.int32)
    assert zero_init_attention_varlen(empty, empty, empty, None, None, None, zero, zero, 0, 0).shape == (
        0,
        4,
        16,
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_empty_batch_with_a_table_of_adapters(backend):
    query, prompts, index = (
        torch.empty(0, 4, 5, 16),
        torch.randn(3, 4, 2, 16),
        torch.empty(0, dtype=torch.int32),
    )
    out = zero_init_attention(
        query, query, query, prompts, prompts, torch.ones(4), prompt_index=index, backend=backend
    )
    assert out.shape == query.shape


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_meta_tensors_have_a_shape(backend):
    with torch.device("meta"):
        query, cu_seqlens = torch.empty(2, 4, 5, 16), torch.empty(3, dtype=torch.int32)
        prompts, gate = torch.empty(1, 4, 3, 16), torch.ones(4)
    packed, table = query.transpose(1, 2), prompts.transpose(1, 2)
    outputs = (
        zero_init_attention(query, query, query, prompts, prompts, gate, backend=backend).transpose(1, 2),
        zero_init_attention_varlen(
            *[packed.flatten(0, 1)] * 3, table, table, gate, cu_seqlens, cu_seqlens, 5, 5, backend=backend
        ).unflatten(0, (2, 5)),
        zero_init_attention_with_kvcache(
            packed,
            packed,
            packed,
            prompt_k=table,
            prompt_v=table,
            gate=gate,
            cache_seqlens=5,
            causal=True,
            backend=backend,
        ),
    )
    for out in outputs:
        assert out.shape == packed.shape and out.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fake_tensors_hold_no_values_to_check(dtype):
    with FakeTensorMode():
        query, table = torch.empty(2, 4, 5, 16, dtype=dtype), torch.empty(3, 4, 2, 16, dtype=dtype)
        index = torch.zeros(2, dtype=torch.int64)
        mask = torch.ones(5, 5, dtype=torch.bool)
        out = zero_init_attention(query, query, query, table, table, 0.5, attn_mask=mask, prompt_index=index)
        assert out.shape == query.shape and out.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_vmap_over_the_adapter_of_each_sequence(dtype):
    query, table = torch.randn(2, 4, 5, 16), torch.randn(3, 4, 2, 16)
    indices = torch.tensor([[0, 2], [1, -1]], dtype=dtype)
    attend = lambda index: zero_init_attention(query, query, query, table, table, 0.5, prompt_index=index)  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(attend)(indices), torch.stack([attend(i) for i in indices]))


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_a_scale_of_zero_or_below_keeps_the_causal_mask(scale):
    """SDPA's own kernel answers NaN there."""
    query, key, value = torch.randn(3, 1, 2, 5, 16).unbind()
    expected = zero_init_attention(query, key, value, is_causal=True, scale=scale, backend="reference")
    for backend in ("auto", "composed"):
        found = zero_init_attention(query, key, value, is_causal=True, scale=scale, backend=backend)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["auto", "composed", "reference"])
def test_a_table_without_rows_that_nobody_asks_for(backend):
    query, table, index = torch.randn(2, 4, 5, 16), torch.empty(0, 4, 3, 16), torch.tensor([-1, -1])
    out = zero_init_attention(query, query, query, table, table, 0.5, prompt_index=index, backend=backend)
    torch.testing.assert_close(out, zero_init_attention(query, query, query, backend=backend))


@pytest.mark.parametrize(
    ("dtype", "bias"), [(torch.float16, -1e5), (torch.bfloat16, -3.4e38), (torch.float16, 1e5)]
)
def test_a_finite_mask_beyond_the_dtype_still_shows_its_keys(dtype, bias):
    query, key, value = torch.randn(3, 1, 2, 4, 16).to(dtype).unbind()
    mask = torch.zeros(1, 1, 4, 4)
    mask[:, :, 1] = bias  # a whole row
    mask[:, :, 2, 0] = float("-inf")
    found, expected = (
        zero_init_attention(query, key, value, None, None, None, attn_mask=mask, backend=backend)
        for backend in ("composed", "reference")
    )
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_double_backward_of_composed_sees_that_its_mask_was_overwritten():
    query = torch.randn(1, 2, 4, 8, requires_grad=True)
    mask = torch.randn(1, 1, 4, 4)
    out = zero_init_attention(query, query, query, None, None, None, attn_mask=mask, backend="composed")
    mask.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), query, create_graph=True)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.native
def test_the_rule_accepts_a_single_gate_whatever_the_seed(seed):
    check_case(Case("one_gate", heads_q=1, heads_kv=1), torch.bfloat16, "cpu", seed=seed)


def test_the_prompt_branch_on_an_attention_that_kept_its_output_needs_a_clone():
    query, prompts = (
        torch.randn(2, 5, 4, 16, requires_grad=True),
        torch.randn(1, 3, 4, 16, requires_grad=True),
    )
    heads = query.transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2)
    prompt_attention_(out.clone(), query, prompts, prompts, 0.5).sum().backward(retain_graph=True)
    assert prompts.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        prompt_attention_(out, query, prompts, prompts, 0.5).sum().backward()
