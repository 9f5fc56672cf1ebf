"""A call against a cache as one masked attention over the slots of the cache, without reading a length on the host.

`formula.append` slices each sequence to its length. On a device that has three costs: the host waits for the lengths in
every layer, each sequence is launched on its own, and the number of keys changes with every token. cuDNN, which SDPA
prefers on Hopper, builds a plan for each new shape, which takes tens of milliseconds. Here all shapes follow from the
call's: the keys are the whole cache, or with a window as many slots as the window can hold, and a mask hides the rest.
So a step can also be captured in a CUDA graph.

Hidden slots are often uninitialised memory. They are read as zeros, because 0 * NaN is NaN: one copy of what is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import CacheCall, Call
from . import formula


def append(call: CacheCall) -> tuple[Call, bool]:
    """Rotates, writes the new keys and values behind those of each sequence, in place.

    Returns the attention that is left to do, its prompts left out, with `dense_mask` bool [B, 1, T, S]; and whether
    some query may see no key.
    """
    query, new_key = formula.rotated(call)
    lengths = call.cache_seqlens.long()[:, None]
    num_q, num_new = query.shape[1], 0 if new_key is None else new_key.shape[1]
    if new_key is not None and call.new_value is not None:
        places = _places(call, _behind(lengths, 0, num_new))
        call.key_cache[places], call.value_cache[places] = new_key, call.new_value
        lengths = lengths + num_new
    slots = _slots(call, lengths, num_q)
    visible = _visible(call, lengths, slots, num_q)
    key, value = _read(call, slots, visible)
    piece = Call(
        query=query.transpose(1, 2),
        key=key.transpose(1, 2),
        value=value.transpose(1, 2),
        sinks=call.sinks,
        max_seqlen_q=num_q,
        max_seqlen_k=key.shape[1],
        scale=call.scale,
        softcap=call.softcap,
        dense_mask=visible[:, None],
    )
    return piece, num_new < num_q  # a query that came with its own key sees that one


def _behind(lengths: Tensor, first: int, last: int) -> Tensor:
    """lengths + [first, last), [B, last - first]; without a launch where that is the lengths themselves."""
    if last - first == 1:
        return lengths + first if first else lengths
    return lengths + torch.arange(first, last, device=lengths.device)


def _capacity(call: CacheCall) -> int:
    return call.key_cache.shape[1] * (1 if call.block_table is None else call.block_table.shape[1])


def _slots(call: CacheCall, lengths: Tensor, num_q: int) -> Tensor:
    """The slots that some query may see, [1, S] where they are all slots of the cache, else [B, S].

    The last query is at the last key, so that no query sees more than window_left + T of the last keys.
    """
    capacity, span = _capacity(call), call.window_left + num_q
    if call.window_left < 0 or span >= capacity:
        return torch.arange(capacity, device=lengths.device)[None]
    return (lengths - span).clamp(0, capacity - span) + torch.arange(span, device=lengths.device)


def _visible(call: CacheCall, lengths: Tensor, slots: Tensor, num_q: int) -> Tensor:
    """[B, T, S]: whether a query sees a slot."""
    slots, visible = slots[:, None], (slots < lengths)[:, None]
    if num_q > 1 and call.window_right >= 0:  # the last query is at the last key
        visible = visible & (slots <= _behind(lengths, -num_q, 0)[:, :, None] + call.window_right)
    if num_q > 1 and call.window_left >= 0:  # of one query alone, `_slots` has no others
        visible = visible & (slots >= _behind(lengths, -num_q, 0)[:, :, None] - call.window_left)
    if call.cache_leftpad is not None:
        visible = visible & (slots >= call.cache_leftpad[:, None, None])
    return visible.expand(lengths.shape[0], num_q, -1)


def _read(call: CacheCall, slots: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values in the slots, [B, S, Hkv, D], with zeros where no query sees them."""
    caches = call.key_cache, call.value_cache
    if call.block_table is not None or slots.shape[0] != 1:
        places = _places(call, slots.expand(visible.shape[0], -1))
        caches = call.key_cache[places], call.value_cache[places]
    seen = visible[:, 0] if visible.shape[1] == 1 else visible.any(1)
    zero = call.key_cache.new_zeros(())  # 0.0 would be brought to the device twice
    key, value = (torch.where(seen[:, :, None, None], cache, zero) for cache in caches)
    return key, value


def _places(call: CacheCall, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Where slots [B, S] of the sequences are in the caches: (row or page, slot in it). Entries of unused pages may be
    anything."""
    if call.block_table is None:
        return torch.arange(slots.shape[0], device=slots.device)[:, None], slots
    num_pages, page_size = call.key_cache.shape[:2]
    pages = call.block_table.long().gather(1, slots // page_size)
    return pages.clamp(0, num_pages - 1), slots % page_size
