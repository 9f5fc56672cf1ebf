"""Key and value caches: their slots, in one row for each sequence or in pages, rotary embeddings, and the append.

Lengths and pages are read on the device. A number that would lead outside a tensor is cut, so that a bad one cannot
read or write past memory.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import RUN_TIME, block_of, row_ptr, unravel


class Rotary(NamedTuple):
    """cos and sin [num_rows, HALF] of the positions; the first 2 * HALF dimensions are rotated. No pointer: none."""

    cos_ptr: Any
    sin_ptr: Any
    num_rows: Any
    stride: Any


class Pages(NamedTuple):
    """block_table int32 [B, pages of a sequence], or None where a cache has one row of slots for each sequence."""

    table_ptr: Any
    table_stride: Any
    num_pages: Any
    leftpad: Any  # slots before a sequence's key 0; None: none


class CachedHead(NamedTuple):
    """The cached keys and values of one key head of a sequence."""

    key: Any  # View [B, Hkv, capacity, D], or pages [num_pages, Hkv, page size, D]
    value: Any
    pages: Any
    sequence: Any
    kv_head: Any


@triton.jit
def load_rotated(
    view,
    sequence,
    heads,
    tokens,
    valid,
    positions,
    rotary,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """[rows, block_of(D)] of a View, rotated by (cos, sin)[positions] and rounded to its dtype."""
    row_ptrs = row_ptr(view, sequence, heads, tokens)
    dims = tl.arange(0, block_of(HEAD_DIM))
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    tile = tl.load(row_ptrs[:, None] + dims[None, :], mask=mask, other=0.0)
    if rotary.cos_ptr is None:
        return tile
    else:
        if INTERLEAVED:
            angle, is_first = dims // 2, dims % 2 == 0
            partner = tl.where(is_first, dims + 1, dims - 1)
        else:
            is_first = dims < HALF
            partner = tl.where(is_first, dims + HALF, dims - HALF)
            angle = tl.where(is_first, dims, partner)
        turned = mask & (dims < 2 * HALF)[None, :]
        other = tl.load(row_ptrs[:, None] + partner[None, :], mask=turned, other=0.0).to(tl.float32)
        table = tl.minimum(positions, rotary.num_rows - 1)[:, None] * rotary.stride + angle[None, :]
        cos = tl.load(rotary.cos_ptr + table, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(rotary.sin_ptr + table, mask=turned, other=0.0).to(tl.float32)
        rotated = tile.to(tl.float32) * cos + tl.where(is_first[None, :], -other, other) * sin
        return tl.where(turned, rotated.to(tile.dtype), tile)


@triton.jit
def _slots(view, cached, positions, valid, PAGE_SIZE: tl.constexpr):
    """(int64 offsets in the keys' or values' View, which of them exist) of some positions of a sequence."""
    pages = cached.pages
    sequence = cached.sequence
    offset = cached.kv_head.to(tl.int64) * view.head
    if pages.leftpad is not None:
        positions += pages.leftpad
    if pages.table_ptr is None:
        return offset + sequence.to(tl.int64) * view.batch + positions.to(tl.int64) * view.token, valid
    else:
        entry = pages.table_ptr + sequence.to(tl.int64) * pages.table_stride + positions // PAGE_SIZE
        page = tl.load(entry, mask=valid, other=-1)
        exists = (page >= 0) & (page < pages.num_pages)
        slot = (positions % PAGE_SIZE).to(tl.int64)
        return offset + page.to(tl.int64) * view.batch + slot * view.token, exists


@triton.jit
def _load_slots(
    view,
    cached,
    positions,
    present,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """[len(positions), block_of(D)] of a View; zero where there is no page and, with CHECK_ROWS, where not present."""
    dims = tl.arange(0, block_of(HEAD_DIM))
    slots, exists = _slots(view, cached, positions, present, PAGE_SIZE)
    pointers = view.ptr + slots[:, None] + dims[None, :]
    if CHECK_ROWS or cached.pages.table_ptr is not None:
        return tl.load(pointers, mask=exists[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif block_of(HEAD_DIM) > HEAD_DIM:
        return tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_cached(
    cached,
    start,
    lowest,
    end,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """(k, v [BLOCK, block_of(D)]) of the cached keys from `start` on.

    With CHECK_ROWS zero where nobody looks, before key `lowest` and from key `end` on: there may be NaN.
    """
    positions = start + tl.arange(0, BLOCK)
    present = (positions >= lowest) & (positions < end)
    k = _load_slots(cached.key, cached, positions, present, HEAD_DIM, PAGE_SIZE, CHECK_ROWS)
    v = _load_slots(cached.value, cached, positions, present, HEAD_DIM, PAGE_SIZE, CHECK_ROWS)
    return k, v


@triton.jit
def load_new(
    new_key,
    new_value,
    sequence,
    kv_head,
    tokens,
    positions,
    present,
    rotary,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """(rotated k, v) of some new tokens of a head; zero where not present."""
    k = load_rotated(
        new_key, sequence, kv_head, tokens, present, positions, rotary, HEAD_DIM, HALF, INTERLEAVED
    )
    dims = tl.arange(0, block_of(HEAD_DIM))
    value_ptrs = row_ptr(new_value, sequence, kv_head, tokens)[:, None] + dims[None, :]
    v = tl.load(value_ptrs, mask=present[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    return k, v


@triton.jit
def store_new(k, v, cached, positions, present, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Writes new keys and values into their slots of the caches."""
    dims = tl.arange(0, block_of(HEAD_DIM))
    slots, exists = _slots(cached.key, cached, positions, present, PAGE_SIZE)
    mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(cached.key.ptr + slots[:, None] + dims[None, :], k, mask=mask)
    slots, exists = _slots(cached.value, cached, positions, present, PAGE_SIZE)
    tl.store(cached.value.ptr + slots[:, None] + dims[None, :], v, mask=mask)


@triton.jit(do_not_specialize=RUN_TIME)
def zinit_append_kernel(
    new_key,  # View [B, Hkv, T_new, D]
    new_value,  # View [B, Hkv, T_new, D]
    key_cache,  # View [B, Hkv, capacity, D], or pages [num_pages, Hkv, page size, D]
    value_cache,
    cache_seqlens_ptr,  # int32 [B]: keys in the cache before the append
    block_table_ptr,  # int32 [B, pages of a sequence] or None
    cos_ptr,  # [rotary_rows, HALF] or None
    sin_ptr,
    num_heads_kv,
    seqlen_new,  # T_new
    capacity,
    num_pages,
    table_stride,
    rotary_rows,
    rotary_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """cache[seqlen + t] = rotate(new[t]); one program owns BLOCK_T new tokens of one head."""
    pages = Pages(block_table_ptr, table_stride, num_pages, None)
    rotary = Rotary(cos_ptr, sin_ptr, rotary_rows, rotary_stride)
    tile, kv_head, sequence = unravel(tl.program_id(0), tl.cdiv(seqlen_new, BLOCK_T), num_heads_kv)
    tokens = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    positions = tl.maximum(tl.load(cache_seqlens_ptr + sequence), 0) + tokens
    present = (tokens < seqlen_new) & (positions < capacity)
    k, v = load_new(
        new_key, new_value, sequence, kv_head, tokens, positions, present, rotary, HEAD_DIM, HALF, INTERLEAVED
    )
    cached = CachedHead(key_cache, value_cache, pages, sequence, kv_head)
    store_new(k, v, cached, positions, present, HEAD_DIM, PAGE_SIZE)
