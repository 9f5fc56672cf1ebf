"""Threads of the CPU kernels in a process that fork() made."""

import os

import pytest
import torch
from forked import in_a_child

from zinit_kernels import zero_init_attention

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


def gradients(query, prompt, gate):
    leaves = [tensor.clone().requires_grad_() for tensor in (query, prompt, gate)]
    out = zero_init_attention(
        leaves[0], leaves[0], leaves[0], leaves[1], leaves[1], leaves[2], is_causal=True
    )
    out.sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("parent", ["kernels", "torch"], ids=["the kernels ran", "torch's operators ran"])
def test_a_child_computes_what_its_parent_does(parent):
    """OpenMP, which torch's threads are, waits in a child for the threads that only its parent has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        query, prompt, gate = torch.randn(2, 2, 40, 16), torch.randn(1, 2, 5, 16), torch.randn(2)
        if parent == "kernels":
            expected = gradients(query, prompt, gate)
        else:
            torch.zeros(1 << 20).add_(1)  # more elements than one thread takes
            torch.set_num_threads(1)
            expected = gradients(query, prompt, gate)
            torch.set_num_threads(2)

        def compute():
            torch.set_num_threads(2)
            return all(map(torch.equal, gradients(query, prompt, gate), expected))

        assert in_a_child(compute) == "True"
    finally:
        torch.set_num_threads(threads)
