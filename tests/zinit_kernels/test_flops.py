"""FLOP formulas, against counts by hand: multiplications and additions of the products, nothing else."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zinit_kernels import zero_init_attention, zero_init_attention_varlen, zero_init_attention_with_kvcache

BATCH, HEADS, HEADS_KV, DIM, PROMPTS = 2, 4, 2, 16, 3
pytestmark = pytest.mark.native


def leaves(queries, keys, wants=(True,) * 6):
    shapes = (
        (BATCH, HEADS, queries, DIM), *((BATCH, HEADS_KV, keys, DIM),) * 2, *((HEADS_KV, PROMPTS, DIM),) * 2, (HEADS,),
    )  # fmt: skip
    return [torch.randn(shape, requires_grad=want) for shape, want in zip(shapes, wants, strict=True)]


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({}, 5 * 5),
        ({"is_causal": True}, 1 + 2 + 3 + 4 + 5),
        ({"is_causal": True, "window_size": (1, -1)}, 1 + 2 + 2 + 2 + 2),
        ({"window_size": (1, 2)}, 3 + 4 + 4 + 3 + 2),
    ],
)
def test_forward_counts_the_pairs_that_are_seen(options, pairs):
    inputs = leaves(5, 5, (False,) * 6)
    expected = 4 * DIM * BATCH * HEADS * (pairs + 5 * PROMPTS)
    assert counted(lambda: zero_init_attention(*inputs, backend="cpu", **options)) == expected


@pytest.mark.parametrize(
    ("wants", "token_products", "prompt_products"),
    [
        ((1, 1, 1, 1, 1, 1), 5, 5),
        ((0, 0, 0, 1, 1, 1), 0, 4),  # the lowest adapted layer
        ((0, 0, 1, 0, 0, 0), 2, 0),
        ((0, 1, 0, 0, 0, 0), 3, 2),
        ((0, 0, 0, 0, 0, 1), 0, 2),
    ],
)
def test_backward_counts_the_products_that_are_wanted(wants, token_products, prompt_products):
    inputs = leaves(7, 7, [bool(want) for want in wants])
    out = zero_init_attention(*inputs, is_causal=True, backend="cpu")
    expected = 2 * DIM * BATCH * HEADS * (token_products * 28 + prompt_products * 7 * PROMPTS)
    assert counted(lambda: out.sum().backward()) == expected


def test_packed_lengths_are_read():
    q, k = torch.randn(8, HEADS, DIM), torch.randn(9, HEADS_KV, DIM)
    prompt, gate = torch.randn(PROMPTS, HEADS_KV, DIM), torch.randn(HEADS)
    cu_q, cu_k = torch.tensor([0, 3, 8], dtype=torch.int32), torch.tensor([0, 7, 9], dtype=torch.int32)
    pairs = (5 + 6 + 7) + (0 + 0 + 0 + 1 + 2)  # bottom-right: 3 queries of 7 keys, 5 queries of 2
    found = counted(
        lambda: zero_init_attention_varlen(
            q, k, k, prompt, prompt, gate, cu_q, cu_k, 5, 7, causal=True, backend="cpu"
        )
    )
    assert found == 4 * DIM * HEADS * (pairs + 8 * PROMPTS)


def test_decode_counts_what_the_cache_holds():
    cache, new = torch.randn(2, BATCH, 32, HEADS_KV, DIM).unbind(), torch.randn(BATCH, 2, HEADS_KV, DIM)
    prompt = torch.randn(PROMPTS, HEADS_KV, DIM)
    found = counted(
        lambda: zero_init_attention_with_kvcache(
            torch.randn(BATCH, 2, HEADS, DIM),
            *cache,
            new,
            new,
            prompt_k=prompt,
            prompt_v=prompt,
            gate=0.5,
            cache_seqlens=torch.tensor([4, 20], dtype=torch.int32),
            causal=True,
            backend="cpu",
        )  # fmt: skip
    )
    assert found == 4 * DIM * HEADS * ((5 + 6) + (21 + 22) + BATCH * 2 * PROMPTS)


@pytest.mark.parametrize("counter_first", [True, False])
def test_registered_whichever_is_imported_first(counter_first):
    lines = ["import zinit_kernels", "from torch.utils import flop_counter"]
    script = "import sys, torch\n" + "\n".join(reversed(lines) if counter_first else lines)
    script += "\nassert all(getattr(torch.ops.zinit, f'{s}_{b}') in flop_counter.flop_registry"
    script += " for b, stages in zinit_kernels.operators.STAGES.items() for s in stages)"
    subprocess.run([sys.executable, "-c", script], check=True)
