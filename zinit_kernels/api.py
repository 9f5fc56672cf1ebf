"""The public functions. Each takes the names, layout and mask rules of the function its users call today."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from torch import Tensor

from . import arguments, dispatch, fast_path
from .dispatch import Explanation

if TYPE_CHECKING:
    from typing_extensions import Unpack

# For type checkers: a call without return_lse=True returns one tensor, so `out.sum()` needs no cast. The options
# stand once in a TypedDict, not once in every overload; tests/test_typing.py holds them to the real signatures.


class _SdpaOptions(TypedDict, total=False):
    attn_mask: Tensor | None
    is_causal: bool
    window_size: tuple[int, int] | None
    scale: float | None
    gate_activation: str
    prompt_index: Tensor | None
    backend: str


class _FlashOptions(TypedDict, total=False):
    softmax_scale: float | None
    window_size: tuple[int, int] | None
    gate_activation: str
    prompt_index: Tensor | None
    backend: str


class _VarlenOptions(_FlashOptions, total=False):
    causal: bool


class _CacheRequired(TypedDict):
    prompt_k: Tensor | None
    prompt_v: Tensor | None
    gate: Tensor | float | None
    cache_seqlens: Tensor | int
    causal: bool


class _CacheOptions(_CacheRequired, _FlashOptions, total=False):
    block_table: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_interleaved: bool | None
    num_splits: int


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
    **options: Unpack[_SdpaOptions],
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
    **options: Unpack[_SdpaOptions],
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
    **options: Unpack[_SdpaOptions],
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
    gate_activation: str = "tanh",
    prompt_index: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Zero-initialised attention on [B, H, T, D] tensors, shaped like `F.scaled_dot_product_attention`.

        out[b,h,i] =               sum_j softmax_j(scale * q[b,h,i] . k[b,g,j] + mask[b,h,i,j]) v[b,g,j]
                   + act(gate[h])  sum_p softmax_p(scale * q[b,h,i] . pk[n,g,p]) pv[n,g,p]

    with g = h // (Hq // Hkv), n the prompt table row of sequence b, act = tanh or identity: LLaMA-Adapter
    (arXiv 2303.16199), equations 5 to 8. Two softmaxes that share nothing; prompts are seen by every query,
    whatever the masks say. `query` and `key` carry the rotary embedding, `prompt_key` does not. At gate 0 the
    result is bit for bit what this function gives without prompts; SDPA's differs from it by rounding.

    Args:
        query: [B, Hq, T, D]; float32, bfloat16, float16 (float64: unfused). Any strides with a contiguous
            last dimension.
        key, value: [B, Hkv, S, D], the query's dtype. Hq must be a multiple of Hkv (grouped queries, no flag
            needed).
        prompt_key, prompt_value: [N, Hkv, P, D] or [Hkv, P, D], P from 0 to 128, any of those dtypes. N = 1 is
            shared by the batch, N = B is one per sample, any N goes with `prompt_index`. None together with
            `gate`: plain attention.
        gate: raw, before its activation: a number, 1 or Hq values ([Hq], [1, Hq, 1, 1], [1, 1, Hq, 1]), or
            [N, Hq] with a table of adapters. float32 preferred. Applied before the output projection.
        attn_mask: bool (True = attend) or additive. A key-padding mask [B, S] (or [B, 1, 1, S]) is fused;
            what depends on the query runs the composed path. A [B, S] that could also mean [T, S] is refused:
            spell it with four dimensions. A `torch.nn.attention.bias.CausalBias` is what it is to SDPA, and fused
            where it is aligned at the end (`causal_lower_right`).
        is_causal: query i sees keys j <= i; needs T == S. May be combined with attn_mask.
        window_size: (left, right), -1 = no limit: query i sees keys i - left <= j <= i + right. Needs T == S.
        scale: of the scores of both branches; default D ** -0.5.
        gate_activation: "tanh" (the paper's training code) or "identity" (PEFT, litgpt).
        prompt_index: int32 [B], the row of the prompt table each sequence takes; -1 = no prompts.
        return_lse: also return the token branch's log-sum-exp: float32 [B, Hq, T], natural logarithm, -inf
            without a key; differentiable.
        backend: "auto" (see `explain`), or a name, which raises instead of falling back.

    Returns:
        out [B, Hq, T, D] in the query's dtype, stored token-major; or (out, lse). A query whose every key is
        masked gets its prompt branch alone, never NaN. Every gradient comes back in its own tensor's dtype,
        deterministic; what does not require grad costs nothing.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: from the native kernels, which read the values in prompt_index themselves, for a row that is
            not in the table (ValueError from the other backends on a CPU; no device is stalled to look).
    """
    given = (
        query, key, value, prompt_key, prompt_value, gate, attn_mask, is_causal, window_size, scale, gate_activation,
        prompt_index,
    )  # fmt: skip
    if backend in ("auto", "cpu") and (done := fast_path.attention(*given)):
        return done if return_lse else done[0]
    out, lse = dispatch.run(backend, arguments.from_sdpa(*given), return_lse)
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
    **options: Unpack[_VarlenOptions],
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
    **options: Unpack[_VarlenOptions],
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
    **options: Unpack[_VarlenOptions],
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
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = (-1, -1),
    gate_activation: str = "tanh",
    prompt_index: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Zero-initialised attention on packed sequences, shaped like `flash_attn_varlen_func`.

    The formula of `zero_init_attention` for each sequence; every sequence sees the prompts.

    Args:
        q: [total_q, Hq, D]; sequence b owns rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1]. Dtypes as
            `zero_init_attention`.
        k, v: [total_k, Hkv, D], rows by cu_seqlens_k.
        prompt_k, prompt_v: [N, P, Hkv, D] or [P, Hkv, D]; gate, prompt_index: as `zero_init_attention`, by
            sequence.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], from 0 to the totals, never decreasing.
        max_seqlen_q, max_seqlen_k: Python ints, at least the longest sequence. A GPU is not waited for to check
            them: where one is too small, rows of out may stay uninitialised.
        softmax_scale: default D ** -0.5.
        causal, window_size: aligned to the bottom right, as flash-attn does: query i of T sees keys j of S
            with i + S - T - left <= j <= i + S - T + right; causal sets right to 0. -1 = no limit.
        gate_activation, return_lse, backend: as `zero_init_attention`.

    Returns:
        out [total_q, Hq, D]; with return_lse also lse, float32 [Hq, total_q].

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: from the native kernels, which read the values in cu_seqlens and prompt_index themselves
            (ValueError from the other backends on a CPU; no device is stalled to look).
    """
    call = arguments.from_varlen(
        q, k, v, prompt_k, prompt_v, gate, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, causal, window_size, gate_activation, prompt_index,
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
    **options: Unpack[_CacheOptions],
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
    **options: Unpack[_CacheOptions],
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
    **options: Unpack[_CacheOptions],
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
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool | None = None,
    softmax_scale: float | None = None,
    causal: bool | None = None,
    window_size: tuple[int, int] | None = (-1, -1),
    num_splits: int = 0,
    gate_activation: str = "tanh",
    prompt_index: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Zero-initialised attention of new queries against a KV cache, shaped like `flash_attn_with_kvcache`.

    Writes k and v (rotated) into the caches behind each sequence's cache_seqlens keys, rotates q, attends to
    everything now in the cache, adds the gated prompt branch. In place on the caches; no backward. The caller
    advances cache_seqlens.

    Args:
        q: [B, T, Hq, D], T new queries per sequence (1 to decode, more for chunked prefill or speculative
            checks).
        k_cache, v_cache: [B, S, Hkv, D], or with block_table pages [num_pages, page_size, Hkv, D]. Read
            through their strides: a cache that is head-major in memory ([B, Hkv, S, D], passed transposed) is
            the faster one on a CPU.
        k, v: [B, T_new, Hkv, D] to append, or None. Dtype of q, as the caches.
        prompt_k, prompt_v: [N, P, Hkv, D] or [P, Hkv, D]; gate, prompt_index: as `zero_init_attention`. None
            for no prompts.
        cache_seqlens: int32 [B] (or one int): keys in the cache before this call. Slots behind may hold
            anything, NaN too.
        block_table: int32 [B, max_pages]: page i of a sequence; entries behind its last page are not read.
        rotary_cos, rotary_sin: [positions, rotary_dim / 2]; rotates k, and q, at positions cache_seqlens + t
            (q without causal and window: all at cache_seqlens, as flash-attn does). No more positions than these
            are needed.
        rotary_interleaved: pairs (2i, 2i + 1) (True) or (i, i + rotary_dim / 2) (False). Must be given with the
            tables: flash-attn's default is True, this function's was False.
        causal, window_size: bottom-right aligned, as `zero_init_attention_varlen`. causal must be given:
            flash-attn's default is False, this function's was True.
        num_splits: pieces the keys of a sequence are split into; 0 chooses. Changes nothing beyond rounding.
        softmax_scale, gate_activation, backend: as `zero_init_attention_varlen`.

    Returns:
        out [B, T, Hq, D]; with return_lse also lse, float32 [B, Hq, T].

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: from the native kernels, for a length, page or prompt row out of range (ValueError from the
            other backends on a CPU; no device is stalled to look). Nothing is written then.
    """
    given = (
        q, k_cache, v_cache, k, v, prompt_k, prompt_v, gate, cache_seqlens, block_table, rotary_cos, rotary_sin,
        rotary_interleaved, softmax_scale, causal, window_size, num_splits, gate_activation, prompt_index,
    )  # fmt: skip
    if backend in ("auto", "cpu") and (done := fast_path.attention_with_cache(*given)):
        return done if return_lse else done[0]
    out, lse = dispatch.run(backend, arguments.from_cache(*given), return_lse)
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
    gate_activation: str = "tanh",
    prompt_index: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Adds the gated prompt branch in place onto the output of somebody else's attention.

        out[b,t,h] += act(gate[h]) sum_p softmax_p(scale * q[b,t,h] . pk[n,p,g]) pv[n,p,g]

    The second half of LLaMA-Adapter's equation 8, for where the token half cannot be replaced. Differentiable; but
    attention kernels, torch's and these, keep their output for their own backward, where autograd then refuses one that
    was changed in place: pass them `out.clone()` where gradients reach their inputs.

    Args:
        out, q: [B, T, Hq, D], or packed [total, Hq, D] with `cu_seqlens` (int32 [B + 1]; without it one
            sequence). q is rotated.
        max_seqlen: of packed sequences the length of the longest, or more; None: of all together, for which a GPU
            starts blocks that find nothing to do.
        prompt_k, prompt_v: [N, P, Hkv, D] or [P, Hkv, D], not rotated.
        gate, prompt_index, gate_activation, softmax_scale, backend: as `zero_init_attention`.

    Returns:
        out, the same tensor.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    call = arguments.from_prompt_branch(
        out, q, prompt_k, prompt_v, gate, cu_seqlens, max_seqlen, softmax_scale, gate_activation, prompt_index
    )
    dispatch.add_prompt_branch(backend, call)
    return out


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """For each backend "usable" or the reason why not, and which one `backend="auto"` takes; computes
    nothing.

    Takes the arguments of any of the three attention functions: those with `cache_seqlens` are read as
    `zero_init_attention_with_kvcache`'s, those with `cu_seqlens_q` (or more than six positional ones) as
    `zero_init_attention_varlen`'s, all others as `zero_init_attention`'s.

    Returns:
        A dict from backend to "usable" or a reason, with the choice in `.selected` ("" where `backend` names one that
        cannot run the call); prints as a table.

    Raises:
        TypeError, ValueError: as the function itself, but for a backend that cannot run the call.
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
    return_lse, backend = bound.arguments.pop("return_lse"), bound.arguments.pop("backend")
    return dispatch.explain(canonical(**bound.arguments), return_lse, backend)
