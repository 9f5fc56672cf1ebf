"""Tile sizes, written down per chip: a first call compiles one kernel and never stalls for minutes of timing.

A choice is a pure function of the stage, the head dimension, the element size, the prompt length and the chip. The
tables hold what compiles without spills at head dimensions up to 128 under every Triton that is tested
(tests/backends/test_triton.py checks); no GPU has timed them yet. Where a choice would not fit the shared memory,
and in the interpreter, the safe one runs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class Config(NamedTuple):
    """block_m queries (of `decode` and `combine`: rows of one group), block_n keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int = 0  # 0: as many as the compiler likes


SAFE = Config(32, 32, 4, 1)
# float32 runs on the CUDA cores (TF32 would round the inputs to 10 bits), its operands in registers: without spills at
# head dimensions up to 128. At 256 the safe tile had 51,000 of them, and took 47 s to compile instead of 8.
FLOAT32 = Config(16, 32, 8, 1)

BACKWARD_PROMPTS = ("grad_query", "prompt_gradients")  # stages that hold both prompt tables at once

# bytes of shared memory one block may use: A100 163 KB, RTX 30 / 40 and Blackwell RTX 99 KB, H100 and B200 227 KB
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
SMALLEST_SHARED_MEMORY = 101376

# (stage, head dimension rounded up to a power of two, at least 64) of two-byte elements
_SM80 = {
    ("forward", 64): Config(128, 64, 8, 3),
    ("forward", 128): Config(128, 32, 8, 3),
    ("forward", 256): Config(64, 32, 4, 2),
    ("grad_key_value", 64): Config(64, 64, 4, 2),
    ("grad_key_value", 128): Config(64, 64, 8, 2),
    ("grad_key_value", 256): Config(32, 32, 8, 1),
    ("grad_query", 64): Config(128, 64, 8, 2),
    ("grad_query", 128): Config(128, 16, 8, 3),
    ("grad_query", 256): Config(32, 32, 8, 1),
    ("prompt_gradients", 64): Config(64, 64, 4, 1),
    ("prompt_gradients", 128): Config(64, 64, 4, 1),
    ("prompt_gradients", 256): Config(32, 32, 4, 1),
    ("decode", 64): Config(16, 64, 4, 3),
    ("decode", 128): Config(16, 32, 4, 4),
    ("decode", 256): Config(16, 32, 4, 3),
    ("extend", 64): Config(16, 64, 4, 3),
    ("extend", 128): Config(16, 32, 4, 4, 168),
    ("extend", 256): Config(16, 32, 4, 3),
    ("combine", 64): Config(16, 1, 4, 1),
    ("combine", 128): Config(16, 1, 8, 1),
    ("combine", 256): Config(16, 1, 8, 1),
}
_SM90 = _SM80 | {
    ("forward", 64): Config(128, 128, 8, 3),
    ("forward", 128): Config(128, 64, 8, 3),
    ("forward", 256): Config(128, 64, 8, 2),
    ("grad_key_value", 64): Config(64, 128, 8, 2),
    ("grad_key_value", 128): Config(32, 128, 8, 2),
    # At most 128 registers, so two blocks fit a multiprocessor, and one computes while the other waits. Projected
    # (bench project): 17 to 31 % less time than 64 keys in two stages.
    ("grad_query", 64): Config(128, 32, 8, 3),
    ("grad_query", 128): Config(128, 64, 8, 2),
    ("grad_query", 256): Config(128, 32, 8, 2),
}
_SM100 = _SM90 | {
    ("grad_key_value", 256): Config(64, 64, 8, 1),
    ("grad_query", 64): Config(128, 64, 8, 3),
    ("grad_query", 128): Config(64, 64, 4, 2),
    ("grad_query", 256): Config(64, 32, 8, 1),
}


# What the compiler takes where the estimate is too high by so much that a chip with 99 KB would get the safe tile. Of
# stages that read no prompts, at two bytes an element: (stage, head dimension, tile) -> bytes.
_COMPILED = {("grad_key_value", 128, Config(64, 64, 8, 2)): 74240}

# What ZINIT_AUTOTUNE=1 times beside the written choice, whatever the head dimension; what does not fit is left out.
_TRIED = {
    "forward": (
        Config(128, 64, 4, 3), Config(128, 64, 8, 3), Config(128, 128, 8, 2), Config(128, 32, 8, 3),
        Config(64, 64, 4, 3), Config(64, 128, 4, 2), Config(64, 32, 4, 2),
    ),
    "grad_key_value": (
        Config(64, 64, 4, 2), Config(64, 64, 4, 3), Config(64, 64, 8, 2), Config(32, 128, 8, 2),
        Config(64, 128, 8, 2), Config(32, 64, 4, 2), Config(128, 128, 8, 1), Config(32, 32, 4, 1),
    ),
    "grad_query": (
        Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(128, 32, 8, 2), Config(128, 32, 8, 3),
        Config(64, 128, 8, 2), Config(64, 32, 4, 2), Config(128, 128, 8, 1), Config(32, 32, 4, 1),
    ),
    "prompt_gradients": (Config(64, 64, 8, 1), Config(128, 64, 8, 1), Config(32, 32, 4, 1), Config(64, 64, 4, 2)),
    "decode": (
        Config(16, 64, 4, 2), Config(16, 64, 4, 4), Config(16, 128, 4, 2), Config(16, 128, 8, 2),
        Config(16, 32, 4, 4), Config(32, 64, 4, 2), Config(64, 64, 4, 2),
    ),
    "extend": (
        Config(16, 64, 4, 2), Config(16, 64, 4, 4), Config(16, 128, 4, 2), Config(16, 128, 8, 2),
        Config(16, 32, 4, 4), Config(32, 64, 4, 2), Config(64, 64, 4, 2),
    ),
    "combine": (),
}  # fmt: skip


