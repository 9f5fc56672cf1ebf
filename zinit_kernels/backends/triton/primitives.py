"""What the kernels share: addresses, tiles in memory, products, which keys a query sees, the prompt table.

Alphabet: B sequences, Hq / Hkv query and key heads, T queries, S keys, P prompts, N prompt table rows, D head
dimension. A tile has BLOCK_M queries, BLOCK_N keys, BLOCK_P prompts and block_of(D) dimensions; q, k, v and do are
tiles of the query, the key, the value and the gradient of the output. Addresses of tiles are int64, offsets inside a
tile int32.

An optional argument that is absent is None (a View without a pointer). The compiler then leaves its code out.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST_BIAS = tl.constexpr(-1.6e38)  # finfo.min times log2(e), or times 2, would be -inf, which means masked

# Listed in do_not_specialize, so that a new value of these arguments compiles no new kernel. They are not grouped
# in tuples because Triton specialises every integer in a tuple on being 1 and on being divisible by 16.
RUN_TIME = [
    "num_heads_q",
    "num_heads_kv",
    "num_sequences",
    "seqlen_q",
    "seqlen_k",
    "seqlen_new",
    "total_q",
    "total_k",
    "capacity",
    "num_pages",
    "table_stride",
    "rotary_rows",
    "rotary_stride",
    "window_left",
    "window_right",
    "prompt_length",
    "prompt_rows",
    "gate_stride",
    "gate_rows",
    "num_parts",
    "num_splits",
]


class Rows(NamedTuple):
    """A matrix in memory with D columns: the address of its first row, and the elements from one row to the next."""

    ptr: Any
    stride: Any


class Window(NamedTuple):
    """How many keys a query sees to the left and to the right of its own one; None means no limit."""

    left: Any
    right: Any


class Cap(NamedTuple):
    """A soft cap on scores: scale / softcap, and softcap itself; both None without one."""

    scale: Any
    size: Any


class Scoring(NamedTuple):
    """How the scores of a tile become weights: which keys each row sees, and what a raw score is multiplied with."""

    limits: Any  # (lower, upper) of the keys that each row sees, as `key_limits` gives them
    window: Any
    scale_log2: Any
    cap: Any


class Prompts(NamedTuple):
    """The prompt table: key and value are Views [N, Hkv, P, D] (no pointer: no prompt branch), gates [N or 1, Hq]."""

    key: Any
    value: Any
    gate_ptr: Any
    # int32 [B]: the table row of each sequence, -1 = none. None: row b, or row 0 if there is one row
    index_ptr: Any
    num_rows: Any
    length: Any
    gate_stride: Any


@triton.jit
def unravel(program, size, num_heads):
    """(index below size, head, sequence) of a program. One grid axis holds all: the other axes end at 65535."""
    rest = program // size
    return program % size, rest % num_heads, rest // num_heads


@triton.jit
def locate_sequence(cu_seqlens_ptr, sequence, seqlen, total):
    """(batch index, first row, number of rows) of a sequence; lengths that would leave the tensor are cut."""
    if cu_seqlens_ptr is None:
        return sequence, sequence * 0, sequence * 0 + seqlen
    else:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), total)
        last = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), total)
        return sequence * 0, first, tl.maximum(last - first, 0)


@triton.jit
def row_ptr(view, batch, head, row):
    """Address of rows of a [batch, head, token, D] tensor; batch, head and row may be tensors."""
    return (
        view.ptr
        + batch.to(tl.int64) * view.batch
        + head.to(tl.int64) * view.head
        + row.to(tl.int64) * view.token
    )


@triton.jit
def rows_from(view, batch, head, row):
    """The rows of one head from `row` on."""
    return Rows(row_ptr(view, batch, head, row), view.token)


@triton.jit
def skip_rows(rows, count):
    """The rows behind the first `count`."""
    return Rows(rows.ptr + tl.cast(count, tl.int64) * rows.stride, rows.stride)


@triton.constexpr_function
def block_of(size):
    """The power of two that holds `size`, and at least 16, which one tensor core product takes."""
    return max(16, 1 << (size - 1).bit_length())


@triton.jit
def dot(a, b, acc=None):
    """a b (+ acc) in float32. float32 products stay float32 (TF32 would round the inputs to 10 bits)."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_tile(rows, num_rows, BLOCK_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """[BLOCK_ROWS, block_of(D)]: zero at dimensions >= HEAD_DIM and, with CHECK_ROWS, at rows >= num_rows."""
    index = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, block_of(HEAD_DIM))
    pointers = rows.ptr + index[:, None] * rows.stride + dims[None, :]
    if CHECK_ROWS:
        return tl.load(pointers, mask=(index < num_rows)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif block_of(HEAD_DIM) > HEAD_DIM:
        return tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_kept(rows, keep, BLOCK_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The rows of a tile where `keep` is true, zeros elsewhere: padding may hold NaN, and 0 * NaN is NaN."""
    dims = tl.arange(0, block_of(HEAD_DIM))
    pointers = rows.ptr + tl.arange(0, BLOCK_ROWS)[:, None] * rows.stride + dims[None, :]
    return tl.load(pointers, mask=keep[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_tile(rows, num_rows, tile, BLOCK_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rounds `tile` to the dtype in memory and writes its rows < num_rows and dimensions < HEAD_DIM."""
    index = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, block_of(HEAD_DIM))
    pointers = rows.ptr + index[:, None] * rows.stride + dims[None, :]
    mask = (index < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(rows.ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_bias(key_bias_ptr, columns, num_keys, CHECK_ROWS: tl.constexpr):
    """Additive bias of some keys of one sequence; with CHECK_ROWS, -inf behind the last key."""
    if CHECK_ROWS:
        bias = tl.load(key_bias_ptr + columns, mask=columns < num_keys, other=float("-inf"))
    else:
        bias = tl.load(key_bias_ptr + columns)
    return tl.where(bias == float("-inf"), bias, tl.maximum(bias, LOWEST_BIAS))


@triton.jit
def load_key_tile(
    key_rows,
    value_rows,
    key_bias_ptr,
    start,
    num_keys,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """(k, v [BLOCK_N, block_of(D)], bias [BLOCK_N]) of the keys from `start` on; without key_bias_ptr the bias is 0.

    Masked keys (bias -inf) come as zeros, and so do keys >= num_keys, which need CHECK_ROWS.
    """
    key_rows = skip_rows(key_rows, start)
    value_rows = skip_rows(value_rows, start)
    if key_bias_ptr is not None:
        bias = load_bias(key_bias_ptr, start + tl.arange(0, BLOCK_N), num_keys, CHECK_ROWS)
        keep = bias != float("-inf")
        k = load_kept(key_rows, keep, BLOCK_N, HEAD_DIM)
        v = load_kept(value_rows, keep, BLOCK_N, HEAD_DIM)
    else:
        bias = tl.zeros([BLOCK_N], tl.float32)
        k = load_tile(key_rows, num_keys - start, BLOCK_N, HEAD_DIM, CHECK_ROWS)
        v = load_tile(value_rows, num_keys - start, BLOCK_N, HEAD_DIM, CHECK_ROWS)
    return k, v, bias


@triton.jit
def key_limits(positions, num_keys, window):
    """(lower, upper): a query whose own key stands at a position sees the keys with lower <= index < upper."""
    lower = positions
    if window.left is not None:
        lower = positions - window.left
    upper = positions * 0 + num_keys
    if window.right is not None:
        upper = tl.minimum(positions + window.right + 1, num_keys)
    return lower, upper


@triton.jit
def is_visible(start, BLOCK: tl.constexpr, limits, window):
    """[len(lower), BLOCK]: lower <= start + j < upper. A window without a left limit has no lower one.

    Limits relative to the tile let ptxas compare with constants: up to 200 instructions a tile less.
    """
    lower, upper = limits
    index = tl.arange(0, BLOCK)[None, :]
    visible = index < (upper - start)[:, None]
    if window.left is not None:
        visible = visible & (index >= (lower - start)[:, None])
    return visible


@triton.jit
def key_stretches(position, num_keys, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Three stretches (first, last) of the keys that BLOCK_M queries from `position` on look at.

    In the first two, at the window's left and right end, some query does not see some key. In the third every query
    sees every key: no mask arithmetic there. Tiles of all three start at multiples of BLOCK_N.
    """
    first = position * 0
    full_first = first
    last = first + num_keys
    full_last = last
    if window.right is not None:
        last = tl.minimum(last, tl.maximum(position + BLOCK_M + window.right, 0))
        full_last = tl.minimum(last, tl.maximum(position + window.right + 1, 0))
    full_last = full_last // BLOCK_N * BLOCK_N
    if window.left is not None:
        first = tl.maximum(position - window.left, 0) // BLOCK_N * BLOCK_N
        all_left = tl.maximum(position + BLOCK_M - 1 - window.left, 0)
        whole = (last + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        full_first = tl.minimum((all_left + BLOCK_N - 1) // BLOCK_N * BLOCK_N, tl.maximum(whole, first))
    full_last = tl.maximum(full_last, full_first)
    return (first, full_first), (full_last, last), (full_first, full_last)


@triton.constexpr_function
def always_careful(dtype):
    """Whether masked tiles are computed with care for NaN at once, and not again where NaN was found.

    The products of float32 run on the CUDA cores, and beside them the care costs little. A branch between the loops
    makes ptxas spill there: 148 instructions in forward at 128 dimensions, 517 for dK and dV.
    """
    return dtype == tl.float32


@triton.jit
def cap_scores(s, cap):
    """softcap * tanh(scale * s / softcap) of raw scores s.

    Not in base 2, where rounding is relative to larger numbers: capped scores are often near the cap.
    Near 0, where 1 - decay would cancel, tanh is x + x^3 p(x^2) with a minimax p: 2 units in the last place.
    """
    x = s * cap.scale
    square = x * x
    near = -5.905871279537678e-3 * square + 2.080538682639599e-2
    near = near * square - 5.3786683827638626e-2
    near = near * square + 1.3331958651542664e-1
    near = near * square - 3.3333298563957214e-1
    near = x + x * (square * near)
    decay = tl.math.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = 1 - 2 * decay / (1 + decay)
    t = tl.where(tl.abs(x) < 0.6, near, tl.where(x < 0, -far, far))
    return cap.size * t


@triton.jit
def cap_slopes(capped, cap):
    """The derivative of the cap where it made these scores."""
    t = capped / cap.size
    return 1.0 - t * t


@triton.jit
def has_nan(tile):
    """Whether some element of a matrix is NaN (or infinities of both signs are).

    Over both dimensions at once: one after the other stops Triton 3.7 with an assertion on sm_100.
    """
    total = tl.sum(tile)
    return total != total


@triton.jit
def prompt_row(prompts, sequence):
    """Prompt table row of a sequence; -1 means none. A number beyond the table counts as none: no stray read."""
    if prompts.index_ptr is None:
        return tl.where(prompts.num_rows > 1, sequence, 0)
    else:
        row = tl.load(prompts.index_ptr + sequence)
        return tl.where(row < prompts.num_rows, row, -1)


@triton.jit
def load_prompts(
    view, row, kv_head, prompt_length, dtype: tl.constexpr, BLOCK_P: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """[BLOCK_P, block_of(D)] in `dtype`: one table row and key head of a View, zeros behind the last prompt."""
    rows = rows_from(view, row, kv_head, row * 0)
    return load_tile(rows, prompt_length, BLOCK_P, HEAD_DIM, True).to(dtype)


@triton.jit
def load_gate(prompts, row, head, TANH: tl.constexpr, exists=None):
    """act(gate) in float32 of a table row and a head, or a tensor of heads, of which `exists` says which are read."""
    other = None if exists is None else 0.0
    return activate(tl.load(prompts.gate_ptr + row * prompts.gate_stride + head, exists, other), TANH)


@triton.jit
def activate(gate, TANH: tl.constexpr):
    """tanh(gate), or the gate itself. Near 0, where gates start, Lambert's continued fraction keeps tanh's digits."""
    if TANH:
        square = gate * gate
        near = gate / (1 + square / (3 + square / (5 + square / (7 + square / (9 + square / 11)))))
        decay = tl.math.exp2(tl.abs(gate) * (-2.0 * LOG2E))
        far = (1 - decay) / (1 + decay)
        return tl.where(tl.abs(gate) < 1, near, tl.where(gate < 0, -far, far))
    else:
        return gate
