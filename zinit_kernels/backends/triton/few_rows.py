"""Linear layers of a few rows, with what a LLaMA layer has before and after them: norm, SwiGLU, residual.

A decoded token reads every weight once, and this kernel does little else. A program has BLOCK_N rows of the weight and
goes through their columns, BLOCK_K at a time. All rows of x fit one tile. Every program norms them for itself: they are
small, and come out of the cache that all multiprocessors share.

Numbers are rounded where PyTorch's operators round them: the normed row before it is multiplied by the norm's weight,
and after it; a product before the residual is added, or before SwiGLU; silu before it is multiplied. What may differ is
the order of the sums, and the last digits of 1 / rms and of the sigmoid.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import LOG2E

RUN_TIME = ["num_rows", "size", "second_size", "third_size"]


class Rows(NamedTuple):
    """x as a program takes it: all rows at once."""

    ptr: Any  # [number of rows, columns]
    numbers: Any
    valid: Any  # which of them there are
    columns: Any


@triton.jit
def _places(PARTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[PARTS, BLOCK_K / PARTS]: the columns of a block, in parts."""
    size: tl.constexpr = BLOCK_K // PARTS
    return tl.arange(0, PARTS)[:, None] * size + tl.arange(0, size)[None, :]


@triton.jit
def _load_rows(rows, at, WHOLE: tl.constexpr):
    """Columns `at` of the rows, zeros where there are none."""
    mask = rows.valid[None, :, None]
    if not WHOLE:
        mask = mask & (at < rows.columns)[:, None, :]
    ptrs = rows.ptr + rows.numbers[None, :, None] * rows.columns + at[:, None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _inverse_rms(
    rows, eps, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr
):
    """1 / sqrt(mean(x^2) + eps) of each row, in float32."""
    squares = tl.zeros([PARTS, BLOCK_M, BLOCK_K // PARTS], tl.float32)
    for start in range(0, rows.columns, BLOCK_K):
        x = _load_rows(rows, start + _places(PARTS, BLOCK_K), WHOLE).to(tl.float32)
        squares += x * x
    return tl.math.rsqrt(tl.sum(tl.sum(squares, 2), 0) / rows.columns + eps)


@triton.jit
def _load_normed(rows, norm_ptr, rstd, at, WHOLE: tl.constexpr):
    """Columns `at` of x / rms(x) times the norm's weight; of x itself where there is none."""
    x = _load_rows(rows, at, WHOLE)
    if norm_ptr is not None:
        if WHOLE:
            weight = tl.load(norm_ptr + at)
        else:
            weight = tl.load(norm_ptr + at, mask=at < rows.columns, other=0.0)
        normed = (x.to(tl.float32) * rstd[None, :, None]).to(x.dtype)
        x = (normed.to(tl.float32) * weight.to(tl.float32)[:, None, :]).to(x.dtype)
    return x


@triton.jit
def _load_weight(ptr, numbers, at, columns, WHOLE: tl.constexpr):
    """Columns `at` of some rows of a weight."""
    ptrs = ptr + numbers[None, :, None] * columns + at[:, None, :]
    if WHOLE:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(at < columns)[:, None, :], other=0.0)


@triton.jit(do_not_specialize=RUN_TIME)
def zinit_few_rows_kernel(
    x_ptr,  # [num_rows, columns], num_rows <= BLOCK_M
    norm_ptr,  # [columns]: the weight of an RMS norm; None: x is multiplied as it is
    weight_ptr,  # [size, columns]
    second_ptr,  # [second_size, columns] or None
    third_ptr,  # [third_size, columns] or None
    residual_ptr,  # [num_rows, size] or None: added to the product
    out_ptr,  # [num_rows, size + second_size + third_size]; GATED: [num_rows, size]
    num_rows,
    columns,
    size,
    second_size,
    third_size,
    eps,
    GATED: tl.constexpr,  # silu(x weight^T) * (x second^T)
    WHOLE: tl.constexpr,  # columns is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,  # of BLOCK_K, each summed up by a warp of its own
):
    """out = x times one to three transposed weights, side by side; or SwiGLU of two products. A program: BLOCK_N of
    its columns, all of one weight."""
    number, out_stride = tl.program_id(0), size
    first_column = number * 0
    if second_ptr is not None and not GATED:
        out_stride += second_size
        if third_ptr is not None:
            out_stride += third_size
        tiles = tl.cdiv(size, BLOCK_N)
        if number >= tiles:
            number -= tiles
            first_column += size
            weight_ptr, size = second_ptr, second_size
            if third_ptr is not None:
                tiles = tl.cdiv(second_size, BLOCK_N)
                if number >= tiles:
                    number -= tiles
                    first_column += second_size
                    weight_ptr, size = third_ptr, third_size
    numbers = tl.arange(0, BLOCK_M)
    rows = Rows(x_ptr, numbers, numbers < num_rows, columns)
    of_weight = number * BLOCK_N + tl.arange(0, BLOCK_N)
    # behind the last row of the weight comes the last one again, which costs less than a mask on every load
    read = tl.minimum(of_weight, size - 1) - number * BLOCK_N
    first = number.to(tl.int64) * BLOCK_N * columns
    rstd = tl.zeros([BLOCK_M], tl.float32)
    if norm_ptr is not None:
        rstd = _inverse_rms(rows, eps, WHOLE, BLOCK_M, BLOCK_K, PARTS)
    acc = tl.zeros([PARTS, BLOCK_M, BLOCK_N], tl.float32)
    second = tl.zeros([PARTS, BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, columns, BLOCK_K):
        at = start + _places(PARTS, BLOCK_K)
        x = _load_normed(rows, norm_ptr, rstd, at, WHOLE)
        weight = _load_weight(weight_ptr + first, read, at, columns, WHOLE)
        acc = tl.dot(x, tl.permute(weight, (0, 2, 1)), acc, input_precision="ieee")
        if GATED:
            weight = _load_weight(second_ptr + first, read, at, columns, WHOLE)
            second = tl.dot(x, tl.permute(weight, (0, 2, 1)), second, input_precision="ieee")

    dtype = out_ptr.dtype.element_ty
    mask = rows.valid[:, None] & (of_weight < size)[None, :]
    at = numbers[:, None] * out_stride + first_column + of_weight[None, :]
    out = tl.sum(acc, 0).to(dtype)
    if GATED:
        gate = out.to(tl.float32)
        silu = (gate / (1 + tl.math.exp2(gate * (-1.0 * LOG2E)))).to(dtype)
        out = (silu.to(tl.float32) * tl.sum(second, 0).to(dtype).to(tl.float32)).to(dtype)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
        out = (residual.to(tl.float32) + out.to(tl.float32)).to(dtype)
    tl.store(out_ptr + at, out, mask=mask)
