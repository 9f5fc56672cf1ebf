"""The launches of our Triton kernels at a shape: which blocks there are, how often each runs its loops, and its bytes.

The tiles are those that `configs` chooses for the chip. What a block does follows from its number as in the kernels;
tests/ptx counts the same from the interpreted kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from zinit_kernels.backends.triton import configs, launch
from zinit_kernels.backends.triton import decode as decode_kernels

from ..problem import Shape
from . import machine_code
from .chips import Chip
from .compiled import compile_kernel
from .model import Kernel, Launch, Loop

ITEM = 2  # bytes of a bfloat16
Trips = tuple[int, ...]
# The loops with products that a call without NaN runs, in the order of the code. Behind the masked ones stand those
# that run again, with care, where NaN was found.
LOOPS = {
    "forward": {"causal": (0, 1), "none": (0, 1)},
    "grad_key_value": {"causal": (0, 1, 4), "none": (0, 1)},
    "grad_query": {"causal": (0, 2), "none": (0, 1)},
    "partial_sums": {"causal": (0,), "none": (0,)},
    "decode": {"causal": (0, 1), "none": (0, 1)},
    "combine": {"causal": (0,), "none": (0,)},  # it has no products in loops, but adds up the splits in one
}


@cache
def kernel(name: str, head_dim: int, arch: int, mask: str, config: configs.Config | None = None) -> Kernel:
    """A kernel for one of the chips, with up to 16 prompts."""
    compiled, chosen = compile_kernel(name, head_dim, arch, mask=mask, config=config)
    code = machine_code.disassemble(compiled.asm["cubin"])
    loops = LOOPS.get(name, {}).get(mask, ())
    return Kernel(name, code, chosen.num_warps, compiled.metadata.shared, loops)


def tile_of(name: str, shape: Shape, chip: Chip) -> configs.Config:
    stage = "prompt_gradients" if name == "partial_sums" else name
    return configs.choose(stage, configs.block_of(shape.head_dim), 16, ITEM, chip.arch)


def visible_tiles(position: int, keys: int, causal: bool, rows: int, columns: int) -> Trips:
    """(masked, full): tiles of `columns` keys that `rows` queries from `position` on look at."""
    last = min(keys, max(position + rows, 0)) if causal else keys
    full = (min(keys, max(position + 1, 0)) if causal else keys) // columns * columns
    return up(last - full, columns), full // columns


def seeing_tiles(position: int, queries: int, causal: bool, rows: int, columns: int) -> Trips:
    """(masked, cut off, full): tiles of `columns` queries that see some of `rows` keys from `position` on.

    Queries before `position` see none of the keys. Where not causal there is no masked stretch.
    """
    last_full = queries // columns * columns
    if not causal:
        return up(queries - last_full, columns), last_full // columns
    first = max(position, 0) // columns * columns
    all_see = up(max(position + rows - 1, 0), columns) * columns
    first_full = min(all_see, max(up(queries, columns) * columns, first))
    last_full = max(last_full, first_full)
    return (
        up(first_full - first, columns),
        max(0, up(queries - last_full, columns)),
        (last_full - first_full) // columns,
    )


def up(size: int, tile: int) -> int:
    """How many tiles hold `size`."""
    return -(-size // tile)


def mask_of(shape: Shape) -> str:
    return "causal" if shape.causal else "none"


def forward(shape: Shape, chip: Chip, config: configs.Config | None = None) -> Launch:
    tile = config or tile_of("forward", shape, chip)
    one = _query_tiles(shape, tile)
    rows = shape.batch * shape.heads_q * shape.seqlen_q
    moved = ITEM * shape.head_dim * (2 * rows + _key_rows(shape)) + 4 * rows
    return Launch(
        kernel("forward", shape.head_dim, chip.arch, mask_of(shape), tile), (_keys_of(shape, tile),) * 2,
        one * (shape.batch * shape.heads_q), shape.flops("forward"), moved,
    )  # fmt: skip


def grad_query(shape: Shape, chip: Chip, config: configs.Config | None = None) -> Launch:
    tile = config or tile_of("grad_query", shape, chip)
    one = _query_tiles(shape, tile)
    rows = shape.batch * shape.heads_q * shape.seqlen_q
    moved = ITEM * shape.head_dim * (3 * rows + _key_rows(shape)) + 8 * rows
    return Launch(
        kernel("grad_query", shape.head_dim, chip.arch, mask_of(shape), tile), (_keys_of(shape, tile),) * 2,
        one * (shape.batch * shape.heads_q), 3 * _product(shape), moved,
    )  # fmt: skip


def grad_key_value(shape: Shape, chip: Chip, config: configs.Config | None = None) -> Launch:
    tile = config or tile_of("grad_key_value", shape, chip)
    group = shape.heads_q // shape.heads_kv
    one = []
    for start in range(0, shape.seqlen_k, tile.block_n):
        position = start - (shape.seqlen_k - shape.seqlen_q)
        trips = seeing_tiles(position, shape.seqlen_q, shape.causal, tile.block_n, tile.block_m)
        one.append(tuple(group * count for count in trips))
    rows = shape.batch * shape.heads_q * shape.seqlen_q
    moved = ITEM * shape.head_dim * (2 * rows + 2 * _key_rows(shape)) + 8 * rows
    loop = Loop(2 * ITEM * tile.block_m * shape.head_dim + 8 * tile.block_m)
    return Launch(
        kernel("grad_key_value", shape.head_dim, chip.arch, mask_of(shape), tile), (loop,) * len(one[0]),
        one * (shape.batch * shape.heads_kv), 4 * _product(shape), moved,
    )  # fmt: skip


def partial_sums(shape: Shape, chip: Chip) -> Launch:
    """The prompts' gradients, first stage: every part takes each num_parts-th tile of the queries."""
    tile = tile_of("partial_sums", shape, chip)
    columns = shape.batch * shape.heads_q
    tiles = up(shape.seqlen_q, tile.block_m)
    parts = launch.num_parts(up(shape.seqlen_q, 64), columns)
    trips = [(len(range(part, tiles, parts)),) for part in range(parts)]
    rows = columns * shape.seqlen_q
    moved = ITEM * shape.head_dim * 3 * rows + 4 * rows + _partials(shape, parts)
    flops = 2.0 * 4 * rows * shape.prompt_length * shape.head_dim
    return Launch(
        kernel("partial_sums", shape.head_dim, chip.arch, mask_of(shape)),
        (Loop(3 * ITEM * tile.block_m * shape.head_dim, from_dram=True),), trips * columns, flops, moved,
    )  # fmt: skip


