"""Inputs that are right and odd: views that overlap, gates with gaps, biases that are far from 0, empty batches."""

import math

import pytest
import torch

from zinit_kernels import zero_init_attention, zero_init_attention_varlen

BACKENDS = [pytest.param("cpu", marks=pytest.mark.native), "composed"]
TENSORS = ("query", "key", "value")


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def out_and_gradients(backend, dtype, tensors, **options):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = zero_init_attention(*leaves, backend=backend, **options)
    weights = torch.arange(out.shape[-1], dtype=dtype)
    return out, *torch.autograd.grad((out * weights).sum(), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", TENSORS)
def test_rows_that_overlap(backend, which):
    """SDPA with a query of strides (.., 1, 1) writes to wrong places."""
    tensors = dict.fromkeys(TENSORS, normal(1, 2, 9, 32))
    tensors[which] = normal(500).as_strided((1, 2, 9, 32), (200, 100, 1, 1))
    with torch.no_grad():
        out = zero_init_attention(*tensors.values(), backend=backend)
        expected = zero_init_attention(*(t.double() for t in tensors.values()), backend="reference")
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.native
@pytest.mark.parametrize("shape", [(4,), (1, 4, 1, 1), (1, 1, 4, 1)])
def test_gates_with_gaps(shape):
    """A column of a larger table of gates: cpu is not refused, and takes its values."""
    q, table = normal(1, 4, 3, 8), normal(1, 4, 3, 8)
    gate = normal(*shape, 3)[..., 1]
    assert not gate.is_contiguous()
    out, expected = (
        zero_init_attention(q, q, q, table, table, g, backend="cpu") for g in (gate, gate.contiguous())
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_smallest_number_as_the_bias_of_all_keys(backend, dtype):
    """Every key then counts the same, forward and backward; float64's smallest number is no -inf."""
    tensors = normal(1, 2, 5, 16), normal(1, 2, 7, 16), normal(1, 2, 7, 16)
    mask = torch.full((1, 1, 1, 7), torch.finfo(dtype).min, dtype=dtype)
    found = out_and_gradients(backend, torch.float32, tensors, attn_mask=mask)
    expected = out_and_gradients("reference", torch.float64, tensors, attn_mask=mask)
    assert expected[3].abs().max() > 1
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("rows", [0, 2])
def test_a_dense_mask_of_float64s_smallest_number(softcap, rows):
    tensors = normal(1, 2, 5, 16), normal(1, 2, 5, 16), normal(1, 2, 5, 16)
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    mask[:, :, rows] = torch.finfo(torch.float64).min
    found = out_and_gradients("composed", torch.float32, tensors, attn_mask=mask, softcap=softcap)
    expected = out_and_gradients("reference", torch.float64, tensors, attn_mask=mask, softcap=softcap)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_a_packed_batch_of_no_sequences_with_an_index(backend, softcap):
    q, table = torch.zeros(0, 2, 8), normal(3, 4, 2, 8).requires_grad_()
    nothing = torch.zeros(0, dtype=torch.int32)
    cu = torch.zeros(1, dtype=torch.int32)
    out = zero_init_attention_varlen(
        q, q, q, table, table, 0.5, cu, cu, 0, 0, prompt_index=nothing, softcap=softcap, backend=backend
    )
    assert out.shape == q.shape
    (grad,) = torch.autograd.grad(out.sum(), table)
    assert torch.equal(grad, torch.zeros_like(table))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS, "reference"])
@pytest.mark.parametrize("scale", [math.nan, math.inf, -1e39])
def test_scales_that_float32_does_not_have(backend, scale):
    q = normal(1, 2, 3, 8)
    with pytest.raises(ValueError, match="scale must be a finite number"):
        zero_init_attention(q, q, q, scale=scale, backend=backend)
