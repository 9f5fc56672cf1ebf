"""What holds exactly on the CPU, whatever the rounding: hollow rows, determinism, order and packing."""

import pytest
import torch

from zinit_kernels import zero_init_attention
from zinit_kernels.testing import Case, cumulative, gradients, make_inputs

pytestmark = pytest.mark.native
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_a_query_without_keys_keeps_its_prompt_branch():
    inputs = make_inputs(Case("hollow", mask="all_masked", seqlens_q=(21,), causal=False), torch.float32)
    out, lse = inputs.call("cpu")
    assert (lse[-1] == float("-inf")).all() and torch.isfinite(out).all()
    no_keys = [inputs.tensors[name][-1:, :, :0] for name in ("key", "value")]
    prompts = [inputs.tensors[name] for name in ("prompt_key", "prompt_value", "gate")]
    alone = zero_init_attention(inputs.tensors["query"][-1:], *no_keys, *prompts, backend="cpu")
    assert torch.equal(out[-1:], alone) and out[-1].abs().max() > 0.1
    grads = gradients((out, lse), inputs)
    assert grads["key"][-1].count_nonzero() == 0 and grads["value"][-1].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_deterministic_and_independent_of_the_thread_count(dtype):
    case = Case("repeat", batch=3, heads_q=4, heads_kv=2, seqlens_q=(257,), table="indexed", gate="per_row")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 4):  # 6 key heads: whole ones for 1 and 2 threads, in pieces for 4
            torch.set_num_threads(count)
            inputs = make_inputs(case, dtype)
            outputs = inputs.call("cpu")
            results.append([*outputs, *gradients(outputs, inputs).values()])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_packing_changes_nothing_beyond_rounding():
    lengths = (30, 1, 64, 47)
    packed = make_inputs(Case("packed", packed=True, heads_q=4, heads_kv=2, seqlens_q=lengths), torch.float32)
    out, _ = packed.call("cpu")
    bounds = cumulative(lengths).tolist()
    prompts = [packed.tensors[name].transpose(1, 2) for name in ("prompt_key", "prompt_value")]
    for b in (2, 0, 3, 1):
        rows = slice(bounds[b], bounds[b + 1])
        one = [packed.tensors[name][rows].transpose(0, 1)[None] for name in ("query", "key", "value")]
        alone = zero_init_attention(*one, *prompts, packed.tensors["gate"], is_causal=True, backend="cpu")
        torch.testing.assert_close(out[:, :, rows], alone, rtol=2e-6, atol=2e-6)


def test_permuting_the_batch_permutes_the_result():
    inputs = make_inputs(Case("permute", batch=4), torch.float32)
    order = torch.tensor([2, 0, 3, 1])
    expected = inputs.call("cpu")[0][order]
    for name in ("query", "key", "value"):
        inputs.tensors[name] = inputs.tensors[name][order]
    assert torch.equal(inputs.call("cpu")[0], expected)


def test_inputs_are_never_written():
    inputs = make_inputs(
        Case("inputs", mask="padding", table="indexed", batch=4, gate="per_row"), torch.float32
    )
    before = {name: tensor.detach().clone() for name, tensor in inputs.tensors.items()}
    gradients(inputs.call("cpu"), inputs)
    for name, tensor in inputs.tensors.items():
        assert torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
