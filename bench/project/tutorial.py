"""The model against published measurements: Triton's fused-attention tutorial, compiled here and sent through it.

The file is not part of this project: it is `python/tutorials/06-fused-attention.py` of github.com/triton-lang/triton
(of July 2025 or later), and the user gives its path. Its forward kernel is compiled for the chip with each tile that
its own search offered when the figures were made, and the fastest projection counts, as its autotuner would have it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..ledger import BenchError
from . import machine_code
from .chips import Chip
from .compiled import ALIGNED
from .model import Kernel, Launch, Loop, occupancy, product_loops, project

TOLERANCE = 0.15


class Tile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Series(NamedTuple):
    """Figures of one source; rates: T -> TFLOP/s. tiles: of those that its search offered."""

    source: str
    chip: str
    head_dim: int
    causal: bool
    columns: int  # heads of all sequences together; 0: as many as make 16384 tokens of 2048 dimensions
    rates: dict[int, float]
    tiles: tuple[Tile, ...]


# In July 2024 the tutorial tried 32 and 64 keys, 3, 4 and 7 stages; a year later 128 keys and 2 stages too.
OF_2024 = (
    Tile(128, 64, 4, 3),
    Tile(128, 32, 4, 3),
    Tile(128, 32, 4, 4),
    Tile(64, 64, 4, 3),
    Tile(64, 32, 4, 3),
)
OF_2025 = (*OF_2024, Tile(128, 64, 4, 2), Tile(128, 128, 8, 2), Tile(64, 128, 4, 2))
OF_A100 = (
    Tile(128, 64, 4, 3),
    Tile(128, 64, 4, 4),
    Tile(128, 32, 4, 3),
    Tile(128, 64, 8, 3),
    Tile(64, 64, 4, 3),
)
FLASH3 = "flash-attention, assets/flash3_fp16_fwd.png, July 2024"
TLX = "facebookexperimental/triton, pull request 205, July 2025"
# It names no chip. Its speeds in 8 and 16 bits are the same, as on A100, and Triton's documentation was made on one.
DOCS = "triton-lang.org, Fused Attention, 2025"
# Left out of the first source: T 512 and 1024. With 0.22 to 0.25 ms they took the same time, though one is twice the
# work of the other: that is the host's time.
SERIES = (
    Series(FLASH3, "h100", 64, True, 0, {2048: 342, 4096: 363, 8192: 376, 16384: 363}, OF_2024),
    Series(FLASH3, "h100", 128, True, 0, {2048: 323, 4096: 353, 8192: 369, 16384: 378}, OF_2024),
    Series(TLX, "h100", 128, False, 128, {1024: 407, 2048: 428, 4096: 460, 8192: 464, 16384: 487}, OF_2025),
    Series(DOCS, "a100", 64, True, 128, {1024: 112, 2048: 136, 4096: 150, 8192: 160, 16384: 164}, OF_A100),
    Series(DOCS, "a100", 64, False, 128, {1024: 141, 2048: 160, 4096: 161, 8192: 163, 16384: 167}, OF_A100),
)


class Check(NamedTuple):
    """A published figure and the projection, in TFLOP/s."""

    series: Series
    seqlen: int
    projected: float
    tile: Tile

    @property
    def error(self) -> float:
        return self.projected / self.series.rates[self.seqlen] - 1


def load(path: Path) -> ModuleType:
    """Imports the tutorial as if there were a GPU; nothing of it runs."""
    specification = importlib.util.spec_from_file_location("fused_attention_tutorial", path)
    if specification is None or specification.loader is None or not path.is_file():
        raise BenchError(f"{path} is not a Python file: give the path of Triton's 06-fused-attention.py.")
    module = importlib.util.module_from_spec(specification)
    driver = SimpleNamespace(
        get_active_torch_device=lambda: torch.device("cpu"),
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    capability = mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with mock.patch.object(triton.runtime.driver, "_active", driver), capability:
        try:
            specification.loader.exec_module(module)
        except Exception as error:
            raise BenchError(f"{path} cannot be imported: {type(error).__name__}: {error}.") from error
    wanted = {"sm_scale", "desc_q", "desc_k", "desc_v", "desc_o", "N_CTX", "STAGE"}
    kernel = getattr(getattr(module, "_attn_fwd", None), "fn", None)
    if kernel is None or not wanted <= set(kernel.arg_names):
        raise BenchError(
            f"{path} has no _attn_fwd with tensor descriptors: take 06-fused-attention.py of July 2025 or later."
        )
    return module


def compile_forward(module: ModuleType, head_dim: int, causal: bool, tile: Tile, arch: int) -> Kernel:
    """With bulk copies on Hopper; before it the kernel takes pointers."""
    kernel = module._attn_fwd.fn
    is_hopper = arch // 10 == 9
    queries, keys = (f"tensordesc<fp16[{rows}, {head_dim}]>" if is_hopper else "*fp16" for rows in tile[:2])
    types = {
        "sm_scale": "fp32", "M": "*fp32", "Z": "i32", "H": "i32", "N_CTX": "i32", "desc_q": queries, "desc_o": queries,
        "desc_k": keys, "desc_v": keys,
    }  # fmt: skip
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "FP8_OUTPUT": False,
        "STAGE": 3 if causal else 1, "warp_specialize": False, "IS_HOPPER": is_hopper,
    }  # fmt: skip
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    values = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
    aligned = {"M", "H", "N_CTX"} | {name for name in types if types[name] == "*fp16"}
    attributes: dict[Any, Any] = {(i,): ALIGNED for i, name in enumerate(names) if name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    code = machine_code.disassemble(compiled.asm["cubin"])
    loops = tuple(range(len(product_loops(code))))
    return Kernel("tutorial", code, tile.num_warps, compiled.metadata.shared, loops)


def columns_of(series: Series, seqlen: int) -> int:
    """Heads of all sequences together."""
    return series.columns or 16384 // seqlen * (2048 // series.head_dim)


def launch_of(kernel: Kernel, series: Series, seqlen: int, tile: Tile) -> Launch:
    """The first loop takes the keys before the diagonal, the second one those at it; the first queries come first."""
    columns = columns_of(series, seqlen)
    one: list[tuple[int, ...]] = []
    for start in range(0, seqlen, tile.block_m):
        if series.causal:
            before, at = start // tile.block_n, tile.block_m // tile.block_n
            one.append(
                (before, at) if len(kernel.loops) == 2 else (before + at,)
            )  # one masked tile is no loop
        else:
            one.append((seqlen // tile.block_n,))
    flops = 4.0 * columns * seqlen**2 * series.head_dim * (0.5 if series.causal else 1)
    loop = Loop(4.0 * tile.block_n * series.head_dim)
    moved = 8.0 * columns * seqlen * series.head_dim
    return Launch(kernel, (loop,) * len(kernel.loops), one * columns, flops, moved)


def checks(path: Path, chips: Mapping[str, Chip]) -> list[Check]:
    """Of each published figure the projection of the fastest tile."""
    module = load(path)
    found = []
    for series in SERIES:
        tiles = [
            tile for tile in series.tiles
            if tile.block_n <= series.head_dim and not (series.causal and tile.block_n > tile.block_m)
        ]  # fmt: skip
        chip = chips[series.chip]
        kernels = {
            tile: compile_forward(module, series.head_dim, series.causal, tile, chip.arch) for tile in tiles
        }
        for seqlen in series.rates:
            rates = {}
            for tile, kernel in kernels.items():
                if not occupancy(kernel, chip):
                    continue
                launch = launch_of(kernel, series, seqlen, tile)
                rates[tile] = launch.flops / project(launch, chip).seconds / 1e12
            best = max(rates, key=lambda tile: rates[tile])
            found.append(Check(series, seqlen, rates[best], best))
    return found
