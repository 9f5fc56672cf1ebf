"""softcap: scores are bounded, on every backend. The cases of the other files compare it with the float64 reference."""

import math

import pytest
import torch

from zinit_kernels import (
    prompt_attention_,
    zero_init_attention,
    zero_init_attention_varlen,
    zero_init_attention_with_kvcache,
)
from zinit_kernels.testing import CacheCase, Case, make_cache_arguments, make_inputs
from zinit_kernels.testing.cases import GRADIENTS

BACKENDS = [pytest.param("cpu", marks=pytest.mark.native), "composed", "reference"]
CASE = Case("softcap", heads_q=4, heads_kv=2, seqlens_q=(19,), head_dim=12, softcap=0.6)


def formula(tensors, options):
    """Written for this file alone: what is compared with shares no code with it."""
    query, key, value, prompt_key, prompt_value, gate = tensors
    softcap, group = options["softcap"], query.shape[1] // key.shape[1]
    keys, values, prompt_keys, prompt_values = (
        t.repeat_interleave(group, 1) for t in (key, value, prompt_key, prompt_value)
    )
    scores = query @ keys.mT / math.sqrt(query.shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    capped = softcap * torch.tanh(scores / softcap)
    tokens = capped.masked_fill(hidden, -math.inf).softmax(-1) @ values
    scores = query @ prompt_keys.mT / math.sqrt(query.shape[-1])
    prompts = (softcap * torch.tanh(scores / softcap)).softmax(-1) @ prompt_values
    return tokens + gate.tanh()[None, :, None, None] * prompts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [0.05, 0.6, 30.0])
def test_out_and_every_gradient_are_the_formulas(backend, softcap):
    inputs = make_inputs(CASE, torch.float32)
    inputs.options = inputs.options | {"softcap": softcap}
    out, _ = inputs.call(backend, return_lse=False)
    exact = inputs.to(torch.float64)
    expected = formula([exact.tensors[name] for name in GRADIENTS], exact.options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)
    weights = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs.tensors.values(), weights)
    right = torch.autograd.grad(expected, exact.tensors.values(), weights.double())
    for name, ours, theirs in zip(GRADIENTS, found, right, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(
            ours.double(), theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()), msg=name
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_score_that_is_infinite_is_the_cap(backend):
    """tanh(inf) is 1; without a cap the row would be NaN."""
    inputs = make_inputs(CASE, torch.float32)
    inputs.tensors["key"].data[0, 0, 3, 0] = float("inf")
    inputs.tensors["query"].data.abs_()
    out, _ = inputs.call(backend, return_lse=False)
    assert out.isfinite().all()
    expected = formula([inputs.tensors[name] for name in GRADIENTS], inputs.options)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wide_cap_changes_nothing_beyond_rounding(backend):
    inputs = make_inputs(CASE, torch.float32)
    out, expected = (inputs.call(backend, softcap=cap, return_lse=False)[0] for cap in (1e6, 0.0))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(inputs.call(backend, softcap=None, return_lse=False)[0], expected)
    assert not torch.allclose(inputs.call(backend, return_lse=False)[0], expected, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_cache_function_gives_the_last_rows(backend):
    given = make_cache_arguments(
        CacheCase("cached", head_dim=12, heads_q=4, heads_kv=2, seqlens=(30, 30), seqlen_q=3, softcap=0.6),
        torch.float32,
    )
    out = zero_init_attention_with_kvcache(**given, backend=backend)
    keys, values = (given[name][:, :33].transpose(1, 2) for name in ("k_cache", "v_cache"))
    query = torch.cat((torch.zeros(2, 4, 30, 12), given["q"].transpose(1, 2)), 2)
    prompts = (given[name].transpose(1, 2) for name in ("prompt_k", "prompt_v"))
    expected = formula((query, keys, values, *prompts, given["gate"][0]), {"softcap": 0.6})[:, :, 30:]
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_prompt_branch_alone(backend):
    inputs = make_inputs(CASE, torch.float32)
    query, key, value, *prompts = (inputs.tensors[name].detach() for name in GRADIENTS)
    whole, tokens = (
        zero_init_attention(query, key, value, *table, is_causal=True, softcap=0.6, backend="reference")
        for table in (prompts, ())
    )
    out = tokens.transpose(1, 2).clone()
    prompt_k, prompt_v = (table.transpose(1, 2) for table in prompts[:2])
    prompt_attention_(
        out, query.transpose(1, 2), prompt_k, prompt_v, prompts[2], softcap=0.6, backend=backend
    )
    torch.testing.assert_close(out.transpose(1, 2), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.native
def test_gradients_can_be_differentiated_again():
    inputs = make_inputs(CASE, torch.float32)
    results = []
    for backend in ("cpu", "composed", "reference"):
        out, _ = inputs.call(backend, return_lse=False)
        (first,) = torch.autograd.grad(out.square().sum(), inputs.tensors["query"], create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), inputs.tensors["key"])[0])
    for found in results[:2]:
        torch.testing.assert_close(found, results[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("softcap", "error", "message"),
    [
        (-1.0, ValueError, "softcap must be 0.0 .no cap. or lie in .*, got -1.0"),
        (math.nan, ValueError, "softcap must be .* got nan"),
        (math.inf, ValueError, "softcap must be .* got inf"),
        (1e-40, ValueError, "softcap must be .* got 1e-40"),
        (torch.tensor(1.0), TypeError, "softcap must be a Python number.* got Tensor"),
        ("2", TypeError, "softcap must be a Python number.* got str"),
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_no_cap_is_refused(softcap, error, message, packed):
    q, cu = torch.randn(6, 2, 8), torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(error, match=message):
        if packed:
            zero_init_attention_varlen(q, q, q, None, None, None, cu, cu, 6, 6, softcap=softcap)
        else:
            zero_init_attention(q[None], q[None], q[None], softcap=softcap)


def test_gradcheck_of_the_reference():
    inputs = make_inputs(
        Case("gradcheck", seqlens_q=(4,), head_dim=3, prompt_length=2, softcap=0.5), torch.float64
    )
    named = [t.detach().double().requires_grad_() for t in inputs.tensors.values()]
    assert torch.autograd.gradcheck(
        lambda *t: zero_init_attention(*t, **inputs.options, return_lse=True, backend="reference"), named
    )
