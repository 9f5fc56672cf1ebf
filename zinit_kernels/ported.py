"""Keywords of the functions that people port calls from, and that the functions here do not have.

`F.scaled_dot_product_attention`, and `flash_attn_func`, `flash_attn_varlen_func` and `flash_attn_with_kvcache` of
flash-attn 2 and 3. A value that changes nothing is accepted: None, the other function's neutral value, a hint about
speed. Any other value gets a sentence: what it means there, and what to do here. A name that none of these functions
has stays Python's TypeError.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, NamedTuple


class Anything:
    """All values: the keyword never changes a result."""

    def __contains__(self, value: object) -> bool:
        return True


class Keyword(NamedTuple):
    """One keyword of another library.

    accepted: the values besides None that change nothing here. advice: what it means there, and what to do here.
    """

    accepted: Container[Any]
    advice: str


_BOOLS = (True, False)
_OFF = (False,)
_ANYTHING = Anything()

# Of every function: scaled_dot_product_attention's or flash-attn's.
_EVERYWHERE = {
    "dropout_p": Keyword((0,), "it drops attention weights at random, which is not built: pass 0.0 and train without"),
    "enable_gqa": Keyword(_BOOLS, "grouped queries need no flag here: leave it out"),
    "deterministic": Keyword(_BOOLS, "gradients are always the same bits here: leave it out"),
    "qv": Keyword((), "it adds qv.v to the scores q.k (MLA), which is not built: append qv to q and v to k, with scale "
                  "(softmax_scale) as you had it, and pad v with zeros to the same head_dim"),
    "q_descale": Keyword((), "it scales an 8-bit q, which is not built: pass q as bfloat16, multiplied by it"),
    "k_descale": Keyword((), "it scales 8-bit keys, which is not built: pass them as bfloat16, multiplied by it"),
    "v_descale": Keyword((), "it scales 8-bit values, which is not built: pass them as bfloat16, multiplied by it"),
    "attention_chunk": Keyword((0,), "it lets a query see the keys of its own chunk alone, which is not fused: pass "
                               "that mask as zero_init_attention's attn_mask"),
    "num_splits": Keyword(_ANYTHING, ""),  # these four choose how to compute, not what
    "pack_gqa": Keyword(_ANYTHING, ""),
    "sm_margin": Keyword(_ANYTHING, ""),
    "scheduler_metadata": Keyword(_ANYTHING, ""),
    "return_attn_probs": Keyword(_OFF, "attention weights are never stored: for the log-sum-exp that comes with them "
                                 "pass return_lse=True"),
    "s_aux": Keyword((), "its name here is sinks"),
    "learnable_sink": Keyword((), "its name here is sinks"),
    "return_softmax_lse": Keyword(_OFF, "its name here is return_lse"),
    "seqused_q": Keyword((), "it uses the first rows of each sequence: pack those rows, and count them in cu_seqlens_q "
                         "of zero_init_attention_varlen"),
    "seqused_k": Keyword((), "it uses the first keys of each sequence: with a cache pass it as cache_seqlens of "
                         "zero_init_attention_with_kvcache, with pages count them in cu_seqlens_k of "
                         "zero_init_attention_varlen, else pack those keys"),
    "cu_seqlens_k_new": Keyword((), "new keys of several lengths are not built: append them with one call for each "
                                "length, or write them into the cache before the call"),
    "rotary_seqlens": Keyword((), "positions begin at cache_seqlens here: rotate q and k before the call and leave the "
                              "rotary tables out"),
}  # fmt: skip
_ALIBI = (
    "it adds -slope * distance to the scores, which is not fused: call zero_init_attention with the bias "
    "[B, Hq, T, S] as attn_mask"
)
_OF_PACKED = "it belongs to packed sequences: call zero_init_attention_varlen"
_OF_CACHES = "it belongs to a cache: call zero_init_attention_with_kvcache"
_SEQUENCES_OF_A_CACHE = dict.fromkeys(
    ("cache_seqlens", "cache_batch_idx", "cache_leftpad", "leftpad_k"), Keyword((), _OF_CACHES)
)
_ROTARY_INTERLEAVED = {"rotary_interleaved": Keyword(_BOOLS, "")}  # without tables it changes nothing


def _rotary_tables(query: str, key: str) -> dict[str, Keyword]:
    why = f"{_OF_CACHES}, or rotate {query} and {key} before the call"
    return dict.fromkeys(("rotary_cos", "rotary_sin"), Keyword((), why))


_WHOLE = _EVERYWHERE | _SEQUENCES_OF_A_CACHE | _rotary_tables("query", "key") | _ROTARY_INTERLEAVED | {
    "alibi_slopes": Keyword((), "it adds -slope * distance to the scores: pass that bias [B, Hq, T, S] as attn_mask"),
    "softmax_scale": Keyword((), "its name here is scale"),
    "causal": Keyword(_OFF, "its name here is is_causal; for flash-attn's alignment at the last key, where there are "
                      "fewer queries than keys, call zero_init_attention_varlen"),
    "cu_seqlens_q": Keyword((), _OF_PACKED),
    "cu_seqlens_k": Keyword((), _OF_PACKED),
    "max_seqlen_q": Keyword((), _OF_PACKED),
    "max_seqlen_k": Keyword((), _OF_PACKED),
    "block_table": Keyword((), _OF_CACHES + ", or zero_init_attention_varlen"),
    "page_table": Keyword((), _OF_CACHES + ", where its name is block_table"),
}  # fmt: skip
_FLASH = _EVERYWHERE | {
    "alibi_slopes": Keyword((), _ALIBI),
    "scale": Keyword((), "its name here is softmax_scale"),
    "is_causal": Keyword(_OFF, "its name here is causal, which aligns the mask at the last key"),
    "attn_mask": Keyword((), "masks for each key or query are zero_init_attention's: call that, or leave out masked "
                         "keys by the lengths"),
    "page_table": Keyword((), "its name here is block_table"),
}  # fmt: skip
_PACKED = _FLASH | _SEQUENCES_OF_A_CACHE | _rotary_tables("q", "k") | _ROTARY_INTERLEAVED
_QUERIES = (
    "queries of several lengths against a cache of pages are zero_init_attention_varlen's, with block_table"
)
_CACHED = _FLASH | {
    "cu_seqlens_q": Keyword((), _QUERIES),
    "cu_seqlens_k": Keyword((), _QUERIES),
    "max_seqlen_q": Keyword(_ANYTHING, ""),  # a bound, which q's shape says here
    "max_seqlen_k": Keyword(_ANYTHING, ""),
    "leftpad_k": Keyword((), "its name here is cache_leftpad"),
}
del _CACHED["num_splits"]  # an argument here

KEYWORDS: dict[str, Mapping[str, Keyword]] = {
    "zero_init_attention": _WHOLE,
    "zero_init_attention_varlen": _PACKED,
    "zero_init_attention_with_kvcache": _CACHED,
}


def check_keywords(function: str, given: Mapping[str, Any]) -> None:
    """Raises TypeError for a keyword of `given` that asks the public function for something it does not do."""
    for name, value in given.items():
        keyword = KEYWORDS[function].get(name)
        if keyword is None:
            raise TypeError(f"{function}() got an unexpected keyword argument '{name}'")
        if value is not None and not _changes_nothing(value, keyword.accepted):
            raise TypeError(f"{function} does not take {name}={_spell(value)}: {keyword.advice}")


def _changes_nothing(value: Any, accepted: Container[Any]) -> bool:
    # a tensor compared with a number is a tensor
    return accepted is _ANYTHING or (isinstance(value, (bool, int, float)) and value in accepted)


def _spell(value: Any) -> str:
    return repr(value) if isinstance(value, (bool, int, float, str)) else f"<{type(value).__name__}>"
