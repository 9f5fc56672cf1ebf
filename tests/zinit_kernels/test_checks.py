"""Every refusal names the argument, what was expected, what came, and what to do; explain says what would run."""

import inspect
import os
import subprocess
import sys

import pytest
import torch

from zinit_kernels import (
    explain,
    prompt_attention_,
    zero_init_attention,
    zero_init_attention_varlen,
    zero_init_attention_with_kvcache,
)


def sdpa(**changed):
    x = torch.randn
    given = {
        "query": x(2, 4, 6, 8), "key": x(2, 2, 6, 8), "value": x(2, 2, 6, 8), "prompt_key": x(1, 2, 3, 8),
        "prompt_value": x(1, 2, 3, 8), "gate": torch.ones(4),
    }  # fmt: skip
    return given | changed


def varlen(**changed):
    x, cu = torch.randn, torch.tensor([0, 2, 6], dtype=torch.int32)
    given = {
        "q": x(6, 4, 8), "k": x(6, 2, 8), "v": x(6, 2, 8), "prompt_k": x(1, 3, 2, 8), "prompt_v": x(1, 3, 2, 8),
        "gate": torch.ones(4), "cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 4, "max_seqlen_k": 4,
    }  # fmt: skip
    return given | changed


def cache(**changed):
    x = torch.randn
    given = {
        "q": x(2, 1, 4, 8), "k_cache": x(2, 16, 2, 8), "v_cache": x(2, 16, 2, 8),
        "k": x(2, 1, 2, 8), "v": x(2, 1, 2, 8),
        "prompt_k": x(3, 2, 8), "prompt_v": x(3, 2, 8), "gate": 0.5, "cache_seqlens": torch.tensor([3, 4]),
        "causal": True,
    }  # fmt: skip
    return given | changed


