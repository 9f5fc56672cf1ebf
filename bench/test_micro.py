"""Micro-benchmarks for who works on a kernel: python -m pytest bench/test_micro.py --benchmark-compare

Not part of the tests. pytest-benchmark saves runs (--benchmark-autosave) and compares them.
"""

import pytest
import torch

from zinit_kernels import zero_init_attention, zero_init_attention_with_kvcache

DTYPES = [torch.float32, torch.bfloat16]


def inputs(seqlen, dtype, requires_grad=False):
    torch.manual_seed(0)
    tensors = [torch.randn(1, 32, s, 128).to(dtype) for s in (seqlen, seqlen, seqlen, 10, 10)]
    return [t.requires_grad_(requires_grad) for t in [*tensors, torch.randn(32) + 0.3]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen", [128, 512])
def test_forward(benchmark, seqlen, dtype):
    benchmark(zero_init_attention, *inputs(seqlen, dtype), is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen", [128, 512])
def test_forward_and_backward(benchmark, seqlen, dtype):
    tensors = inputs(seqlen, dtype, requires_grad=True)
    grad_out = torch.randn_like(tensors[0])
    benchmark(lambda: torch.autograd.grad(zero_init_attention(*tensors, is_causal=True), tensors, grad_out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen", [512, 8192])
def test_decode(benchmark, seqlen, dtype):
    query, key, value, prompt_key, prompt_value, gate = inputs(seqlen, dtype)
    key, value = (t.transpose(1, 2) for t in (key, value))
    benchmark(
        zero_init_attention_with_kvcache, query[:, :, :1].transpose(1, 2), key, value,
        prompt_k=prompt_key.transpose(1, 2), prompt_v=prompt_value.transpose(1, 2), gate=gate,
        cache_seqlens=torch.tensor([seqlen], dtype=torch.int32),
    )  # fmt: skip
