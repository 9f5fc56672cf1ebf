"""Keywords of SDPA's and flash-attn's functions: accepted where they change nothing, else refused with what to do."""

import inspect

import pytest
import torch

import zinit_kernels
from zinit_kernels import explain, ported
from zinit_kernels.testing import CacheCase, Case, make_cache_arguments, make_inputs
from zinit_kernels.testing.cases import GRADIENTS

FUNCTIONS = {
    "zero_init_attention": make_inputs(Case("whole", seqlens_q=(5,), head_dim=8), torch.float32),
    "zero_init_attention_varlen": make_inputs(
        Case("packed", seqlens_q=(5, 3), head_dim=8, packed=True), torch.float32
    ),
}
# The parameters of flash-attn 2.8's functions and of flash-attn 3's.
FLASH_2 = (
    "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
)
FLASH_3 = (
    "q k v softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk softcap num_splits "
    "pack_gqa deterministic sm_margin return_attn_probs"
)
PACKED = " cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
CACHED = (
    "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad softmax_scale causal "
    "window_size softcap rotary_interleaved num_splits return_softmax_lse"
)
PEERS = {
    "zero_init_attention": f"{FLASH_2} {FLASH_3} attn_mask is_causal scale enable_gqa",
    "zero_init_attention_varlen": f"{FLASH_2}{PACKED} block_table {FLASH_3}{PACKED} seqused_q seqused_k",
    "zero_init_attention_with_kvcache": f"{CACHED} block_table alibi_slopes qv page_table cu_seqlens_q "
    "cu_seqlens_k_new max_seqlen_q rotary_seqlens q_descale k_descale v_descale attention_chunk scheduler_metadata "
    "pack_gqa sm_margin",
}


def call(name, **keywords):
    function = getattr(zinit_kernels, name)
    if name == "zero_init_attention_with_kvcache":
        return function(**make_cache_arguments(CacheCase("cached", head_dim=8), torch.float32) | keywords)
    inputs = FUNCTIONS[name]
    return function(*(inputs.tensors[tensor] for tensor in GRADIENTS), **inputs.options | keywords)


@pytest.mark.parametrize("name", ported.KEYWORDS)
def test_every_keyword_of_the_functions_is_known(name):
    own = inspect.signature(getattr(zinit_kernels, name)).parameters
    peers = set(PEERS[name].split())
    if name == "zero_init_attention":
        peers -= {"q", "k", "v"}  # query, key and value, which Python says are missing
    assert peers <= own.keys() | ported.KEYWORDS[name].keys()
    assert not own.keys() & ported.KEYWORDS[name].keys()  # else an argument would never be looked up


@pytest.mark.parametrize("name", ported.KEYWORDS)
def test_values_that_change_nothing_are_accepted(name):
    expected = call(name)
    for keyword, (accepted, _) in ported.KEYWORDS[name].items():
        values = (3, "x", torch.ones(2)) if isinstance(accepted, ported.Anything) else accepted
        for value in (None, *values):
            assert torch.equal(call(name, **{keyword: value}), expected), keyword
    neutral = {
        "dropout_p": 0.0,
        "softcap": 0.0,
        "deterministic": True,
        "alibi_slopes": None,
        "return_attn_probs": False,
    }
    assert torch.equal(call(name, **neutral), expected)


@pytest.mark.parametrize(
    ("name", "keyword", "value"),
    [
        (name, keyword, value)
        for name, keywords in ported.KEYWORDS.items()
        for keyword, (accepted, _) in keywords.items()
        for value in (0.5, torch.zeros(()), "x")
        if not isinstance(accepted, ported.Anything)
    ],
    ids=str,
)
def test_other_values_get_a_sentence(name, keyword, value):
    if keyword in ("enable_gqa", "deterministic", "rotary_interleaved") and value == 0.5:
        value = 2
    with pytest.raises(TypeError, match=f"^{name} does not take {keyword}=.*: ") as caught:
        call(name, **{keyword: value})
    assert "unexpected keyword" not in str(caught.value)


@pytest.mark.parametrize("name", ported.KEYWORDS)
def test_unknown_names_are_pythons_type_error(name):
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'sofcap'$"):
        call(name, sofcap=None)


def test_explain_takes_the_same_keywords():
    query = torch.randn(1, 2, 5, 8)
    assert explain(query, query, query, dropout_p=0.0, enable_gqa=True).selected
    with pytest.raises(TypeError, match="dropout_p=0.1"):
        explain(query, query, query, dropout_p=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sofcap'"):
        explain(query, query, query, sofcap=0.1)