x, i32 = torch.randn, torch.int32
REFUSED = {
    "list": (sdpa, {"query": [1.0]}, TypeError, "query must be a tensor"),
    "sparse": (sdpa, {"key": x(2, 2, 6, 8).to_sparse()}, TypeError, "key must be a dense tensor.*got torch.sparse_coo"),
    "nested": (
        sdpa,
        {"query": torch.nested.nested_tensor([x(6, 4, 8), x(5, 4, 8)], layout=torch.jagged).transpose(1, 2)},
        TypeError,
        "query must be a dense tensor.*got a nested one.*zero_init_attention_varlen",
    ),
    "three_dims": (sdpa, {"query": x(4, 6, 8)}, ValueError, r"query must have 4 dimensions .*\(4, 6, 8\)"),
    "integers": (sdpa, {"query": torch.ones(2, 4, 6, 8, dtype=i32)}, TypeError, "query must be float32.*int32"),
    "dtype": (sdpa, {"key": x(2, 2, 6, 8).half()}, TypeError, "key must have the query's dtype torch.float32"),
    "batch": (sdpa, {"key": x(3, 2, 6, 8)}, ValueError, r"key must have shape \(2, \*, \*, 8\), got \(3, 2, 6, 8\)"),
    "value": (sdpa, {"value": x(2, 2, 5, 8)}, ValueError, r"value must have shape \(2, 2, 6, 8\)"),
    "heads": (sdpa, {"query": x(2, 5, 6, 8)}, ValueError, "5 heads of query must be a multiple of the 2"),
    "swapped": (sdpa, {"query": x(2, 6, 4, 8), "key": x(2, 4, 4, 8), "value": x(2, 4, 4, 8)}, ValueError, "swapped"),
    "prompt_heads": (sdpa, {"prompt_key": x(1, 4, 3, 8)}, ValueError, r"prompt_key must have shape \(N, 2, P, 8\)"),
    "prompt_layout": (sdpa, {"prompt_key": x(1, 3, 2, 8)}, ValueError, "heads and prompts look swapped"),
    "prompt_float8": (
        sdpa, {"prompt_key": x(1, 2, 3, 8).to(torch.float8_e4m3fn)}, TypeError, "prompt_key.*got torch.float8_e4m3fn",
    ),
    "prompt_lengths": (sdpa, {"prompt_value": x(1, 2, 4, 8)}, ValueError, "must have the same shape"),
    "prompt_long": (sdpa, {"prompt_key": x(1, 2, 129, 8), "prompt_value": x(1, 2, 129, 8)}, ValueError, "at most 128"),
    "prompt_alone": (sdpa, {"gate": None}, ValueError, "prompt_key, prompt_value and gate must be given together"),
    "gate_alone": (sdpa, {"prompt_key": None, "prompt_value": None}, ValueError, "gate and prompt_index need prompt"),
    "gate_size": (sdpa, {"gate": torch.ones(3)}, ValueError, r"gate must hold 1 or 4 values.*got \(3,\)"),
    "gate_integer": (sdpa, {"gate": torch.ones(4, dtype=i32)}, TypeError, "gate must be a floating-point"),
    "activation": (sdpa, {"gate_activation": "sigmoid"}, ValueError, "gate_activation must be one of.*sigmoid"),
    "rows": (sdpa, {"prompt_key": x(3, 2, 3, 8), "prompt_value": x(3, 2, 3, 8)}, ValueError, "3 rows for a batch of 2"),
    "index_size": (sdpa, {"prompt_index": torch.zeros(3, dtype=i32)}, ValueError, r"prompt_index must.*\(2,\)"),
    "index_float": (sdpa, {"prompt_index": torch.zeros(2)}, TypeError, "prompt_index must be an int32"),
    "causal": (sdpa, {"query": x(2, 4, 1, 8), "is_causal": True}, ValueError, "with_kvcache"),
    "window": (sdpa, {"window_size": 5}, TypeError, r"window_size must be \(left, right\)"),
    "window_negative": (sdpa, {"window_size": (-2, 0)}, ValueError, "numbers >= -1"),
    "mask_shape": (sdpa, {"attn_mask": torch.ones(2, 7) > 0}, ValueError, r"\[B, S\] = \(2, 6\)"),
    "mask_type": (sdpa, {"attn_mask": torch.ones(2, 6, dtype=i32)}, TypeError, "attn_mask must be a bool"),
    "mask_ambiguous": (
        sdpa,
        {name: t.repeat(3, 1, 1, 1) for name, t in sdpa().items() if name in ("query", "key", "value")}
        | {"attn_mask": torch.ones(6, 6) > 0},
        ValueError,
        "key padding.*dense",
    ),
    "backend": (sdpa, {"backend": "cublas"}, ValueError, "backend must be 'auto' or one of"),
    "unknown": (sdpa, {"dropout_p": 0.1}, TypeError, "dropout_p"),
    "named_backend": (sdpa, {"attn_mask": x(2, 4, 6, 6), "backend": "cpu"}, ValueError, "cannot run.*use backend="),
    "packed_dims": (varlen, {"q": x(1, 6, 4, 8)}, ValueError, "q must have 3 dimensions"),
    "cu_float": (varlen, {"cu_seqlens_q": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens_q must be an int32"),
    "cu_sizes": (varlen, {"cu_seqlens_q": torch.tensor([0, 6])}, ValueError, "must both hold B . 1"),
    "max_tensor": (varlen, {"max_seqlen_q": torch.tensor(4)}, TypeError, "max_seqlen_q must be a Python int"),
    "cache_pair": (cache, {"v": None}, ValueError, "k and v must be given together"),
    "cache_batch": (cache, {"k_cache": x(3, 16, 2, 8)}, ValueError, r"k_cache must have shape \(2, \*, \*, 8\)"),
    "cache_strides": (cache, {"k_cache": x(2, 16, 8, 2).transpose(2, 3)}, ValueError, "contiguous in its last"),
    "cache_grad": (cache, {"k_cache": x(2, 16, 2, 8).requires_grad_()}, ValueError, "no backward"),
    "seqlens": (cache, {"cache_seqlens": torch.tensor([3])}, ValueError, r"cache_seqlens must have shape \(2,\)"),
    "rotary_pair": (cache, {"rotary_cos": x(16, 4)}, ValueError, "rotary_cos and rotary_sin must be given together"),
    "rotary_wide": (cache, {"rotary_cos": x(16, 5), "rotary_sin": x(16, 5)}, ValueError, "rotary_dim <= 8"),
    "splits": (cache, {"num_splits": -1}, ValueError, "num_splits"),
    "splits_half": (cache, {"num_splits": 2.5}, TypeError, "num_splits must be an integer, got 2.5"),
    "splits_word": (cache, {"num_splits": "a"}, TypeError, "num_splits must be an integer, got 'a'"),
    "splits_huge": (cache, {"num_splits": 2**63}, ValueError, "num_splits must fit into 64 bits"),
    "window_huge": (sdpa, {"window_size": (2**63, 0)}, ValueError, "window_size must fit into 64 bits"),
    "longest_huge": (varlen, {"max_seqlen_k": 2**63}, ValueError, "max_seqlen_k must fit into 64 bits"),
    "scale": (sdpa, {"scale": "x"}, TypeError, "scale must be a Python number.*got str"),
    "scale_complex": (sdpa, {"scale": 1j}, TypeError, "scale must be a Python number.*got complex"),
    "empty_heads": (sdpa, {"query": x(2, 4, 6, 0)}, ValueError, "query must have a head_dim of at least 1"),
}  # fmt: skip
FUNCTIONS = {
    sdpa: zero_init_attention,
    varlen: zero_init_attention_varlen,
    cache: zero_init_attention_with_kvcache,
}


def swapped(given, names, dims=(1, 2)):
    return given | {name: given[name].transpose(*dims) for name in names}


def branch(**changed):
    given = {"out": x(2, 6, 4, 8), "q": x(2, 6, 4, 8), "prompt_k": x(1, 3, 2, 8), "prompt_v": x(1, 3, 2, 8)}
    return given | {"gate": torch.ones(4)} | changed


def caches(**changed):
    """Five queries, of which the keys have no multiple."""
    return cache(q=x(2, 5, 4, 8), k=x(2, 5, 2, 8), v=x(2, 5, 2, 8), **changed)


SDPA_TENSORS, PROMPTS = ("query", "key", "value"), ("prompt_key", "prompt_value")
TO_SDPA = (
    r"heads and tokens swapped, \[B, T, H, D\]: this function takes \[B, H, T, D\], use .transpose\(1, 2\)"
)
TO_FLASH = (
    r"heads and tokens swapped, \[B, H, T, D\]: this function takes \[B, T, H, D\], use .transpose\(1, 2\)"
)
TO_PACKED = (
    r"heads and tokens swapped, \[H, total, D\]: this function takes \[total, H, D\], use .transpose\(0, 1\)"
)
ALONE = r"tokens of {} swapped\? This function takes \[B, {}, D\]"
SWAPPED = {
    "whole": (zero_init_attention, swapped(sdpa(), SDPA_TENSORS), "^query, key and value have " + TO_SDPA),
    "whole_with_prompts": (
        zero_init_attention, swapped(sdpa(), (*SDPA_TENSORS, *PROMPTS)), "^query, key and value have " + TO_SDPA,
    ),
    "whole_causal": (
        zero_init_attention, swapped(sdpa(is_causal=True), SDPA_TENSORS), "query, key and value have " + TO_SDPA,
    ),
    "more_keys": (
        zero_init_attention, swapped(sdpa(key=x(2, 2, 9, 8), value=x(2, 2, 9, 8)), SDPA_TENSORS),
        "query and key have " + TO_SDPA,
    ),
    "query_alone": (zero_init_attention, swapped(sdpa(query=x(2, 4, 5, 8)), ("query",)), ALONE.format("query", "H, T")),
    "mask": (
        zero_init_attention,
        swapped(sdpa(**dict.fromkeys((*PROMPTS, "gate")), attn_mask=torch.ones(2, 6) > 0), SDPA_TENSORS),
        "attn_mask must be .*query, key and value have " + TO_SDPA,
    ),
    "gate": (prompt_attention_, swapped(branch(), ("out", "q")), "^gate must hold .*out and q have " + TO_FLASH),
    "packed": (zero_init_attention_varlen, swapped(varlen(), "qkv", (0, 1)), "^q, k and v have " + TO_PACKED),
    "packed_without_prompts": (
        zero_init_attention_varlen, swapped(varlen(**dict.fromkeys(("prompt_k", "prompt_v", "gate"))), "qkv", (0, 1)),
        "q, k and v have " + TO_PACKED,
    ),
    "caches": (
        zero_init_attention_with_kvcache, swapped(caches(), ("q", "k_cache", "v_cache", "k", "v")),
        "q and k_cache have " + TO_FLASH,
    ),
    "caches_alone": (
        zero_init_attention_with_kvcache, swapped(caches(), ("k_cache", "v_cache")), ALONE.format("k_cache", "T, H"),
    ),
    "new_keys": (zero_init_attention_with_kvcache, swapped(caches(), "kv"), "^k must .*k and v have " + TO_FLASH),
    "branch": (
        prompt_attention_, swapped(branch(out=x(2, 5, 4, 8), q=x(2, 5, 4, 8)), ("out", "q")), ALONE.format("q", "T, H"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SWAPPED)
def test_a_swapped_layout_is_named_as_such(name):
    function, given, message = SWAPPED[name]
    with pytest.raises(ValueError, match=message):
        function(**given)


@pytest.mark.parametrize("name", ["value", "prompt_layout", "prompt_heads", "gate_size", "mask_shape"])
def test_no_other_fault_is_taken_for_a_swapped_layout(name):
    build, changed, error, _ = REFUSED[name]
    with pytest.raises(error) as caught:
        FUNCTIONS[build](**build(**changed))
    assert "tokens swapped" not in str(caught.value)


# flash-attn 2.8 and torch 2.11, where a name of theirs is one of ours
THEIR_DEFAULTS = {
    zero_init_attention: {"attn_mask": None, "is_causal": False, "scale": None},
    zero_init_attention_varlen: {"softmax_scale": None, "causal": False, "window_size": (-1, -1)},
    zero_init_attention_with_kvcache: {
        "k": None, "v": None, "rotary_cos": None, "rotary_sin": None, "cache_seqlens": None, "block_table": None,
        "softmax_scale": None, "causal": False, "window_size": (-1, -1), "rotary_interleaved": True, "num_splits": 0,
    },
}  # fmt: skip
MUST_BE_GIVEN = {"cache_seqlens", "causal", "rotary_interleaved"}


@pytest.mark.parametrize("function", THEIR_DEFAULTS, ids=lambda function: function.__name__)
def test_a_familiar_name_has_the_familiar_default_or_none(function):
    ours = inspect.signature(function).parameters
    for name, default in THEIR_DEFAULTS[function].items():
        if name not in MUST_BE_GIVEN or function is not zero_init_attention_with_kvcache:
            assert ours[name].default == default, name
    if function is zero_init_attention_with_kvcache:
        given = cache(rotary_cos=x(16, 4), rotary_sin=x(16, 4), rotary_interleaved=True)
        for backend in ("auto", "reference"):
            function(**given, backend=backend)
            for name in MUST_BE_GIVEN:
                without = {key: value for key, value in given.items() if key != name}
                with pytest.raises(TypeError, match=name):
                    function(**without, backend=backend)
        with pytest.raises(
            TypeError, match="flash_attn_with_kvcache's default is False, .* this function was True"
        ):
            function(**cache(causal=None))
        with pytest.raises(TypeError, match="default is True, the default of this function was False"):
            function(**given | {"rotary_interleaved": None})
        function(**cache())  # no tables: no pairs


def test_positions_of_another_function_are_no_prompts():
    """The fourth argument of SDPA is a mask, of flash_attn_varlen_func cumulative lengths."""
    given = sdpa()
    with pytest.raises(ValueError, match="must be given together"):
        zero_init_attention(*(given[n] for n in SDPA_TENSORS), torch.ones(6, 6) > 0)
    packed = varlen()
    lengths = packed["cu_seqlens_q"]
    with pytest.raises(TypeError):
        zero_init_attention_varlen(packed["q"], packed["k"], packed["v"], lengths, lengths, 4, 4)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=pytest.mark.native), "composed", "reference"])
@pytest.mark.parametrize(
    ("causal", "new", "positions"), [(False, 2, 16), (False, None, 15), (True, 2, 22), (True, None, 22)]
)
def test_rotary_tables_that_suffice_are_accepted(causal, new, positions, backend):
    """Without a causal mask or a window all queries are rotated at cache_seqlens, new keys at cache_seqlens + t."""
    tables = x(positions, 4), x(positions, 4)
    given = {
        "q": x(1, 8, 4, 8), "k_cache": torch.zeros(1, 32, 2, 8), "v_cache": torch.zeros(1, 32, 2, 8),
        "k": None if new is None else x(1, new, 2, 8), "v": None if new is None else x(1, new, 2, 8),
        "prompt_k": None, "prompt_v": None, "gate": None, "cache_seqlens": 14, "causal": causal,
        "rotary_interleaved": True, "backend": backend,
    }  # fmt: skip
    with pytest.raises((ValueError, RuntimeError), match=f"needs {positions}"):
        cut = [table[:-1].clone() for table in tables]
        zero_init_attention_with_kvcache(**given, rotary_cos=cut[0], rotary_sin=cut[1])
    copies = {name: given[name].clone() for name in ("k_cache", "v_cache")}
    out = zero_init_attention_with_kvcache(**given, rotary_cos=tables[0], rotary_sin=tables[1])
    longer = [torch.cat((table, x(50, 4))) for table in tables]
    expected = zero_init_attention_with_kvcache(**given | copies, rotary_cos=longer[0], rotary_sin=longer[1])
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    build, changed, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        FUNCTIONS[build](**build(**changed))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("out", x(5, 4, 8), ValueError, r"out must have shape \(6, 4, 8\), got \(5, 4, 8\)"),
        ("out", x(6, 4, 8).half(), TypeError, "out must have the query's dtype"),
        ("out", None, TypeError, "out must be a tensor"),
        ("q", x(6, 8), ValueError, "q must have 4 dimensions"),
        (
            "prompt_k",
            None,
            TypeError,
            r"prompt_k must be a tensor \[N, P, Hkv, D\] or \[P, Hkv, D\], got NoneType",
        ),
        ("prompt_k", x(8), TypeError, r"prompt_k must be a tensor .*, got \(8,\)"),
        ("prompt_v", [1.0], TypeError, "prompt_v must be a floating-point tensor"),
    ],
)
def test_prompt_attention_refuses(name, value, error, message):
    given = {name: varlen()[name] for name in ("q", "prompt_k", "prompt_v", "gate")} | {"out": x(6, 4, 8)}
    with pytest.raises(error, match=message):
        prompt_attention_(**(given | {name: value}))


