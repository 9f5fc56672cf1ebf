"""The operators of PyTorch beneath `backends/hybrid/vendor.py`: their schemas, and how the backend calls them.

There is no GPU, so meta tensors take the calls of cuDNN's and flash-attention's operators. For the numbers, stand-ins
with the same schemas compute on CPU tensors, and look at what they are given as the operators on a GPU do.
"""

import contextlib

import pytest
import torch

from zinit_kernels.backends.hybrid import vendor
from zinit_kernels.testing import Case, check_case, make_inputs

ATEN = torch.ops.aten
# The parameters that are passed, in their order. Those of the state of random numbers have had several names.
SCHEMAS = {
    "flash_attention": "query, key, value, dropout_p, is_causal, return_debug_mask, scale",
    "flash_attention_backward": "grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, "
    "dropout_p, is_causal, ?, ?, scale",
    "cudnn_attention": "query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, "
    "scale",
    "cudnn_attention_backward": "grad_out, query, key, value, out, logsumexp, ?, ?, attn_bias, cum_seq_q, cum_seq_k, "
    "max_q, max_k, dropout_p, is_causal, scale",
    "flash_attention_for_cpu": "query, key, value, dropout_p, is_causal, attn_mask, scale",
    "flash_attention_for_cpu_backward": "grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, attn_mask, "
    "scale",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_is_the_one_that_is_called(name):
    schema = getattr(ATEN, f"_scaled_dot_product_{name}").default._schema
    expected = SCHEMAS[name].split(", ")
    found = [argument.name for argument in schema.arguments]
    assert len(found) == len(expected)
    assert all(theirs in (ours, "?") for ours, theirs in zip(found, expected, strict=True)), found
    results = 3 if "backward" in name else 2 if "for_cpu" in name else 9
    assert len(schema.returns) == results and all(str(r.type) == "Tensor" for r in schema.returns[:2])
    assert schema.arguments[-1].kwarg_only and schema.arguments[-1].name == "scale"


def on_meta(heads, tokens, head_dim=64):
    return torch.empty(2, tokens, heads, head_dim, dtype=torch.bfloat16, device="meta").transpose(1, 2)


@pytest.mark.parametrize("name", ["FLASH", "CUDNN"])
@pytest.mark.parametrize("tokens, keys, is_causal", [(33, 33, True), (20, 33, False)])
def test_the_operators_take_the_calls(name, tokens, keys, is_causal):
    room = getattr(vendor, name)
    query, key, value = on_meta(8, tokens), on_meta(2, keys), on_meta(2, keys)
    out, lse = room.forward(query, key, value, is_causal, 0.125)
    assert out.shape == query.shape and lse.shape == (2, 8, tokens) and lse.dtype == torch.float32
    assert room.empty_out(query).shape == query.shape
    grads = room.backward(torch.empty_like(out), query, key, value, out, lse, is_causal, 0.125)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]


@contextlib.contextmanager
def stand_ins(lse_dims):
    """The operators of GPUs on CPU tensors. Each notes its name, and asserts what its kernels on a GPU rely on."""
    library = torch.library.Library("aten", "IMPL")
    calls = []
    cpu_forward, cpu_backward = vendor.CPU.forward, vendor.CPU.backward

    def in_the_querys_order(query, out):
        return torch.empty_like(query).copy_(out)

    def state(query, dtype, *shape):
        return torch.empty(shape, dtype=dtype, device=query.device)

    def flash(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale):
        calls.append("flash")
        assert dropout_p == 0.0 and not return_debug_mask and scale > 0
        out, lse = cpu_forward(query, key, value, is_causal, scale)
        rng = state(query, torch.uint64, 2), state(query, torch.uint64)
        nothing = state(query, torch.float32, 0)
        sizes = query.shape[2], key.shape[2]
        return in_the_querys_order(query, out), lse, nothing, nothing, *sizes, *rng, nothing

    def flash_backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        cum_q,
        cum_k,
        max_q,
        max_k,
        p,
        is_causal,
        seed,
        offset,
        *,
        scale,
    ):
        calls.append("flash backward")
        assert (
            cum_q is None and cum_k is None and (max_q, max_k) == (query.shape[2], key.shape[2]) and p == 0.0
        )
        assert lse.is_contiguous() and lse.shape == query.shape[:3] and seed.shape == (2,)
        assert out.transpose(1, 2).is_contiguous()  # else the operator copies it
        grads = cpu_backward(grad_out, query, key, value, out, lse, is_causal, scale)
        return tuple(in_the_querys_order(like, g) for like, g in zip((query, key, value), grads, strict=True))

    def cudnn(
        query,
        key,
        value,
        bias,
        compute_lse,
        dropout_p=0.0,
        is_causal=False,
        return_debug_mask=False,
        *,
        scale,
    ):
        calls.append("cudnn")
        assert bias is None and compute_lse and dropout_p == 0.0 and not return_debug_mask
        out, lse = cpu_forward(query, key, value, is_causal, scale)
        nothing, rng = state(query, torch.float32, 0), state(query, torch.int64)
        sizes = query.shape[2], key.shape[2]
        lse = lse.unsqueeze(-1) if lse_dims == 4 else lse
        return in_the_querys_order(query, out), lse, nothing, nothing, *sizes, rng, rng.clone(), nothing

    def cudnn_backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        seed,
        offset,
        bias,
        cum_q,
        cum_k,
        max_q,
        max_k,
        p,
        is_causal,
        *,
        scale,
    ):
        calls.append("cudnn backward")
        assert bias is None and cum_q is None and cum_k is None and p == 0.0
        assert (max_q, max_k) == (query.shape[2], key.shape[2])
        assert lse.dim() == lse_dims and lse.is_contiguous()
        # a plan that is kept was made for these strides
        assert out.stride() == torch.empty_like(query).stride() == grad_out.stride()
        grads = cpu_backward(grad_out, query, key, value, out, lse.view(query.shape[:3]), is_causal, scale)
        return tuple(in_the_querys_order(like, g) for like, g in zip((query, key, value), grads, strict=True))

    for name, function in {
        "flash_attention": flash,
        "flash_attention_backward": flash_backward,
        "cudnn_attention": cudnn,
        "cudnn_attention_backward": cudnn_backward,
    }.items():
        library.impl(f"_scaled_dot_product_{name}", function, "CPU")
    try:
        yield calls
    finally:
        library._destroy()


