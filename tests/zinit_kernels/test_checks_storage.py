"""Tensors that are not what their storage says, or not where the query is: refused by name, or read as they mean."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from zinit_kernels import (
    explain,
    prompt_attention_,
    zero_init_attention,
    zero_init_attention_varlen,
    zero_init_attention_with_kvcache,
)

x, i32 = torch.randn, torch.int32
CUMULATIVE = torch.tensor([0, 2, 6], dtype=i32)


def whole():
    prompts = {"prompt_key": x(2, 2, 3, 8), "prompt_value": x(2, 2, 3, 8), "gate": x(1, 4)}
    tensors = {"query": x(2, 4, 6, 8), "key": x(2, 2, 6, 8), "value": x(2, 2, 6, 8)}
    return {
        **tensors,
        **prompts,
        "prompt_index": torch.zeros(2, dtype=i32),
        "attn_mask": torch.ones(2, 6) > 0,
    }


def unmasked():
    return {name: tensor for name, tensor in whole().items() if name != "attn_mask"}


def packed():
    return {
        "q": x(6, 4, 8), "k": x(6, 2, 8), "v": x(6, 2, 8), "prompt_k": x(2, 3, 2, 8), "prompt_v": x(2, 3, 2, 8),
        "gate": x(1, 4), "cu_seqlens_q": CUMULATIVE, "cu_seqlens_k": CUMULATIVE.clone(), "max_seqlen_q": 4,
        "max_seqlen_k": 4, "prompt_index": torch.zeros(2, dtype=i32),
    }  # fmt: skip


def cached():
    return {
        "q": x(2, 1, 4, 8), "k_cache": x(3, 16, 2, 8), "v_cache": x(3, 16, 2, 8), "k": x(2, 1, 2, 8),
        "v": x(2, 1, 2, 8), "prompt_k": x(2, 3, 2, 8), "prompt_v": x(2, 3, 2, 8), "gate": x(1, 4),
        "cache_seqlens": torch.tensor([3, 4], dtype=i32), "block_table": torch.tensor([[0, 1], [2, 0]], dtype=i32),
        "rotary_cos": x(32, 4), "rotary_sin": x(32, 4), "rotary_interleaved": True, "causal": True,
        "prompt_index": torch.zeros(2, dtype=i32),
    }  # fmt: skip


def branch():
    return {
        "q": x(6, 4, 8), "out": x(6, 4, 8), "prompt_k": x(2, 3, 2, 8), "prompt_v": x(2, 3, 2, 8), "gate": x(1, 4),
        "cu_seqlens": CUMULATIVE, "prompt_index": torch.zeros(2, dtype=i32),
    }  # fmt: skip


FUNCTIONS = {
    whole: zero_init_attention,
    unmasked: zero_init_attention,
    packed: zero_init_attention_varlen,
    cached: zero_init_attention_with_kvcache,
    branch: prompt_attention_,
}
TENSORS = [(build, name) for build in FUNCTIONS for name, value in build().items() if torch.is_tensor(value)]
EACH = pytest.mark.parametrize(("build", "name"), TENSORS, ids=lambda x: getattr(x, "__name__", x))


@EACH
@pytest.mark.parametrize("backend", ["auto", "composed", "reference"])
def test_a_tensor_elsewhere_is_named(build, name, backend):
    given = build()
    given[name] = given[name].to("meta")
    names = [n for n, value in given.items() if torch.is_tensor(value)]
    wrong, here, there = (names[1], "meta", "cpu") if name == names[0] else (name, "cpu", "meta")
    message = f"^{wrong} must be on the query's device {here}, got {there}: move one of the two$"
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[build](**given, backend=backend)
    if build is not branch:
        with pytest.raises(ValueError, match=message):
            explain(**given)


class Doubled(torch.Tensor):
    """Means twice what it stores, to the operators that it knows."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.double:
            return args[0].as_subclass(torch.Tensor) * 2
        return super().__torch_function__(func, types, args, kwargs)