def test_explain_explains_the_named_backend_that_cannot():
    given = sdpa(attn_mask=x(2, 4, 6, 6))
    found = explain(**given, backend="cpu")
    assert found.selected == "" and "attn_mask depends on the query" in found["cpu"]
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        explain(**given, backend="cublas")


@pytest.mark.native
def test_each_backend_says_where_it_runs():
    given = {name: tensor.to("meta") for name, tensor in sdpa().items()}
    found = explain(**given)
    for backend in ("cpu", "triton"):
        assert found[backend] == "the tensors are on meta" or "not installed" in found[backend]
        with pytest.raises(ValueError, match=f"backend '{backend}' cannot run this call"):
            zero_init_attention(**given, backend=backend)
    assert found["cuda"] != "usable" and found.selected == "composed" and found["reference"] == "usable"
    here = explain(**sdpa())["triton"]
    assert "Triton's interpreter needs TRITON_INTERPRET=1" in here or "not installed" in here


@pytest.mark.native
def test_explain_names_the_choice_and_every_reason():
    found = explain(**sdpa())
    assert found.selected == "cpu" and set(found) == {
        "cpu",
        "triton",
        "cuda",
        "hybrid",
        "composed",
        "reference",
    }
    assert found["cpu"] == "usable" and "-> cpu: usable" in str(found)
    dense = explain(**sdpa(attn_mask=x(2, 4, 6, 6)))
    assert dense.selected == "composed" and "attn_mask depends on the query" in dense["cpu"]
    double = explain(**{n: t.double() for n, t in sdpa().items()})
    assert double.selected == "reference" and "float64" in double["cpu"]
    assert explain(**varlen()).selected == explain(**cache()).selected == "cpu"
    assert explain(*varlen().values()).selected == "cpu"
    wide = {n: x(*t.shape[:-1], 300) if t.dim() > 1 else t for n, t in sdpa().items()}
    assert "head_dim must be 1 to 256" in explain(**wide)["cpu"]
    assert explain(**sdpa(), backend="reference").selected == "reference"
    assert "log-sum-exp" in explain(**sdpa(), return_lse=True)["composed"]