def add_partials(shape: Shape, chip: Chip) -> Launch:
    """The second stage, by its bytes alone: its loops hold no products."""
    parts = launch.num_parts(up(shape.seqlen_q, 64), shape.batch * shape.heads_q)
    blocks = up(shape.prompt_length * shape.head_dim, 128) * shape.heads_kv
    return Launch(
        kernel("add_partials", shape.head_dim, chip.arch, mask_of(shape)), (), [()] * blocks, 0.0,
        _partials(shape, parts),
    )  # fmt: skip


def decode(
    shape: Shape, chip: Chip, config: configs.Config | None = None, splits: int | None = None
) -> Launch:
    """One new token in each sequence, against seqlen_k keys, head-major; splits: another number than the chosen one."""
    tile = config or tile_of("decode", shape, chip)
    rows = shape.heads_q // shape.heads_kv
    columns = shape.heads_kv * shape.batch
    programs = up(rows, tile.block_m) * columns
    splits = splits or splits_of(shape, chip, tile)
    share = up(up(shape.seqlen_k, tile.block_n), splits) * tile.block_n
    full_last = shape.seqlen_k // tile.block_n * tile.block_n
    one = []
    for split in range(splits):
        first, last = split * share, (split + 1) * share
        full = max(0, min(last, full_last) - first) // tile.block_n
        cut = max(0, min(last, shape.seqlen_k) - max(first, full_last))
        one.append((up(cut, tile.block_n), full))
    moved = shape.cache_bytes(ITEM) + (splits > 1) * _split_bytes(shape, splits)
    loop = Loop(2 * ITEM * tile.block_n * shape.head_dim, from_dram=True)
    return Launch(
        kernel("decode", shape.head_dim, chip.arch, "causal", tile), (loop,) * 2, one * programs,
        shape.flops("decode"), moved,
    )  # fmt: skip


