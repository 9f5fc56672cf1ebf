"""The small calls of a trial, made on the CPU: the same numbers on every machine.

Gates lie away from 0, and what no query may see is NaN: padded keys, unused cache slots, rows of the prompt table that
no sequence names. Lengths are no multiples of a tile, and longer than one, so whole, masked and cut tiles all run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.few_rows import Product
from ..call import AnyCall, CacheCall, Call, PromptCall

_NAN = float("nan")


def calls(family: str, dtype: torch.dtype, head_dim: int, seed: int) -> list[AnyCall]:
    """What a family is tried on. Differentiable tensors require grad where the family is a backward."""
    random = torch.Generator(device="cpu").manual_seed(seed)
    given = random, dtype, head_dim
    if family in ("triton.forward", "triton.backward"):
        return _attention_calls(*given)
    if family in ("hybrid.forward", "hybrid.backward"):
        return _unmasked_calls(*given)
    if family in ("triton.decode", "cuda.decode"):
        return _decode_calls(*given, chunk=5)
    if family == "cuda.prefill":
        return [*_attention_calls(*given), *_decode_calls(*given, chunk=21)[-1:]]
    assert family == "cuda.prompt", family
    return _prompt_calls(*given)


def products(dtype: torch.dtype, seed: int, processors: int) -> list[Product]:
    """What the linear layers of a decoding step are tried on: norm and three weights, norm and SwiGLU, and a residual.

    Of results that are wide enough for the tile that a chip with so many multiprocessors gets then, and of narrow ones;
    in both sizes of a tile of rows; of whole tiles, and of sizes that are no multiple of one.
    """
    random = torch.Generator(device="cpu").manual_seed(seed)
    wide = 24 * processors + 3
    found = []
    for num_rows, columns, sizes in (
        (1, 1280, (32, 16, 16)),
        (3, 203, (wide, 37, 33)),
        (17, 150, (wide, 34, 16)),
        (20, 256, (20, 34, 16)),
    ):
        x = _normal(random, dtype, num_rows, columns) * 2
        norm = 1 + 0.2 * _normal(random, dtype, columns)
        weights = tuple(_normal(random, dtype, size, columns) * columns**-0.5 for size in (*sizes, sizes[0]))
        residual = _normal(random, dtype, num_rows, sizes[0])
        found += [
            Product(x, weights[:3], norm, 0.3),
            Product(x, (weights[0], weights[3]), norm, 0.3, gated=True),
            Product(x, weights[:1], residual=residual),
        ]
    return found


def _normal(random: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    numbers = torch.randn(*shape, generator=random, dtype=torch.float32, device="cpu")
    return numbers.to(dtype)


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cpu")


def _tensors(
    random: torch.Generator, dtype: torch.dtype, head_dim: int, batch: int, seqlen: int, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """query, key, value, prompt_key, prompt_value, gate"""
    heads_q, heads_kv, prompts = 4, 2, 10
    whole, short = (batch, heads_kv, seqlen, head_dim), (rows, heads_kv, prompts, head_dim)
    return (
        _normal(random, dtype, batch, heads_q, seqlen, head_dim),
        _normal(random, dtype, *whole),
        _normal(random, dtype, *whole),
        _normal(random, dtype, *short),
        _normal(random, dtype, *short),
        _normal(random, torch.float32, rows, heads_q) + 0.3,
    )


def _causal_call(random: torch.Generator, dtype: torch.dtype, head_dim: int) -> Call:
    """With shared prompts, as most adapters are trained."""
    return Call(*_tensors(random, dtype, head_dim, 2, 150, 1))._replace(
        max_seqlen_q=150, max_seqlen_k=150, scale=head_dim**-0.5, window_right=0
    )


def _unmasked_calls(random: torch.Generator, dtype: torch.dtype, head_dim: int) -> list[AnyCall]:
    """Causal with shared prompts, stored as a model's projections are and as SDPA's users have it; and without a mask,
    of more keys than queries, with prompts for some sequences."""
    causal = _causal_call(random, dtype, head_dim)
    projected = causal._replace(
        **{
            name: getattr(causal, name).transpose(1, 2).contiguous().transpose(1, 2)
            for name in ("query", "key", "value")
        }
    )
    query, key, value, prompt_key, prompt_value, gate = _tensors(random, dtype, head_dim, 3, 130, 3)
    for tensor in (prompt_key, prompt_value, gate):
        tensor[0] = _NAN
    cross = Call(
        query[:, :, :70].contiguous(),
        key,
        value,
        prompt_key,
        prompt_value,
        gate,
        prompt_index=_ints(2, -1, 1),
        max_seqlen_q=70,
        max_seqlen_k=130,
        scale=head_dim**-0.5,
        tanh_gate=False,
    )
    return [projected, causal, cross]


def _attention_calls(random: torch.Generator, dtype: torch.dtype, head_dim: int) -> list[AnyCall]:
    """Causal with shared prompts, as most adapters are trained; and padded, with prompts for some sequences."""
    causal = _causal_call(random, dtype, head_dim)
    query, key, value, prompt_key, prompt_value, gate = _tensors(random, dtype, head_dim, 3, 90, 3)
    bias = torch.zeros(3, 90, dtype=torch.float32, device="cpu")
    bias[0, 70:], bias[1, :5] = float("-inf"), float("-inf")
    for tensor in (key, value):
        tensor.masked_fill_((bias != 0)[:, None, :, None], _NAN)
    for tensor in (prompt_key, prompt_value, gate):
        tensor[0] = _NAN
    padded = Call(
        query,
        key,
        value,
        prompt_key,
        prompt_value,
        gate,
        prompt_index=_ints(2, -1, 1),
        key_bias=bias,
        max_seqlen_q=90,
        max_seqlen_k=90,
        scale=head_dim**-0.5,
        tanh_gate=False,
    )
    return [causal, padded]


def _decode_calls(random: torch.Generator, dtype: torch.dtype, head_dim: int, chunk: int) -> list[AnyCall]:
    """One token against a long cache, whose keys are split; one against pages, rotated; and a chunk of tokens."""
    return [
        _cache_call(random, dtype, head_dim, heads_q=8, tokens=1, seqlens=(0, 37, 598), capacity=600),
        _cache_call(random, dtype, head_dim, heads_q=2, tokens=1, seqlens=(5, 100), capacity=112, page=16),
        _cache_call(random, dtype, head_dim, heads_q=4, tokens=chunk, seqlens=(0, 60), capacity=96),
    ]


def _cache_call(
    random: torch.Generator,
    dtype: torch.dtype,
    head_dim: int,
    heads_q: int,
    tokens: int,
    seqlens: tuple[int, ...],
    capacity: int,
    page: int = 0,
) -> CacheCall:
    batch, heads_kv, prompts = len(seqlens), 2, 10
    keys, values = (
        torch.full((batch, capacity, heads_kv, head_dim), _NAN, dtype=dtype, device="cpu") for _ in range(2)
    )
    for sequence, length in enumerate(seqlens):
        for cache in (keys, values):
            cache[sequence, :length] = _normal(random, dtype, length, heads_kv, head_dim)
    table = cos = sin = None
    if page:
        each = capacity // page
        table = torch.arange(batch * each - 1, -1, -1, dtype=torch.int32, device="cpu").view(batch, each)
        # page i of a sequence is where its row of the table says: the pool is in the opposite order
        keys, values = (
            cache.view(batch * each, page, heads_kv, head_dim).flip(0).contiguous()
            for cache in (keys, values)
        )
        half = head_dim // 32 * 8
        if half:
            angles = torch.rand(capacity, half, generator=random, dtype=torch.float32, device="cpu") * 6
            cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    rows = batch if page else 1
    return CacheCall(
        query=_normal(random, dtype, batch, tokens, heads_q, head_dim),
        key_cache=keys,
        value_cache=values,
        new_key=_normal(random, dtype, batch, tokens, heads_kv, head_dim),
        new_value=_normal(random, dtype, batch, tokens, heads_kv, head_dim),
        prompt_key=_normal(random, dtype, rows, prompts, heads_kv, head_dim),
        prompt_value=_normal(random, dtype, rows, prompts, heads_kv, head_dim),
        gate=_normal(random, torch.float32, rows, heads_q) + 0.3,
        sinks=None,
        prompt_index=_ints(*range(batch - 1, -1, -1)) if page else None,
        cache_seqlens=_ints(*seqlens),
        cache_leftpad=None,
        block_table=table,
        rotary_cos=cos,
        rotary_sin=sin,
        rotary_interleaved=False,
        scale=head_dim**-0.5,
        softcap=0.0,
        window_left=-1,
        window_right=0,
        tanh_gate=True,
        num_splits=0,
    )


def _prompt_calls(random: torch.Generator, dtype: torch.dtype, head_dim: int) -> list[AnyCall]:
    """The prompt branch alone, added onto an output; with packed sequences too."""
    heads_q, heads_kv, prompts, tokens = 4, 2, 10, 150
    found: list[AnyCall] = []
    for packed in (False, True):
        batch, rows = (1, 2) if packed else (2, 1)
        shape, table = (batch, heads_q, tokens, head_dim), (rows, heads_kv, prompts, head_dim)
        found.append(
            PromptCall(
                out=_normal(random, dtype, *shape),
                query=_normal(random, dtype, *shape),
                prompt_key=_normal(random, dtype, *table),
                prompt_value=_normal(random, dtype, *table),
                gate=_normal(random, torch.float32, rows, heads_q) + 0.3,
                prompt_index=None,
                cu_seqlens=_ints(0, 67, tokens) if packed else None,
                max_seqlen=83 if packed else tokens,
                scale=head_dim**-0.5,
                softcap=0.0,
                tanh_gate=True,
            )
        )
    return found