class Dispatched(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


def doubled(tensor):
    return tensor.as_subclass(Doubled)


def dispatched(tensor):
    return torch.Tensor._make_wrapper_subclass(Dispatched, tensor.shape, dtype=tensor.dtype)


def masked(tensor):
    return torch.masked.masked_tensor(tensor, torch.ones_like(tensor, dtype=torch.bool))


def causal_bias(tensor):
    return causal_lower_right(3, 7)


@EACH
@pytest.mark.parametrize("make", [doubled, dispatched, causal_bias], ids=lambda f: f.__name__)
def test_a_subclass_with_a_meaning_of_its_own_is_named(build, name, make):
    if make is causal_bias and name == "attn_mask":
        return
    given = build()
    given[name] = make(given[name])
    kind = type(given[name]).__name__
    with pytest.raises(TypeError, match=f"^{name} must be a plain tensor, got a {kind}"):
        FUNCTIONS[build](**given)


STRANGE = {
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.flatten(0, -2).to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "strided_nested": lambda t: torch.nested.nested_tensor(list(t)),
    "jagged": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "masked": masked,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", ["query", "key", "prompt_value", "gate"])
def test_other_storage_is_refused_with_a_sentence(name, kind):
    given = unmasked()
    given[name] = STRANGE[kind](given[name])
    with pytest.raises(TypeError, match=rf"^{name} must "):
        zero_init_attention(**given)


def test_a_subclass_that_only_carries_a_name_stays_one():
    class Tagged(torch.Tensor):
        pass

    given = unmasked()
    expected = zero_init_attention(**given)
    out = zero_init_attention(**{name: tensor.as_subclass(Tagged) for name, tensor in given.items()})
    assert type(out) is Tagged and torch.equal(out.as_subclass(torch.Tensor), expected)


VIEWS = {
    "negative": lambda t: torch._neg_view(-t),
    "expanded": lambda t: t[:1].expand_as(t),
    "functional": lambda t: torch._to_functional_tensor(t),
}


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("name", ["query", "key", "prompt_value", "gate"])
def test_lazy_and_expanded_tensors_are_what_they_mean(name, kind):
    """Their storage is not their values either, but the dispatcher knows."""
    given = unmasked()
    strange = VIEWS[kind](given[name])
    plain = torch._from_functional_tensor(strange) if kind == "functional" else strange.clone() + 0
    out = zero_init_attention(**given | {name: strange})
    out = torch._from_functional_tensor(out) if kind == "functional" else out
    torch.testing.assert_close(out, zero_init_attention(**given | {name: plain}))


@pytest.mark.filterwarnings("ignore:Lower right causal bias")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(3, 7), (7, 7), (7, 3)], ids=str)
@pytest.mark.parametrize("align", [causal_lower_right, causal_upper_left], ids=lambda f: f.__name__)
def test_a_causal_bias_is_read_as_sdpa_reads_it(align, lengths, dtype):
    query, key = x(2, 4, lengths[0], 16).to(dtype), x(2, 4, lengths[1], 16).to(dtype)
    out = zero_init_attention(query, key, key, attn_mask=align(*lengths))
    expected = F.scaled_dot_product_attention(query, key, key, attn_mask=align(*lengths)._materialize())
    hollow = torch.zeros(lengths[0], 1, dtype=torch.bool)
    if align is causal_lower_right and lengths[0] > lengths[1]:
        hollow[: lengths[0] - lengths[1]] = True  # SDPA's answers to a query without keys differ
    expected = expected.masked_fill(hollow, 0)
    torch.testing.assert_close(
        out,
        expected,
        rtol=2e-2 if dtype == torch.bfloat16 else 1e-5,
        atol=1e-2 if dtype == torch.bfloat16 else 1e-5,
    )
    if align is causal_lower_right and dtype == torch.float32:
        assert explain(query, key, key, attn_mask=align(*lengths))["cpu"] != "attn_mask depends on the query"


def test_a_causal_bias_of_another_size_or_beside_is_causal_is_refused():
    query = x(1, 2, 5, 8)
    with pytest.raises(ValueError, match="CausalBias of 4 queries and 4 keys, there are 5 and 5"):
        zero_init_attention(query, query, query, attn_mask=causal_lower_right(4, 4))
    with pytest.raises(ValueError, match="CausalBias and is_causal is set"):
        zero_init_attention(query, query, query, attn_mask=causal_lower_right(5, 5), is_causal=True)
