"""The Triton and CUDA kernels on an NVIDIA GPU, where there is one: the named cases, and what only a chip can show.

Skipped elsewhere; what has run on which chip stands in the results, not here.
"""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from zinit_kernels import (
    dispatch,
    explain,
    prompt_attention_,
    zero_init_attention,
    zero_init_attention_with_kvcache,
)
from zinit_kernels.backends import extension
from zinit_kernels.backends.cuda import HEAD_DIMS
from zinit_kernels.testing import (
    CACHE_CASES,
    CASES,
    CacheCase,
    Case,
    check_cache_case,
    check_case,
    gradients,
    make_cache_arguments,
    make_inputs,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_cuda_kernels = pytest.mark.skipif(
    not extension.available("cuda"), reason=extension.why_unavailable("cuda")
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRAINING = Case("training", batch=4, heads_q=8, heads_kv=2, seqlens_q=(1024,), head_dim=128)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case, dtype):
    check_case(case, dtype, "triton", device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CACHE_CASES, ids=str)
def test_cache(case, dtype):
    check_cache_case(case, dtype, "triton", device="cuda")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hybrid_attention(case, dtype):
    run_or_hear_why(
        dispatch.why_not("hybrid", make_inputs(case, dtype, device="cuda").canonical(), False),
        lambda: check_case(case, dtype, "hybrid", device="cuda"),
    )


@pytest.mark.parametrize("kernel", ["CUDNN_ATTENTION", "FLASH_ATTENTION"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hybrid_by_each_kernel_of_the_vendor(head_dim, kernel):
    """Right, and at gate 0 with the bits of that kernel."""
    case = Case(
        "case", batch=2, heads_q=8, heads_kv=2, seqlens_q=(517,), head_dim=head_dim, layout="token_major"
    )
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        check_case(case, torch.bfloat16, "hybrid", device="cuda")
        inputs = make_inputs(replace(case, gate="zero"), torch.bfloat16, device="cuda")
        query, key, value = (inputs.tensors[name] for name in ("query", "key", "value"))
        plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        assert torch.equal(inputs.call("hybrid", return_lse=False)[0], plain)


@needs_cuda_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_attention(case, dtype):
    with torch.no_grad():
        run_or_hear_why(
            dispatch.why_not("cuda", make_inputs(case, dtype, device="cuda").canonical(), True),
            lambda: check_case(case, dtype, "cuda", backward=False, device="cuda"),
        )


@needs_cuda_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CACHE_CASES, ids=str)
def test_cuda_cache(case, dtype):
    reason = explain(**make_cache_arguments(case, dtype, device="cuda"))["cuda"]
    run_or_hear_why(
        reason.removeprefix("usable"), lambda: check_cache_case(case, dtype, "cuda", device="cuda")
    )


def run_or_hear_why(reason, run):
    """A named backend runs the call, or raises with the reason that `explain` gives."""
    if not reason:
        return run()
    with pytest.raises(ValueError, match=re.escape(reason)):
        run()


@needs_cuda_kernels
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_cuda_prefill_of_many_tiles(head_dim):
    case = Case(
        "long", batch=1, heads_q=4, heads_kv=2, seqlens_q=(1500,), head_dim=head_dim, window=(700, -1)
    )
    with torch.no_grad():
        check_case(case, torch.bfloat16, "cuda", backward=False, device="cuda")


@needs_cuda_kernels
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("prompt_length", [10, 128])
def test_cuda_prompt_attention(head_dim, prompt_length):
    case = Case("prompt", seqlens_q=(300,), head_dim=head_dim, heads_kv=2, prompt_length=prompt_length)
    query, _, _, prompt_key, prompt_value, gate = make_inputs(
        case, torch.bfloat16, device="cuda"
    ).tensors.values()
    given = query.transpose(1, 2), prompt_key.transpose(1, 2), prompt_value.transpose(1, 2), gate
    before = torch.randn(given[0].shape, device="cuda").bfloat16()
    with torch.no_grad():
        ours = prompt_attention_(before.clone(), *given, backend="cuda")
        expected = prompt_attention_(
            before.double(), *(t.double() for t in given[:3]), gate, backend="reference"
        )
    torch.testing.assert_close(ours.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_the_tuned_tiles(head_dim):
    """Long enough for every loop of the tiles that a chip is given: whole, masked and cut."""
    case = Case("long", batch=1, heads_q=4, heads_kv=2, seqlens_q=(1500,), head_dim=head_dim)
    check_case(case, torch.bfloat16, "triton", device="cuda")


def test_backward_gives_the_same_bits_twice():
    found = []
    for _ in range(2):
        inputs = make_inputs(TRAINING, torch.bfloat16, device="cuda")
        found.append(gradients(inputs.call("triton"), inputs))
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


def test_memory_is_inputs_outputs_and_gradients():
    inputs = make_inputs(
        Case("memory", seqlens_q=(4096,), head_dim=128, heads_q=32), torch.bfloat16, device="cuda"
    )
    tensors = list(inputs.tensors.values())
    torch.autograd.grad(inputs.call("triton")[0].sum(), tensors)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = inputs.call("triton")
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, tensors, grad_out)
    peak = torch.cuda.max_memory_allocated() - before
    needed = sum(t.untyped_storage().nbytes() for t in (out, lse, grad_out, *grads))
    inputs_too = needed + sum(t.untyped_storage().nbytes() for t in tensors)
    assert peak <= needed + 0.02 * inputs_too, f"{peak / 2**20:.1f} MiB, needed {needed / 2**20:.1f} MiB"


def test_lowest_adapted_layer_runs_the_prompt_kernels_alone():
    inputs = make_inputs(TRAINING, torch.bfloat16, device="cuda")
    for name in ("query", "key", "value"):
        inputs.tensors[name].requires_grad_(False)
    out = inputs.call("triton")[0]
    out.backward(torch.ones_like(out))  # compiles
    out = inputs.call("triton")[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        out.backward(torch.ones_like(out))
        torch.cuda.synchronize()
    names = {event.name for event in profile.events()}
    assert "zinit_partial_sums_kernel" in names and "zinit_add_partials_kernel" in names
    assert not names & {"zinit_grad_key_value_kernel", "zinit_grad_query_kernel"}


@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=needs_cuda_kernels)])
@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("num_splits, tokens", [(1, 1), (0, 1), (0, 40)])
def test_a_graph_follows_the_lengths_on_the_device(backend, page_size, num_splits, tokens):
    case = CacheCase(
        "graph", heads_q=8, heads_kv=2, head_dim=128, seqlens=(5, 700, 1023), capacity=1536, page_size=page_size,
        rotary_dim=128, seqlen_q=tokens,
    )  # fmt: skip
    given = make_cache_arguments(case, torch.bfloat16, device="cuda") | {"num_splits": num_splits}
    if page_size:  # the captured graph outlives the pages used now
        pages = given["k_cache"].shape[0]
        given["block_table"] = torch.randperm(pages, dtype=torch.int32, device="cuda")[
            : 3 * (1536 // 16)
        ].view(3, -1)
    for name in ("k_cache", "v_cache"):
        given[name] = torch.randn_like(given[name])
    zero_init_attention_with_kvcache(**given, backend=backend)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = zero_init_attention_with_kvcache(**given, backend=backend)
    for step in range(1, 4):
        given["cache_seqlens"] += tokens
        for name in ("q", "k", "v"):
            given[name].copy_(torch.randn_like(given[name]))
        copies = {name: t.clone() if torch.is_tensor(t) else t for name, t in given.items()}
        expected = zero_init_attention_with_kvcache(**copies, backend=backend)
        graph.replay()
        assert torch.equal(out, expected), f"step {step}"
        assert torch.equal(given["k_cache"], copies["k_cache"])


def test_compiles_as_one_graph():
    inputs = make_inputs(TRAINING, torch.bfloat16, device="cuda")
    tensors = list(inputs.tensors.values())

    def step(*tensors):
        return zero_init_attention(*tensors, is_causal=True, backend="triton")

    results = [
        (out, *torch.autograd.grad(out.float().square().sum(), tensors))
        for out in (step(*tensors), torch.compile(step, fullgraph=True)(*tensors))
    ]
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_prompt_branch_onto_flash_attention():
    """prompt_attention_ beside torch's own kernel is the fused call."""
    inputs = make_inputs(Case("branch", seqlens_q=(300,), head_dim=64), torch.bfloat16, device="cuda").tensors
    query, key, value, prompt_key, prompt_value, gate = inputs.values()
    tokens = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    out = prompt_attention_(
        tokens.transpose(1, 2), query.transpose(1, 2), prompt_key.transpose(1, 2), prompt_value.transpose(1, 2), gate,
        backend="triton",
    )  # fmt: skip
    fused = zero_init_attention(*inputs.values(), is_causal=True, backend="triton")
    torch.testing.assert_close(out.transpose(1, 2), fused, rtol=2e-2, atol=2e-2)


def test_tuning_changes_no_result(monkeypatch):
    from zinit_kernels.backends.triton import tuning

    monkeypatch.setattr(tuning, "ENABLED", True)
    monkeypatch.setattr(tuning, "_fastest", {})
    check_case(TRAINING, torch.bfloat16, "triton", device="cuda")
    assert {key[0] for key in tuning._fastest} == {
        "forward",
        "prompt_gradients",
        "grad_key_value",
        "grad_query",
    }
