"""The registered operators: their schemas, nothing else.

One packet per stage and backend, `zinit::<stage>_<backend>`. Forward and backward speak one canonical form, made
by `arguments.py`:

    query [B, Hq, T, D], key / value [B, Hkv, S, D]     any strides, last dimension contiguous
    packed sequences are [1, H, total, D] with int32 cu_seqlens [B + 1]
    prompt_key / prompt_value [N, Hkv, P, D]            None: no prompt branch
    gate float32 [1 or N, Hq], raw                      prompt_index int32 [B], -1 = none
    key_bias float32 [B, S]                             added to the scaled scores, -inf = masked
    window_left / window_right                          bottom-right aligned, -1 = unlimited, causal = (.., 0)
    out                                                 [B, Hq, T, D], stored [B, T, Hq, D]
    lse float32 [B, Hq, T]                              natural log, token branch, -inf without a key

decode takes the token-major layout of the cache function, so that a step makes no views: query [B, T, Hq, D],
caches, new keys and prompts likewise, out [B, T, Hq, D] contiguous; lse as above. Its gate may be [Hq].

`backward` returns (dq, dk, dv, d prompt_key, d prompt_value, d gate); bit i of `needs` asks for the i-th, one
not asked for comes back with no elements. dq, dk and dv are stored token-major like `out`, the prompt
gradients contiguous.
"""

import torch

NAMESPACE = "zinit"

_PROMPT = "Tensor? prompt_key, Tensor? prompt_value, Tensor? gate, Tensor? prompt_index"
_MASK = (
    "Tensor? key_bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float scale, SymInt window_left, SymInt window_right, bool tanh_gate"
)

FORWARD = f"(Tensor query, Tensor key, Tensor value, {_PROMPT}, {_MASK}) -> (Tensor out, Tensor lse)"
BACKWARD = (
    f"(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"{_PROMPT}, {_MASK}, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# Caches, through their strides: [B, S, Hkv, D], or pages [num_pages, page_size, Hkv, D] with int32 block_table
# [B, max_pages].
DECODE = (
    f"(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor? new_key, Tensor? new_value, {_PROMPT}, "
    "Tensor cache_seqlens, Tensor? block_table, Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, "
    "float scale, SymInt window_left, SymInt window_right, bool tanh_gate, SymInt num_splits) "
    "-> (Tensor out, Tensor lse)"
)
# Adds the prompt branch onto out [B, Hq, T, D], in any strides as query; prompts as forward's.
PROMPT = (
    "(Tensor(a!) out, Tensor query, Tensor prompt_key, Tensor prompt_value, Tensor gate, Tensor? prompt_index, "
    "Tensor? cu_seqlens, SymInt max_seqlen, float scale, bool tanh_gate) -> ()"
)

library = torch.library.Library(NAMESPACE, "DEF")
for _backend in ("cpu", "triton"):
    library.define(f"forward_{_backend}{FORWARD}")
    library.define(f"backward_{_backend}{BACKWARD}")
    library.define(f"decode_{_backend}{DECODE}")
library.define(f"forward_cuda{FORWARD}")
library.define(f"decode_cuda{DECODE}")
library.define(f"prompt_cuda{PROMPT}")