def numbers(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        (zero_init_attention, lambda: sdpa(prompt_index=numbers(0, 1)), "prompt_index must"),
        (zero_init_attention, lambda: sdpa(prompt_index=numbers(-2, 0)), "prompt_index must"),
        (zero_init_attention_varlen, lambda: varlen(cu_seqlens_q=numbers(1, 2, 6)), "cu_seqlens_q must"),
        (zero_init_attention_varlen, lambda: varlen(cu_seqlens_k=numbers(0, 2, 5)), "cu_seqlens_k must"),
        (zero_init_attention_with_kvcache, lambda: cache(cache_seqlens=numbers(99, 0)), "cache_seqlens"),
    ],
)
def test_explain_says_nothing_runs_where_nothing_does(function, given, message):
    """Numbers in tensors, which the kernels refuse, too."""
    with pytest.raises((ValueError, RuntimeError), match=message):
        function(**given())
    with pytest.raises(ValueError, match=message):
        explain(**given())


@pytest.mark.native
def test_the_choice_is_logged_once_per_shape_class():
    program = (
        "import torch, zinit_kernels as z\n"
        "for t in (3, 5, 9):\n"
        "    x = torch.randn(1, 2, t, 16); z.zero_init_attention(x, x, x)\n"
        "x = torch.randn(1, 2, 3, 32); z.zero_init_attention(x, x, x)\n"
    )
    environment = {**os.environ, "ZINIT_LOG": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    lines = [line for line in ran.stderr.splitlines() if "zinit_kernels:" in line]
    assert len(lines) == 2 and all("cpu for batch torch.float32" in line for line in lines)
