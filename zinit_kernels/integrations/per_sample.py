"""Prompts that differ from sequence to sequence: what an image adds to the prompts of every layer, for one call.

    visual = projection(image_features)                       # [N, 1 or P, C], by a module of the user's
    with per_sample_prompts(model, visual, rows=[0, 0, 1]):   # two questions on the first image, one on the second
        model.generate(**inputs)

LLaMA-Adapter, arXiv 2303.16199, equations 9 and 10: P_l^v = P_l + Repeat(I_p), the prompts of layer l of a sequence
about the image I_p. The table of a layer is projected to keys and values once, with one entry for each image, however
many sequences ask about it and however many tokens are decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .added_prompts import Added, added, refuse_served
from .layers import ZeroInitPrompts, required_adapters, sizes
from .recomputation import remember_blocks


@contextmanager
def per_sample_prompts(
    model: Any, prompts: Tensor, rows: Sequence[int] | Tensor | None = None
) -> Iterator[None]:
    """For the calls in this block, each sequence's prompts are the layers' own plus one entry of `prompts`.

    Forward and generate take it, with beams, several returned sequences, padding on either side and static caches. The
    block is for the thread, or asyncio task, that entered it. Gradients reach `prompts`. Backward may come after the
    block, also with gradient checkpointing by `gradient_checkpointing_enable` or FSDP. Where your own code calls
    `torch.utils.checkpoint`, backward belongs in the block.

    Args:
        model: has prompts, by `add_zero_init_attention`.
        prompts: [N, P, C], or [N, 1, C] to add one vector to all P prompts; [L, N, P or 1, C] for other ones in each of
            the L adapted layers, lowest first. Floating point, on any device.
        rows: for each of the B sequences of the batch, the entry that it takes, 0 to N - 1; -1 for one without an
            image, which has the layers' own prompts. None: N is B, or N is 1 and all sequences share the entry.

    Raises:
        ValueError: no prompts in the model, shapes or rows that do not fit, a block within `continuous_batching`. In
            the block: a batch of another size, and `continuous_batching` with several entries, since its requests share
            their batches; one entry is served.
    """
    found = [(sizes(layer.attention)[1], adapter) for layer, adapter in required_adapters(model)]
    by_layer = _by_layer(prompts, found)
    count = by_layer[0].shape[0]
    index = _index(rows, count)
    if index is not None and len(index) and bool((index == index[0]).all()) and int(index[0]) > 0:
        chosen = int(index[0]) - 1
        by_layer, index = [table[chosen : chosen + 1] for table in by_layer], None
    refuse_served("per_sample_prompts", frozenset(adapter.token for _, adapter in found))
    entry = Added({adapter.token: table for (_, adapter), table in zip(found, by_layer, strict=True)}, index)
    remember_blocks(model)
    with added.holding(entry):
        yield


def _by_layer(prompts: Tensor, found: list[tuple[int, ZeroInitPrompts]]) -> list[Tensor]:
    """A table for each adapted layer. ValueError for shapes that do not fit."""
    if not isinstance(prompts, Tensor) or not prompts.is_floating_point() or prompts.dim() not in (3, 4):
        what = (
            f"{prompts.dtype} of {tuple(prompts.shape)}"
            if isinstance(prompts, Tensor)
            else type(prompts).__name__
        )
        raise ValueError(f"prompts must be floating-point of shape [N, P, C] or [L, N, P, C], got {what}")
    if prompts.dim() == 4 and len(prompts) != len(found):
        raise ValueError(f"prompts are for {len(prompts)} layers, and {len(found)} layers are adapted")
    tables = [prompts] * len(found) if prompts.dim() == 3 else list(prompts)
    for table, (hidden_size, adapter) in zip(tables, found, strict=True):
        length = adapter.prompt.shape[0]
        if table.shape[0] < 1 or table.shape[1] not in (1, length) or table.shape[2] != hidden_size:
            raise ValueError(
                f"prompts must have shape [N, {length} or 1, {hidden_size}] for a layer of {length} prompts and hidden "
                f"size {hidden_size}, got {list(table.shape)}"
            )
    return tables


def _index(rows: Sequence[int] | Tensor | None, count: int) -> Tensor | None:
    """The row of each sequence in a table that begins with the layer's own prompts; None: all take the one entry."""
    if rows is None:
        return None if count == 1 else torch.arange(1, count + 1, dtype=torch.int32)
    index = torch.as_tensor(rows)
    if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool or not len(index):
        raise ValueError(f"rows must be whole numbers, one for each sequence, got {rows!r}")
    if int(index.min()) < -1 or int(index.max()) >= count:
        raise ValueError(
            f"rows must lie in -1 to {count - 1}, for {count} entries of prompts, got {index.tolist()}"
        )
    return (index + 1).to(torch.int32)
