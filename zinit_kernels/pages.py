"""Pages of a cache as the packed keys and values that the kernels for packed sequences read."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .values import check_range, has_values, may_look_at


def gather_pages(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_k: Tensor, block_table: Tensor
) -> tuple[Tensor, Tensor]:
    """Packed keys and values [total_k, Hkv, D] out of pages [num_pages, page_size, Hkv, D]: one copy of each.

    Differentiable: the gradient of a page that several sequences share is the sum of theirs, and that of a slot that
    none uses is 0. The lengths are read on the host, since they are the size of the copy.
    """
    layout = "[num_pages, page_size, Hkv, D], as block_table is given"
    checks.check_tensor("k", k, 4, layout)
    checks.check_tensor("v", v, 4, layout)
    checks.check_shape("v", v, k.shape)
    cu_seqlens_k = checks.as_int32("cu_seqlens_k", cu_seqlens_k, 1)
    batch = max(cu_seqlens_k.shape[0] - 1, 0)
    block_table = checks.as_int32("block_table", block_table, 2)
    checks.check_shape("block_table", block_table, (batch, block_table.shape[1]), free=(1,))
    if not has_values(cu_seqlens_k):
        raise TypeError(
            "block_table needs cu_seqlens_k to be read on the host, which torch.compile, torch.func transforms and "
            "fake tensors do not allow: gather the pages before, and pass packed k and v"
        )
    (num_pages, page_size), max_pages = k.shape[:2], block_table.shape[1]
    starts = cu_seqlens_k.tolist()
    for b, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        if not 0 <= end - start <= max_pages * page_size:
            raise ValueError(
                f"cu_seqlens_k must rise by 0 to {max_pages * page_size}, the keys that fit into the {max_pages} pages "
                f"of a row of block_table, got {start} then {end} for sequence {b}"
            )
    lengths = cu_seqlens_k.diff().long()
    total = starts[-1] - starts[0] if starts else 0
    sequence = torch.repeat_interleave(torch.arange(batch, device=k.device), lengths, output_size=total)
    position = torch.arange(total, device=k.device) - (cu_seqlens_k[:-1] - cu_seqlens_k[:1])[sequence]
    page = block_table[sequence, position // max(page_size, 1)].long()
    if may_look_at(page) and total:
        check_range(page, num_pages, "block_table must name pages in", "the pages of k")
    elif total:  # as kernels do: no page outside of the pool is read
        page = page.clamp(0, num_pages - 1)
    slot = position % max(page_size, 1)
    return k[page, slot], v[page, slot]
