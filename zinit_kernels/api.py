"""The public functions. Each takes the names, layout and mask rules of the function its users call today."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from . import arguments, dispatch, fast_path, kept_calls
from .dispatch import Explanation
from .ported import check_keywords
from .typed_options import CacheOptions, SdpaOptions, VarlenOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def zero_init_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor | None = None,
    prompt_value: Tensor | None = None,
    gate: Tensor | float | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[SdpaOptions],
) -> Tensor: ...
@overload
def zero_init_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor | None = None,
    prompt_value: Tensor | None = None,
    gate: Tensor | float | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[SdpaOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def zero_init_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor | None = None,
    prompt_value: Tensor | None = None,
    gate: Tensor | float | None = None,
    *,
    return_lse: bool,
    **options: Unpack[SdpaOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def zero_init_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor | None = None,
    prompt_value: Tensor | None = None,
    gate: Tensor | float | None = None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    window_size: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float | None = 0.0,
    gate_activation: str = "tanh",
    prompt_index: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **ported: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Zero-initialised attention on [B, H, T, D] tensors, shaped like `F.scaled_dot_product_attention`.

        out[b,h,i] =               sum_j softmax_j(scale * q[b,h,i] . k[b,g,j] + mask[b,h,i,j]) v[b,g,j]
                   + act(gate[h])  sum_p softmax_p(scale * q[b,h,i] . pk[n,g,p]) pv[n,g,p]

    Here g = h // (Hq // Hkv), n is the prompt table row of sequence b, and act is tanh or the identity:
    LLaMA-Adapter (arXiv 2303.16199), equations 5 to 8. The two softmaxes share nothing. Every query sees the
    prompts, whatever the masks say. `query` and `key` carry the rotary embedding, `prompt_key` does not. At
    gate 0 the result is bit for bit what this function gives without prompts; SDPA's differs from it by rounding.

    Args:
        query: [B, Hq, T, D] in float32, bfloat16 or float16 (float64 is not fused), with any strides whose last
            is 1.
        key, value: [B, Hkv, S, D] in the query's dtype. Hq is a multiple of Hkv; grouped queries need no flag.
        prompt_key, prompt_value: [N, Hkv, P, D] or [Hkv, P, D], P from 0 to 128, in any of those dtypes. With
            N = 1 the batch shares the prompts, with N = B each sample has its own, and with `prompt_index` N is
            free. Without them and `gate` this is plain attention.
        gate: raw, before its activation. A number, 1 or Hq values ([Hq], [1, Hq, 1, 1] or [1, 1, Hq, 1]), or
            [N, Hq] for a table of adapters; float32 is best. It is applied before the output projection.
        attn_mask: bool (True = attend) or additive. A key-padding mask [B, S] (or [B, 1, 1, S]) is fused. A mask
            that depends on the query takes the composed path. A [B, S] that could also mean [T, S] is refused:
            pass four dimensions. A `torch.nn.attention.bias.CausalBias` means what it means to SDPA;
            `causal_lower_right` is fused.
        is_causal: query i sees the keys j <= i. Needs T == S. May be combined with attn_mask.
        window_size: (left, right): query i sees the keys i - left <= j <= i + right, -1 means no limit. Needs
            T == S.
        scale: of the scores of both branches; default D ** -0.5.
        softcap: above 0, every scaled score s of both branches becomes softcap * tanh(s / softcap) before masks
            and softmax, as in flash-attn and Gemma 2. 0.0 or None leaves the scores as they are.
        gate_activation: "tanh" (the paper's training code) or "identity" (PEFT, litgpt).
        prompt_index: int32 [B], the row of the prompt table for each sequence; -1 means no prompts.
        sinks: [Hq], one learned score per query head (attention sinks, as in gpt-oss). It enters the denominator of
            the first sum: softmax_j is e^s_j / (sum_j e^s_j + e^sinks[h]). Float32 is best. It is differentiable.
        return_lse: also return the token branch's log-sum-exp, float32 [B, Hq, T], in natural logarithms, its sink
            included; -inf for a query without keys and sink. It is differentiable.
        backend: "auto" (see `explain`), or a name. A named backend raises where it cannot run the call.
        ported: other keywords of `F.scaled_dot_product_attention` and of flash-attn's functions, for calls ported
            from them. Those that change nothing are accepted (dropout_p=0.0, enable_gqa, deterministic); for any
            other value the TypeError says what to do here.

    Returns:
        out [B, Hq, T, D] in the query's dtype, stored token-major, or (out, lse). A query whose keys are all
        masked gets its prompt branch alone, never NaN. Each gradient has its tensor's dtype; an input that does not
        require grad costs nothing. The fused backends give the same gradients at every run. PyTorch's attention,
        which "composed" and "hybrid" call, gives them under `torch.use_deterministic_algorithms(True)`.

    Raises:
        TypeError, ValueError: an argument breaks a rule. The message names it, what is expected and what was given.
        RuntimeError: prompt_index names a row that is not in the table, on the native CPU kernels. (The other
            backends raise ValueError on a CPU. On a device nothing is checked that would stall it.)
    """
    if ported:
        check_keywords("zero_init_attention", ported)
    given = (
        query, key, value, prompt_key, prompt_value, gate, attn_mask, is_causal, window_size, scale, softcap,
        gate_activation, prompt_index, sinks,
    )  # fmt: skip
    done: tuple[Tensor, ...] | None = None
    call_key = None
    if kept_calls.is_on_gpu(query):
        done, call_key = kept_calls.attention(backend, given)
    elif backend in ("auto", "cpu"):
        done = fast_path.attention(*given)
    if done is not None:
        return done if return_lse else done[0]  # type: ignore[return-value]
    call = arguments.from_sdpa(*given)
    out, lse = dispatch.run(backend, call, return_lse)
    if call_key is not None:
        kept_calls.learn_attention(call_key, backend, call, given)
    return out if lse is None else (out, lse)


