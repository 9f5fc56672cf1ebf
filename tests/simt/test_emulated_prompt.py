"""`prompt_attention_` by the CUDA kernel on the emulator. Nothing here has run on a GPU."""

import pytest
import torch
from orders import in_all_orders

from zinit_kernels import dispatch, prompt_attention_
from zinit_kernels.backends import reference
from zinit_kernels.backends.cuda import HEAD_DIMS
from zinit_kernels.testing import Case, make_inputs
from zinit_kernels.testing.check import assert_within_eager_error

DTYPES = [torch.bfloat16, torch.float16]
CASES = [
    *(Case(f"head_dim_{d}", head_dim=d, heads_q=4, heads_kv=2, seqlens_q=(70,)) for d in HEAD_DIMS),
    Case("prompt_length_128", prompt_length=128, seqlens_q=(17,)),
    Case("prompt_length_17", prompt_length=17, seqlens_q=(1,), head_dim=256),
    Case("prompt_length_0", prompt_length=0, seqlens_q=(15,)),
    Case("per_sample", table="per_sample", seqlens_q=(16,)),
    Case("indexed", table="indexed", batch=5, gate="per_row", seqlens_q=(20,)),
    Case("identity", gate="scalar", gate_activation="identity", seqlens_q=(20,)),
    Case("float32_prompts", prompt_dtype=torch.float32, seqlens_q=(20,), head_dim=80),
    Case("gate_zero", gate="zero", seqlens_q=(20,)),
    Case("token_major", layout="token_major", heads_q=4, heads_kv=2, seqlens_q=(40,)),
    Case("packed", packed=True, seqlens_q=(0, 1, 15, 16, 17, 70), table="indexed", gate="per_row", heads_kv=2),
]  # fmt: skip


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def arguments(case, dtype):
    """The call's arguments in its own layout, and the canonical call without keys that says what is right."""
    inputs = make_inputs(case, dtype)
    query, _, _, prompt_key, prompt_value, gate = inputs.tensors.values()
    options = {
        name: inputs.options[name] for name in ("gate_activation", "prompt_index") if name in inputs.options
    }
    call = inputs.canonical()
    call = call._replace(key=call.key[:, :, :0], value=call.value[:, :, :0], max_seqlen_k=0, key_bias=None)
    if case.packed:
        options["cu_seqlens"] = inputs.options["cu_seqlens_q"]
        call = call._replace(cu_seqlens_k=torch.zeros_like(call.cu_seqlens_q))
        return (query, prompt_key, prompt_value, gate), options, call
    tables = prompt_key.transpose(1, 2), prompt_value.transpose(1, 2)
    return (query.transpose(1, 2), *tables, gate), options, call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(cuda, case, dtype):
    given, options, call = arguments(case, dtype)
    before = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    out = before.clone()
    assert prompt_attention_(out, *given, **options, backend="cuda") is out

    def expected(compute_dtype):
        branch = reference.attention(call, compute_dtype)[0]
        branch = branch.squeeze(0).transpose(0, 1) if case.packed else branch.transpose(1, 2)
        return before.to(compute_dtype) + branch.to(compute_dtype)

    double = call._replace(**{
        name: getattr(call, name).double() for name in ("query", "key", "value", "prompt_key", "prompt_value", "gate")
    })  # fmt: skip
    oracle = reference.attention(double)[0]
    oracle = oracle.squeeze(0).transpose(0, 1) if case.packed else oracle.transpose(1, 2)
    assert_within_eager_error("out", out, expected(dtype), before.double() + oracle, dtype)


@pytest.mark.parametrize("case", [CASES[3], CASES[5], CASES[-1]], ids=str)
def test_the_order_of_threads_and_copies_changes_no_bit(cuda, monkeypatch, case):
    def run():
        given, options, _ = arguments(case, torch.bfloat16)
        return [prompt_attention_(torch.ones_like(given[0]), *given, **options, backend="cuda")]

    assert in_all_orders(monkeypatch, run)


def test_without_prompt_effect_not_a_bit_changes(cuda):
    given, _, _ = arguments(Case("exact", gate="zero", seqlens_q=(20,)), torch.bfloat16)
    before = torch.randn(given[0].shape).bfloat16()
    assert torch.equal(prompt_attention_(before.clone(), *given, backend="cuda"), before)


def test_only_out_is_written(cuda):
    given, _, _ = arguments(Case("one_head", seqlens_q=(20,)), torch.bfloat16)
    wide = torch.ones(2, 20, 8, 64, dtype=torch.bfloat16)
    prompt_attention_(wide[:, :, :4], *given, backend="cuda")
    assert (wide[:, :, 4:] == 1).all() and (wide[:, :, :4] != 1).any()


def test_auto_takes_another_backend_for_an_out_that_the_kernel_does_not_take(cuda, monkeypatch):
    monkeypatch.setitem(dispatch.ORDER, "cpu", ("cuda", "composed", "reference"))
    given, _, _ = arguments(Case("elsewhere", seqlens_q=(20,)), torch.bfloat16)
    rows = [torch.ones(2, 20, 4, width, dtype=torch.bfloat16)[..., :64] for width in (64, 65)]
    aligned, misaligned = (prompt_attention_(out, *given) for out in rows)
    assert (aligned != 1).any()
    torch.testing.assert_close(misaligned, aligned, rtol=2e-2, atol=2e-2)


def test_what_is_not_supported_is_said(cuda):
    given, _, _ = arguments(Case("refused", seqlens_q=(20,)), torch.bfloat16)
    wide = torch.zeros(2, 20, 4, 65, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="rows of out must start at multiples of 16 bytes, got strides"):
        prompt_attention_(wide[..., :64], *given, backend="cuda")
    out = torch.zeros_like(given[0])
    with torch.enable_grad(), pytest.raises(ValueError, match="have no backward"):
        prompt_attention_(out, *given, backend="cuda")
    query, *prompts = given
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match="q gets under torch.autocast, torch.bfloat16, got torch.float32"),
    ):
        prompt_attention_(out.float(), query.float(), *prompts, backend="cuda")
