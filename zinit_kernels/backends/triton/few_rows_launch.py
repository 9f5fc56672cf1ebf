"""Launches of the kernel for linear layers of a few rows: `few_rows`. Torch on the host side.

A launch is kept like those of attention (`kept`), so the next call of its kind takes microseconds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...call_keys import key_function
from . import kept
from .few_rows import zinit_few_rows_kernel
from .kept import Recorder
from .operands import arch_of, num_processors
from .ranges import named

_STAGE = "few_rows"
_TENSORS = ("x", "norm", "weight", "second", "third", "residual")
kept.key_of[_STAGE] = key_function(_TENSORS, {"norm", "second", "third", "residual"}, ("eps", "gated"), False)


class Tile(NamedTuple):
    """block_m rows of x, block_n rows of the weight, block_k columns of both in `parts`."""

    block_m: int
    block_n: int
    block_k: int
    parts: int
    num_warps: int
    num_stages: int


def few_rows(
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    residual: Tensor | None,
    eps: float,
    gated: bool,
) -> Tensor:
    """`reference.few_rows` of contiguous tensors of one dtype: x [M, K] of up to 32 rows, weights [N, K]."""
    arguments = (x, norm, weight, second, third, residual, eps, gated)
    (out,) = kept.run(_STAGE, x, arguments, _few_rows)
    return out


def _few_rows(
    recorder: Recorder,
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    residual: Tensor | None,
    eps: float,
    gated: bool,
) -> tuple[Tensor]:
    num_rows, columns = x.shape
    sizes = [0 if one is None else len(one) for one in (weight, second, third)]
    written = sizes[:1] if gated else sizes
    out = recorder.empty(x, (num_rows, sum(written)))
    tile = tile_of(num_rows, sum(written), x.element_size(), arch_of(x), num_processors(x))
    arguments = {
        "x_ptr": x,
        "norm_ptr": norm,
        "weight_ptr": weight,
        "second_ptr": second,
        "third_ptr": third,
        "residual_ptr": residual,
        "out_ptr": out,
        "num_rows": num_rows,
        "columns": columns,
        "size": sizes[0],
        "second_size": sizes[1],
        "third_size": sizes[2],
        "eps": eps,
        "GATED": gated,
        "WHOLE": columns % tile.block_k == 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "PARTS": tile.parts,
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    programs = sum(triton.cdiv(size, tile.block_n) for size in written)
    if programs and num_rows:
        with torch.cuda.device_of(x), named("few_rows"):
            recorder.launch(zinit_few_rows_kernel, programs, arguments, options)
    return (out,)


def tile_of(num_rows: int, size: int, itemsize: int, arch: int, processors: int) -> Tile:
    """The tile for `size` columns of a result. itemsize: bytes of an element; arch: 0 for the interpreter.

    No GPU has timed them. Projected from the machine code (docs/projection.md) for one row of bfloat16 on an H200, but
    for the loop that norms: 32 rows of the weight reach 0.57 to 0.74 of the DRAM bandwidth at LLaMA-7B's sizes, and 16
    reach 0.56 to 0.68. Where a result has 2,048 columns, 32 leave half of the chip without work, and 16 take 0.6 to
    0.73 of the time. With a part for each warp there is no long chain of products: 16 rows take 0.5 to 0.8 of the time.
    """
    block_m = 16 if num_rows <= 16 else 32
    if arch == 0:
        return Tile(block_m, 32, 64, 2, 4, 1)
    if itemsize > 2:  # on the CUDA cores, because TF32 would round the inputs to 10 bits
        return Tile(block_m, 16, 64, 4, block_m // 4, 3)
    if 4 * triton.cdiv(size, 32) < 3 * processors:
        return Tile(block_m, 16, 4096 // block_m, 4, 4, 4)
    return Tile(block_m, 32, 4096 // block_m, 4, 4, 3)