def combine(shape: Shape, chip: Chip, splits: int | None = None) -> Launch:
    """The results of the splits, some of them together in each iteration."""
    tile = tile_of("combine", shape, chip)
    splits = splits or splits_of(shape, chip, tile_of("decode", shape, chip))
    group = shape.heads_q // shape.heads_kv
    blocks = up(group, tile.block_m) * shape.heads_kv * shape.batch
    together = decode_kernels.splits_together(shape.head_dim, 8 * ITEM)
    loop = Loop(4 * together * min(group, tile.block_m) * shape.head_dim)
    return Launch(
        kernel("combine", shape.head_dim, chip.arch, "causal"), (loop,), [(up(splits, together),)] * blocks, 0.0,
        _split_bytes(shape, splits),
    )  # fmt: skip


def splits_of(shape: Shape, chip: Chip, tile: configs.Config) -> int:
    rows = shape.heads_q // shape.heads_kv
    programs = up(rows, tile.block_m) * shape.heads_kv * shape.batch
    together = decode_kernels.splits_together(shape.head_dim, 8 * ITEM)
    return launch.choose_splits(programs, up(shape.seqlen_k, tile.block_n), chip.multiprocessors, together)


def _query_tiles(shape: Shape, tile: configs.Config) -> list[Trips]:
    """Of the blocks of one head: under a causal mask the last queries come first."""
    starts = range(0, shape.seqlen_q, tile.block_m)
    behind = shape.seqlen_k - shape.seqlen_q
    return [
        visible_tiles(start + behind, shape.seqlen_k, shape.causal, tile.block_m, tile.block_n)
        for start in (reversed(starts) if shape.causal else starts)
    ]


def _keys_of(shape: Shape, tile: configs.Config) -> Loop:
    return Loop(2 * ITEM * tile.block_n * shape.head_dim)


def _key_rows(shape: Shape) -> int:
    """Of keys and values together."""
    return 2 * shape.batch * shape.heads_kv * shape.seqlen_k


def _product(shape: Shape) -> float:
    """Useful operations of one product of a query, or a score, with every key that is seen; without the prompts."""
    return (
        2.0
        * shape.batch
        * shape.heads_q
        * shape.head_dim
        * (shape.pairs - shape.seqlen_q * shape.prompt_length)
    )


def _partials(shape: Shape, parts: int) -> float:
    """Bytes of the float32 partial sums of dpk and dpv."""
    return 2.0 * 4 * shape.batch * shape.heads_q * parts * shape.prompt_length * shape.head_dim


def _split_bytes(shape: Shape, splits: int) -> float:
    return 4.0 * splits * shape.batch * shape.heads_q * shape.head_dim


# mode of a benchmark -> its launches
CALLS: dict[str, tuple[Callable[[Shape, Chip], Launch], ...]] = {
    "forward": (forward,),
    "backward": (partial_sums, add_partials, grad_key_value, grad_query),
    "decode": (decode, combine),
}


def launches(mode: str, shape: Shape, chip: Chip) -> list[Launch]:
    """Those of a call in the order in which they run."""
    found = [make(shape, chip) for make in CALLS[mode]]
    if mode == "decode" and splits_of(shape, chip, tile_of("decode", shape, chip)) == 1:
        return found[:1]
    return found
