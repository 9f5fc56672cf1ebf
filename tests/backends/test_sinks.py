"""Attention sinks: one more score in each head's denominator, written out in float64 without the package."""

import pytest
import torch

from zinit_kernels import (
    zero_init_attention,
    zero_init_attention_varlen,
    zero_init_attention_with_kvcache,
)

CPU = pytest.param("cpu", marks=pytest.mark.native)
TRITON = pytest.param("triton", marks=pytest.mark.interpreted)
BACKENDS = [CPU, "composed", "reference", TRITON]
WITH_LSE = [CPU, "reference", TRITON]
B, HQ, HKV, T, D, P = 2, 4, 2, 37, 16, 3
SINKS = torch.tensor([-2.0, 0.5, 3.0, 9.0])


def tensors(dtype=torch.float32, keys=T):
    torch.manual_seed(0)
    shapes = {
        "query": (B, HQ, T, D), "key": (B, HKV, keys, D), "value": (B, HKV, keys, D), "prompt_key": (1, HKV, P, D),
        "prompt_value": (1, HKV, P, D),
    }  # fmt: skip
    given = {name: torch.randn(shape).to(dtype).requires_grad_() for name, shape in shapes.items()}
    return {
        **given,
        "gate": torch.tensor([0.4, -0.3, 0.0, 1.0]).requires_grad_(),
        "sinks": SINKS.clone().requires_grad_(),
    }


def formula(given, visible):
    """(out, lse) in float64; visible [.., T, S]."""
    q, k, v, pk, pv, gate, sinks = (t.double() for t in given.values())
    k, v, pk, pv = (t.repeat_interleave(HQ // HKV, 1) for t in (k, v, pk, pv))
    weights = (q @ k.mT * D**-0.5).exp() * visible
    total = weights.sum(-1, keepdim=True) + sinks.exp()[:, None, None]
    prompts = (q @ pk.mT * D**-0.5).softmax(-1) @ pv
    return weights @ v / total + gate.tanh()[:, None, None] * prompts, total.log().squeeze(-1)


def gradients(outputs, given):
    weights = [
        torch.randn(o.shape, generator=torch.Generator().manual_seed(i)) for i, o in enumerate(outputs)
    ]
    loss = sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(loss, list(given.values()), allow_unused=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_lse", [True, False])
def test_output_and_gradients_are_those_of_the_formula(with_lse, backend):
    if with_lse and backend == "composed":
        return  # it returns no lse
    given, expected = tensors(), tensors()
    options = {"is_causal": True, "backend": backend, "return_lse": with_lse}
    outputs = zero_init_attention(**given, **options)
    outputs = outputs if with_lse else (outputs,)
    wanted = formula(expected, torch.ones(T, T).tril())[: len(outputs)]
    for ours, theirs in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=2e-6)
    found = gradients(outputs, given)
    for name, ours, theirs in zip(given, found, gradients(wanted, expected), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=2e-5, atol=2e-5, msg=lambda text, name=name: f"d{name}: {text}"
        )


@pytest.mark.parametrize("backend", WITH_LSE)
def test_a_row_without_keys_is_its_sink_alone(backend):
    given = tensors()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1] = False
    prompts = {name: None for name in ("prompt_key", "prompt_value", "gate")}
    out, lse = zero_init_attention(**given | prompts, attn_mask=mask, backend=backend, return_lse=True)
    assert (out[1] == 0).all() and torch.equal(lse[1], SINKS[:, None].expand(HQ, T))
    (dsinks,) = torch.autograd.grad(lse[1].sum(), given["sinks"])
    torch.testing.assert_close(dsinks, torch.full((HQ,), float(T)))


@pytest.mark.parametrize("backend", WITH_LSE)
@pytest.mark.parametrize("scale", [None, -0.3, 0.0, 400.0])
def test_a_sink_of_minus_infinity_is_none(scale, backend):
    """And its gradient is 0. Scores of 400 times the usual size go the way of coarse ones."""
    given = tensors()
    nothing = torch.full((HQ,), float("-inf"), requires_grad=True)
    options = {"is_causal": True, "scale": scale, "backend": backend, "return_lse": True}
    outputs = zero_init_attention(**given | {"sinks": nothing}, **options)
    plain = zero_init_attention(**given | {"sinks": None}, **options)
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain, strict=True))
    (dsinks,) = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), nothing)
    assert (dsinks == 0).all()


@pytest.mark.parametrize("backend", WITH_LSE)
@pytest.mark.parametrize("size", [40.0, 3e4, 1e30])
def test_a_sink_far_above_all_scores_takes_everything(size, backend):
    given = tensors()
    sinks = torch.full((HQ,), size, requires_grad=True)
    options = {"is_causal": True, "backend": backend, "return_lse": True}
    out, lse = zero_init_attention(**given | {"sinks": sinks, "gate": torch.zeros(HQ)}, **options)
    assert out.abs().max() < 1e-12 and torch.equal(lse, sinks[:, None].expand_as(lse).detach())
    wanted = [given[name] for name in ("query", "key", "value")]
    *grads, dsinks = torch.autograd.grad(out.sum() + lse.sum(), [*wanted, sinks])
    assert all(grad.abs().max() < 1e-12 for grad in grads)
    torch.testing.assert_close(dsinks, torch.full((HQ,), float(B * T)))