@overload
def zero_init_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    gate: Tensor | float | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[VarlenOptions],
) -> Tensor: ...
@overload
def zero_init_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    gate: Tensor | float | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: Literal[True],
    **options: Unpack[VarlenOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def zero_init_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    gate: Tensor | float | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: bool,
    **options: Unpack[VarlenOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def zero_init_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    gate: Tensor | float | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = (-1, -1),
    softcap: float | None = 0.0,
    gate_activation: str = "tanh",
    prompt_index: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **ported: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Zero-initialised attention on packed sequences, shaped like `flash_attn_varlen_func`.

    The formula is that of `zero_init_attention`, for each sequence. Every sequence sees the prompts.

    Args:
        q: [total_q, Hq, D], in the dtypes of `zero_init_attention`. Sequence b owns the rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1].
        k, v: [total_k, Hkv, D], divided by cu_seqlens_k.
        prompt_k, prompt_v: [N, P, Hkv, D] or [P, Hkv, D].
        gate, prompt_index: as for `zero_init_attention`, by sequence.
        sinks: as for `zero_init_attention`.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], from 0 to the totals, never decreasing.
        max_seqlen_q, max_seqlen_k: Python ints, at least the longest sequence. A GPU is not stalled to check
            them; if one is too small there, rows of out may stay uninitialised.
        softmax_scale: default D ** -0.5.
        causal, window_size: aligned to the bottom right, as in flash-attn. Query i of T sees the keys j of S with
            i + S - T - left <= j <= i + S - T + right. causal sets right to 0; -1 means no limit.
        block_table: int32 [B, max_pages]. With it k and v are pages [num_pages, page_size, Hkv, D], and sequence b
            has the first cu_seqlens_k[b + 1] - cu_seqlens_k[b] keys of its pages. They are gathered into packed
            tensors, one copy of each, and a GPU waits for their number. For decoding
            `zero_init_attention_with_kvcache` reads pages in place.
        softcap, gate_activation, return_lse, backend, ported: as for `zero_init_attention`.

    Returns:
        out [total_q, Hq, D]; with return_lse also lse, float32 [Hq, total_q].

    Raises:
        TypeError, ValueError: an argument breaks a rule. The message names it, what is expected and what was given.
        RuntimeError: wrong values in cu_seqlens or prompt_index, on the native CPU kernels. (The other backends
            raise ValueError on a CPU. On a device nothing is checked that would stall it.)
    """
    if ported:
        check_keywords("zero_init_attention_varlen", ported)
    call = arguments.from_varlen(
        q, k, v, prompt_k, prompt_v, gate, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table,
        softmax_scale, causal, window_size, softcap, gate_activation, prompt_index, sinks,
    )  # fmt: skip
    try:
        out, lse = dispatch.run(backend, call, return_lse)
    except (RuntimeError, ValueError) as error:
        arguments.blame_layout(error, call)
        raise
    out = out.squeeze(0).transpose(0, 1)
    return out if lse is None else (out, lse.squeeze(0))


@overload
def zero_init_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[CacheOptions],
) -> Tensor: ...
@overload
def zero_init_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[CacheOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def zero_init_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    return_lse: bool,
    **options: Unpack[CacheOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def zero_init_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    gate: Tensor | float | None,
    cache_seqlens: Tensor | int,
    cache_leftpad: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool | None = None,
    softmax_scale: float | None = None,
    causal: bool | None = None,
    window_size: tuple[int, int] | None = (-1, -1),
    softcap: float | None = 0.0,
    num_splits: int = 0,
    gate_activation: str = "tanh",
    prompt_index: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **ported: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Zero-initialised attention of new queries against a KV cache, shaped like `flash_attn_with_kvcache`.

    Writes k and v (rotated) into the caches behind each sequence's cache_seqlens keys, rotates q, attends to all
    that the cache then holds, and adds the gated prompt branch. The caches are changed in place. There is no
    backward. The caller advances cache_seqlens.

    Args:
        q: [B, T, Hq, D], the T new queries of each sequence: 1 to decode, more for chunked prefill or for
            speculative decoding.
        k_cache, v_cache: [B, S, Hkv, D], with cache_batch_idx [B_cache, S, Hkv, D], or with block_table pages
            [num_pages, page_size, Hkv, D]. They are read through their strides. On a CPU a cache that is head-major
            in memory ([B, Hkv, S, D], passed transposed) is faster.
        k, v: [B, T_new, Hkv, D] to append, or None. All of them have the dtype of q.
        prompt_k, prompt_v: [N, P, Hkv, D] or [P, Hkv, D], or None for no prompts.
        sinks: as for `zero_init_attention`, without a gradient.
        gate, prompt_index: as for `zero_init_attention`. None for no prompts. A gate [1, Hq] costs 1 us less than
            [Hq].
        cache_seqlens: int32 [B], or one int: the keys in the cache before this call. The slots behind them may
            hold anything, NaN too.
        cache_leftpad: int32 [B], how many slots at the start of each sequence hold padding, which nothing reads;
            default none. cache_seqlens counts them, and so do rotary positions, as in flash-attn.
        cache_batch_idx: int32 [B], the row of the caches for each sequence; default row b. If two sequences that
            append share a row, the row holds the new keys of one of them, as in flash-attn.
        block_table: int32 [B, max_pages], the pages of each sequence; not together with cache_batch_idx. Entries
            behind its last page are not read.
        rotary_cos, rotary_sin: [positions, rotary_dim / 2]. They rotate k, and q, at positions cache_seqlens + t;
            q without causal and window at cache_seqlens, as in flash-attn. More positions are not needed.
        rotary_interleaved: True pairs the dimensions (2i, 2i + 1), False (i, i + rotary_dim / 2). It must be
            given with the tables: flash-attn's default is True, this function's was False.
        causal, window_size: aligned to the bottom right, as for `zero_init_attention_varlen`. causal must be
            given: flash-attn's default is False, this function's was True.
        num_splits: how many pieces the keys of a sequence are split into; 0 chooses. It changes rounding only.
        softmax_scale, softcap, gate_activation, backend, ported: as for `zero_init_attention_varlen`.

    Returns:
        out [B, T, Hq, D]; with return_lse also lse, float32 [B, Hq, T].

    Raises:
        TypeError, ValueError: an argument breaks a rule. The message names it, what is expected and what was given.
        RuntimeError: a length, page or prompt row is out of range, on the native CPU kernels. (The other backends
            raise ValueError on a CPU. On a device nothing is checked that would stall it.) Nothing is written then.
    """
    if ported:
        check_keywords("zero_init_attention_with_kvcache", ported)
    given = (
        q, k_cache, v_cache, k, v, prompt_k, prompt_v, gate, cache_seqlens, cache_leftpad, cache_batch_idx, block_table,
        rotary_cos, rotary_sin, rotary_interleaved, softmax_scale, causal, window_size, softcap, num_splits,
        gate_activation, prompt_index, sinks,
    )  # fmt: skip
    done: tuple[Tensor, ...] | None = None
    call_key = None
    if kept_calls.is_on_gpu(q):
        done, call_key = kept_calls.attention_with_cache(backend, given)
    elif backend in ("auto", "cpu"):
        done = fast_path.attention_with_cache(*given)
    if done is not None:
        return done if return_lse else done[0]  # type: ignore[return-value]
    call = arguments.from_cache(*given)
    out, lse = dispatch.run(backend, call, return_lse)
    if call_key is not None:
        kept_calls.learn_attention_with_cache(call_key, backend, call, given)
    return out if lse is None else (out, lse)