@pytest.fixture
def choose(monkeypatch):
    """Makes CPU tensors take the ways of tensors on a GPU, where SDPA would choose this kernel."""

    def chosen(number):
        for name in ("of_forward", "of_backward"):
            original = getattr(vendor, name)
            monkeypatch.setattr(
                vendor, name, lambda query, *rest, original=original: original(OnGpu(query), *rest)
            )
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda query, *rest, **named: number)
        monkeypatch.setattr(vendor, "_cudnn_lse_dims", 0)

    return chosen


class OnGpu:
    """A tensor of which the choice is asked as on a GPU."""

    is_cpu = False

    def __init__(self, tensor):
        self.shape = tensor.shape


CUDNN, FLASH, EFFICIENT, MATH = 3, 1, 2, 0


@pytest.mark.interpreted
@pytest.mark.parametrize("layout", ["contiguous", "token_major", "sliced"])
@pytest.mark.parametrize("number, lse_dims", [(CUDNN, 4), (CUDNN, 3), (FLASH, 4)], ids=str)
def test_right_by_the_operators_of_gpus(number, lse_dims, layout, choose):
    """Forward and all gradients through the calls that a GPU gets, whatever the layout."""
    case = Case("case", heads_q=4, heads_kv=2, seqlens_q=(37,), head_dim=24, layout=layout)
    choose(number)
    with stand_ins(lse_dims) as calls:
        check_case(case, torch.float32, "hybrid")
    name = "cudnn" if number == CUDNN else "flash"
    assert calls == [name, f"{name} backward"]


@pytest.mark.interpreted
@pytest.mark.parametrize("table", ["shared", "none"])
def test_results_are_token_major_whatever_the_vendor_returns(table, choose):
    """torch.compile was promised these strides; the operators keep the order of the query's dimensions."""
    case = Case("case", heads_q=4, heads_kv=2, seqlens_q=(9,), head_dim=16, table=table)
    choose(FLASH)
    inputs = make_inputs(case, torch.float32)
    tokens = [inputs.tensors[name] for name in ("query", "key", "value")]
    assert all(t.is_contiguous() for t in tokens)
    with stand_ins(4):
        out, _ = inputs.call("hybrid", return_lse=False)
        grads = torch.autograd.grad(out.square().sum(), tokens)
    assert all(t.transpose(1, 2).is_contiguous() for t in (out, *grads))


@pytest.mark.interpreted
@pytest.mark.parametrize("head_dim, number, expected", [
    (256, CUDNN, "flash"), (64, EFFICIENT, "flash"), (64, MATH, "flash"), (64, CUDNN, "cudnn"),
])  # fmt: skip
def test_which_operator_is_called(head_dim, number, expected, choose):
    """cuDNN's where SDPA would take it and every chip has its backward; else flash-attention's."""
    choose(number)
    with stand_ins(4) as calls, torch.no_grad():
        make_inputs(Case("case", seqlens_q=(5,), head_dim=head_dim), torch.float32).call("hybrid")
    assert calls == [expected]


@pytest.mark.interpreted
def test_backward_takes_flash_attention_where_cudnn_was_not_seen(choose, monkeypatch):
    """How many dimensions cuDNN's log-sum-exp has is known from its forward alone."""
    case = Case("case", seqlens_q=(5,), head_dim=16)
    inputs = make_inputs(case, torch.float32)
    choose(FLASH)
    with stand_ins(4) as calls:
        out, _ = inputs.call("hybrid", return_lse=False)
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *given, **named: CUDNN)
        out.sum().backward()
    assert calls == ["flash", "flash backward"]


@pytest.mark.interpreted
def test_a_setting_that_changes_cudnns_layout_leaves_it_out(choose, monkeypatch):
    choose(CUDNN)
    monkeypatch.setattr(vendor, "_CUDNN_IS_RAGGED", True)
    with stand_ins(4) as calls, torch.no_grad():
        make_inputs(Case("case", seqlens_q=(5,), head_dim=16), torch.float32).call("hybrid")
    assert calls == ["flash"]