@pytest.mark.parametrize("backend", WITH_LSE)
def test_coarse_scores_with_sinks_of_their_size(backend):
    """float32 scores beyond 2^14, where lse alone no longer says how they differ."""
    given, scale = tensors(), 4000.0
    with torch.no_grad():
        scores = (given["query"] @ given["key"].repeat_interleave(2, 1).mT) * scale
        sinks = scores.amax(-1).flatten(2)[0, :, 5].clone()  # as large as the largest score of query 5
    options = {"scale": scale, "is_causal": False, "return_lse": True}
    leaves = [t.detach().requires_grad_() for t in (given["query"], given["key"], given["value"], sinks)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    outputs = zero_init_attention(*leaves[:3], sinks=leaves[3], backend=backend, **options)
    wanted = zero_init_attention(*wide[:3], sinks=wide[3], backend="reference", **options)
    torch.testing.assert_close(outputs[0].double()[0, :, 5], wanted[0][0, :, 5], rtol=5e-2, atol=5e-2)
    ours, theirs = (torch.autograd.grad(o[0].sum(), t[3])[0] for o, t in ((outputs, leaves), (wanted, wide)))
    torch.testing.assert_close(ours.double(), theirs, rtol=5e-2, atol=5e-2)


def test_the_gradients_can_be_differentiated_again():
    q, k, v = (t.detach()[:1, :, :3, :2].double().requires_grad_() for t in list(tensors().values())[:3])
    sinks = SINKS.double().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda q, k, v, s: zero_init_attention(q, k, v, sinks=s, is_causal=True), (q, k, v, sinks)
    )


@pytest.mark.native
def test_second_derivatives_of_the_kernels_are_those_of_the_reference():
    found = []
    for backend in ("cpu", "reference"):
        given = tensors()
        out = zero_init_attention(**given, is_causal=True, backend=backend)
        (first,) = torch.autograd.grad(out.square().sum(), given["sinks"], create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), list(given.values())))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", WITH_LSE)
def test_packed_sequences_are_the_sequences_alone(backend):
    given = {name: t.detach() for name, t in tensors().items()}
    bounds = torch.tensor([0, T, 2 * T], dtype=torch.int32)
    packed = {name: given[name].transpose(1, 2).flatten(0, 1) for name in ("query", "key", "value")}
    prompts = [given[name].transpose(1, 2) for name in ("prompt_key", "prompt_value")]
    out, lse = zero_init_attention_varlen(
        *packed.values(), *prompts, given["gate"], bounds, bounds, T, T, causal=True, sinks=SINKS,
        backend=backend, return_lse=True,
    )  # fmt: skip
    expected = zero_init_attention(**given, is_causal=True, backend=backend, return_lse=True)
    torch.testing.assert_close(out, expected[0].transpose(1, 2).flatten(0, 1))
    torch.testing.assert_close(lse, expected[1].transpose(0, 1).flatten(1))


@pytest.mark.parametrize("backend", WITH_LSE)
@pytest.mark.parametrize("num_splits", [1, 2, 9])
def test_the_cache_function_counts_a_sink_once(num_splits, backend):
    given = {name: t.detach() for name, t in tensors().items()}
    whole = zero_init_attention(**given, is_causal=True, backend="reference", return_lse=True)
    cache = {name: given[name].transpose(1, 2).contiguous() for name in ("query", "key", "value")}
    prompts = {
        new: given[name].transpose(1, 2)
        for new, name in (("prompt_k", "prompt_key"), ("prompt_v", "prompt_value"))
    }
    out, lse = zero_init_attention_with_kvcache(
        cache["query"][:, -2:], cache["key"], cache["value"], **prompts, gate=given["gate"], cache_seqlens=T,
        causal=True, sinks=SINKS, num_splits=num_splits, backend=backend, return_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(out, whole[0].transpose(1, 2)[:, -2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, whole[1][:, :, -2:], rtol=1e-5, atol=1e-5)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sinks_of_another_dtype_are_converted_and_get_their_gradient(dtype):
    given = tensors()
    sinks = SINKS.to(dtype).requires_grad_()
    out = zero_init_attention(**given | {"sinks": sinks}, is_causal=True)
    expected = zero_init_attention(**given | {"sinks": SINKS}, is_causal=True)
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), sinks)
    assert grad.dtype == dtype and grad.abs().min() > 0


WRONG = {
    "of another number": (torch.zeros(3), ValueError, r"sinks must have shape \(4,\), got \(3,\)"),
    "with a batch": (torch.zeros(1, HQ), ValueError, r"sinks must have shape \(4,\), got \(1, 4\)"),
    "integers": (torch.zeros(HQ, dtype=torch.int64), TypeError, "sinks must be a floating-point tensor"),
    "a number": (0.5, TypeError, "sinks must be a floating-point tensor .* got float"),
    "elsewhere": (
        torch.zeros(HQ, device="meta"),
        ValueError,
        "sinks must be on the query's device cpu, got meta",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("grad", [True, False])
def test_wrong_sinks_are_named(name, grad):
    sinks, error, message = WRONG[name]
    with pytest.raises(error, match=message), torch.set_grad_enabled(grad):
        zero_init_attention(**tensors() | {"sinks": sinks}, is_causal=True)


@pytest.mark.parametrize("sink", [float("-inf"), -1e38, -1e30, 0.0, 1e30])
@pytest.mark.parametrize("bias", [torch.finfo(torch.float32).min, -1e30, 0.0, 1e30])
@pytest.mark.parametrize("backend", [CPU, "composed"])
def test_gradients_beside_a_far_bias(backend, bias, sink):
    """log(l) is lost beside a score of 1e30, in float64 too."""
    found = []
    for by, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        torch.manual_seed(0)
        leaves = [t.to(dtype).requires_grad_() for t in torch.randn(3, 1, 2, 5, 8).unbind()]
        sinks = torch.full((2,), sink, requires_grad=True)
        out = zero_init_attention(*leaves, attn_mask=torch.full((1, 1, 1, 5), bias), sinks=sinks, backend=by)
        found.append((out, *torch.autograd.grad(out.square().sum(), [*leaves, sinks])))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-5, atol=1e-5)