def prompt_attention_(
    out: Tensor,
    q: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    gate: Tensor | float,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = 0.0,
    gate_activation: str = "tanh",
    prompt_index: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Adds the gated prompt branch in place to the output of another attention.

        out[b,t,h] += act(gate[h]) sum_p softmax_p(scale * q[b,t,h] . pk[n,p,g]) pv[n,p,g]

    This is the second half of LLaMA-Adapter's equation 8, for where the token half cannot be replaced. It is
    differentiable. Attention kernels, torch's and these, keep their output for their backward, and autograd
    refuses one that was changed in place: pass `out.clone()` where gradients reach the inputs of that attention.

    Args:
        out, q: [B, T, Hq, D], or packed [total, Hq, D] with `cu_seqlens` (int32 [B + 1]; one sequence without
            it). q is rotated.
        max_seqlen: the length of the longest packed sequence, or more. None means all tokens together, for which
            a GPU starts blocks that find nothing to do.
        prompt_k, prompt_v: [N, P, Hkv, D] or [P, Hkv, D], not rotated.
        gate, prompt_index, gate_activation, softmax_scale, softcap, backend: as for `zero_init_attention`.

    Returns:
        out, the same tensor.

    Raises:
        TypeError, ValueError: an argument breaks a rule. The message names it, what is expected and what was given.
    """
    call = arguments.from_prompt_branch(
        out,
        q,
        prompt_k,
        prompt_v,
        gate,
        cu_seqlens,
        max_seqlen,
        softmax_scale,
        softcap,
        gate_activation,
        prompt_index,
    )
    dispatch.add_prompt_branch(backend, call)
    return out


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """For each backend "usable" or the reason why not, and which one `backend="auto"` takes. Computes nothing.

    Takes the arguments of any of the three attention functions. Those with `cache_seqlens` are read as
    `zero_init_attention_with_kvcache`'s, those with `cu_seqlens_q` (or more than six positional ones) as
    `zero_init_attention_varlen`'s, and all others as `zero_init_attention`'s.

    Returns:
        A dict from backend to "usable" or a reason, which prints as a table. `.selected` is the choice, or "" where
        `backend` names one that cannot run the call.

    Raises:
        TypeError, ValueError: as the function itself, except for a backend that cannot run the call.
    """
    function: Callable[..., Any]
    canonical: Callable[..., Any]
    if "cache_seqlens" in kwargs:
        function, canonical = zero_init_attention_with_kvcache, arguments.from_cache
    elif "cu_seqlens_q" in kwargs or len(args) > 6:
        function, canonical = zero_init_attention_varlen, arguments.from_varlen
    else:
        function, canonical = zero_init_attention, arguments.from_sdpa
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    check_keywords(function.__name__, bound.arguments.pop("ported"))
    return_lse, backend = bound.arguments.pop("return_lse"), bound.arguments.pop("backend")
    return dispatch.explain(canonical(**bound.arguments), return_lse, backend)