def choose(stage: str, block_d: int, block_p: int, itemsize: int, arch: int) -> Config:
    """The configuration of a call.

    block_d, block_p: padded sizes; itemsize: bytes of an element; arch: 10 * major + minor, 0 = the interpreter.
    """
    if arch == 0:
        return safe(stage)
    if itemsize > 2:
        return FLOAT32
    table = _SM100 if 100 <= arch < 120 else _SM90 if 90 <= arch < 100 else _SM80
    config = table[stage, max(block_d, 64)]
    return config if _fits(stage, config, block_d, block_p, itemsize, arch) else safe(stage)


@lru_cache(maxsize=1024)
def candidates(stage: str, block_d: int, block_p: int, itemsize: int, arch: int) -> tuple[Config, ...]:
    """`choose`'s configuration, and after it up to seven others that fit the shared memory of the chip."""
    choice = choose(stage, block_d, block_p, itemsize, arch)
    if choice in (safe(stage), FLOAT32):
        return (choice,)
    others = (c for c in _TRIED[stage] if _fits(stage, c, block_d, block_p, itemsize, arch) and c != choice)
    return (choice, *others)[:8]


def find_why_too_large(
    head_dim: int, prompt_length: int, itemsize: int, arch: int, cached: bool, backward: bool
) -> str:
    """Where the prompts alone leave a stage no tile that fits the chip's shared memory; '' where all do."""
    block_d, block_p = block_of(head_dim), block_of(prompt_length)
    stages = ("decode", "extend", "combine") if cached else ("forward", *BACKWARD_PROMPTS * backward)
    for stage in stages:
        config = choose(stage, block_d, block_p, itemsize, arch)
        if arch and not _fits(stage, config, block_d, block_p, itemsize, arch):
            needed = shared_memory(stage, config, block_d, block_p, itemsize)
            return (
                f"{prompt_length} prompts of {head_dim} dimensions in {itemsize} bytes each take {needed >> 10} KB of "
                f"shared memory, and sm_{arch} has {SHARED_MEMORY.get(arch, SMALLEST_SHARED_MEMORY) >> 10}: fewer "
                "prompts, or two-byte elements"
            )
    return ""


# It is asked at every call, and takes a fifth of the time before the launch. torch.compile warns of such a cache.
why_too_large = lru_cache(maxsize=1024)(find_why_too_large)


def block_of(size: int) -> int:
    """The power of two that holds `size`, at least what one tensor core product takes."""
    return max(16, 1 << (size - 1).bit_length())


def _fits(stage: str, config: Config, block_d: int, block_p: int, itemsize: int, arch: int) -> bool:
    budget = SHARED_MEMORY.get(arch, SMALLEST_SHARED_MEMORY)
    return shared_memory(stage, config, block_d, block_p, itemsize) <= budget


def safe(stage: str) -> Config:
    return SAFE._replace(block_m=16) if stage in ("decode", "extend", "combine") else SAFE


def shared_memory(stage: str, config: Config, block_d: int, block_p: int, itemsize: int) -> int:
    """An estimate in bytes, or what was compiled; the tests look at what the compiler really takes.

    The resident tiles and num_stages of the streamed ones in the loop, the prompt block afterwards. `decode` and
    `extend` hold one streamed tile less, since the copies into the last one begin when its products are done: with one
    more, the tiles of 256 dimensions would not fit 99 KB, where they take 73.
    """
    if itemsize == 2 and (compiled := _COMPILED.get((stage, block_d, config))):
        return compiled
    block_m, block_n, stages = config.block_m, config.block_n, config.num_stages
    stages = max(stages - (stage in ("decode", "extend")), 1)
    resident, streamed, square = {
        "forward": (block_m, 2 * block_n, block_m * block_n),
        "decode": (block_m, 2 * block_n, block_m * block_n),
        "extend": (block_m, 2 * block_n, block_m * block_n),
        "combine": (block_m, 0, 0),
        "grad_query": (2 * block_m, 2 * block_n, block_m * block_n),
        "grad_key_value": (2 * block_n, 2 * block_m, 2 * block_m * block_n),
        "prompt_gradients": (2 * block_m, 0, 2 * block_m * block_p),
    }[stage]
    tables = 2 if stage in BACKWARD_PROMPTS else 1  # forward reads the values when the keys have been used
    loop = (resident + stages * streamed) * block_d * itemsize + square * itemsize
    prompt = (resident + tables * block_p) * block_d * itemsize + block_m * block_p * itemsize
    return max(loop, prompt)
