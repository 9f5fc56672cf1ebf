"""From a kernel's machine code and a shape to a projected time.

A multiprocessor's time comes from `schedule`: the cycles of one iteration of each loop with as many blocks as fit, and
once through the code outside the loops. Blocks are dealt to multiprocessors in their order, each to the first that has
room. Loads overlap with arithmetic, since they are asynchronous copies some tiles ahead: an iteration takes the longer
of its schedule and its bytes from L2, and a launch the longer of its multiprocessors' time and its bytes from DRAM.
"""

from __future__ import annotations

import collections
import heapq
import re
from collections.abc import Sequence
from typing import NamedTuple

from . import machine_code, schedule
from .chips import COPY_SHARE, LAUNCH_SECONDS, RESERVED_SHARED_MEMORY, Chip
from .machine_code import Code, Instruction

L2_PORT = 64  # bytes per cycle that one multiprocessor can read
BLOCK_START = 500  # cycles until the first instruction of a block, with its parameters fetched
LOADED = 1.5  # latency of memory under load, over that without
# Measured cycles over modelled ones: misses of the instruction cache, conflicts of register banks, warps that meet at
# the same unit more often than here. Fitted to the published figures of H100 in `tutorial`.
UNMODELLED = 1.07


class Kernel(NamedTuple):
    """A compiled kernel; loops: those of its loops with products that run, by their place in the code."""

    name: str
    code: Code
    warps: int
    shared: int  # bytes of a block
    loops: tuple[int, ...]


class Loop(NamedTuple):
    """bytes: what a block reads from L2 in one iteration; from_dram: whether they are in no cache."""

    bytes: float
    from_dram: bool = False


class Launch(NamedTuple):
    """A kernel at a shape. trips: of each block in order of its number, how often it runs each loop of its kernel."""

    kernel: Kernel
    loops: tuple[Loop, ...]
    trips: Sequence[tuple[int, ...]]
    flops: float  # useful ones, as benchmarks count them
    dram_bytes: float


class Projection(NamedTuple):
    """seconds: of the launch. bounds: seconds that each unit alone would take. blocks: on a multiprocessor."""

    seconds: float
    bounds: dict[str, float]
    blocks: int
    clock: float

    @property
    def busiest(self) -> str:
        """The unit that would take the longest alone."""
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def bound(self) -> str:
        """The busiest unit, or "dependencies" where it idles for more than 15 % of the time."""
        return self.busiest if self.bounds[self.busiest] > 0.85 * self.seconds else "dependencies"


def occupancy(kernel: Kernel, chip: Chip) -> int:
    """Blocks of a kernel on one multiprocessor at a time; 0: not one fits."""
    registers = -(-kernel.code.registers // 8) * 8 * 32 * kernel.warps  # a warp gets them in units of 256
    return min(
        chip.registers // registers,
        chip.shared_memory // (kernel.shared + RESERVED_SHARED_MEMORY),
        chip.threads // (32 * kernel.warps),
        chip.blocks,
    )


def product_loops(code: Code) -> list[list[Instruction]]:
    """The innermost loops that hold products; all innermost loops where none does."""
    found = machine_code.loops(code.instructions)
    return [loop for loop in found if any(map(machine_code.is_product, loop))] or found


def straight_code(kernel: Kernel) -> list[Instruction]:
    """What a block runs once: all but its loops, and but what a branch skips that stands before a loop not run."""
    every = machine_code.loops(kernel.code.instructions)
    spans = [(loop[0].address, loop[-1].address) for loop in every]
    with_products = [(loop[0].address, loop[-1].address) for loop in product_loops(kernel.code)]
    runs = [with_products[which] for which in kernel.loops]
    skipped = list(spans)
    for instruction in kernel.code.instructions:
        target = re.search(r"0x([0-9a-f]+)\)?$", instruction.operands)
        if instruction.kind == "BRA" and target and instruction.guard:
            inside = (instruction.address + 1, int(target[1], 16) - 1)
            over = [span for span in spans if inside[0] <= span[0] and span[1] <= inside[1]]
            if over and not set(over) & set(runs):
                skipped.append(inside)
    code = kernel.code.instructions
    end = next((i for i, instruction in enumerate(code) if _ends(instruction, code[i:])), len(code))
    return [i for i in code[: end + 1] if not any(first <= i.address <= last for first, last in skipped)]


def _ends(instruction: Instruction, rest: Sequence[Instruction]) -> bool:
    return (
        instruction.kind == "EXIT" and not instruction.guard and not any(map(machine_code.is_product, rest))
    )


def project(launch: Launch, chip: Chip) -> Projection:
    """The time of one launch."""
    kernel = launch.kernel
    resident = occupancy(kernel, chip)
    if resident == 0:
        raise ValueError(f"{kernel.name} does not fit a multiprocessor of {chip.name}")
    per_processor = min(resident, -(-len(launch.trips) // chip.multiprocessors))
    warps = max(1, kernel.warps // schedule.SCHEDULERS)
    found = product_loops(kernel.code)
    loops = [found[which] for which in kernel.loops]
    once = straight_code(kernel)

    def iteration(which: int, blocks: int) -> float:
        loop = launch.loops[which]
        wait = LOADED * (chip.dram_latency if loop.from_dram else chip.l2_latency)
        in_turn = schedule.cycles_per_iteration(loops[which], chip, warps, blocks, wait)
        # with fewer blocks on each multiprocessor than fit, it is the end of the launch: most of the others are idle
        share = chip.l2_bytes_per_cycle if blocks == per_processor else L2_PORT
        return max(in_turn, blocks * loop.bytes / share)

    iterations = {n: [iteration(which, n) for which in range(len(loops))] for n in {1, per_processor}}
    latency = LOADED * chip.dram_latency
    start = BLOCK_START + _cycles_once(once, loops, chip, warps)
    slow, fast = iterations[per_processor], iterations[1]

    def of_block(trips: tuple[int, ...], each: list[float]) -> float:
        """A loop's first tiles are asked for just before it, so it begins with a wait for memory."""
        return start + sum(latency + n * cycles for n, cycles in zip(trips, each, strict=True) if n)

    work = [of_block(trips, slow) for trips in launch.trips]
    # a block that is alone on its multiprocessor is faster than beside others
    most = max(launch.trips, key=sum)
    speedup = of_block(most, slow) / of_block(most, fast)
    cycles = UNMODELLED * deal(work, chip.multiprocessors, per_processor, speedup)

    units = _units(launch, loops, once, chip, warps)
    clock = chip.clock * (1 - (1 - chip.loaded_clock) * min(1.0, units["tensor"] / cycles))
    dram = launch.dram_bytes / (chip.dram_bandwidth * COPY_SHARE)
    bounds = {name: count / clock for name, count in units.items()} | {"DRAM": dram}
    return Projection(max(cycles / clock, dram) + LAUNCH_SECONDS, bounds, per_processor, clock)


def _cycles_once(
    once: Sequence[Instruction], loops: Sequence[Sequence[Instruction]], chip: Chip, warps: int
) -> float:
    """Of the code outside the loops. What it loads behind the first loop are small tables, which are in L2."""
    first_loop = min((loop[0].address for loop in loops), default=once[-1].address + 1)
    before = [instruction for instruction in once if instruction.address < first_loop]
    behind = [instruction for instruction in once if instruction.address > first_loop]
    return sum(
        schedule.cycles(code, chip, warps, 1, 1, LOADED * latency, is_loop=False)
        for code, latency in ((before, chip.dram_latency), (behind, chip.l2_latency))
        if code
    )


def deal(work: Sequence[float], processors: int, together: int, speedup_alone: float) -> float:
    """Cycles until all blocks have run: each goes to the first multiprocessor with room, in order.

    work: cycles of a block beside `together - 1` others. With fewer others it is faster, in proportion up to
    `speedup_alone` where it is alone.
    """
    speed = [1 + (speedup_alone - 1) * (together - n) / max(together - 1, 1) for n in range(1, together + 1)]
    waiting = iter(work)
    running: list[list[float]] = [[] for _ in range(processors)]
    since = [0.0] * processors
    events: list[tuple[float, int, int]] = []
    version = [0] * processors

    def expect(which: int, now: float) -> None:
        since[which] = now
        version[which] += 1
        if running[which]:
            rate = speed[len(running[which]) - 1]
            heapq.heappush(events, (now + min(running[which]) / rate, which, version[which]))

    for place in range(together):
        for which in range(processors):
            if (block := next(waiting, None)) is not None:
                # a little apart: if all ended at one moment, the first multiprocessor would take several of the last
                running[which].append(block + 100.0 * place)
    for which in range(processors):
        expect(which, 0.0)
    now = 0.0
    while events:
        at, which, expected = heapq.heappop(events)
        if expected != version[which]:
            continue
        now = at
        done = (at - since[which]) * speed[len(running[which]) - 1]
        running[which] = [left - done for left in running[which] if left - done > 1e-6]
        while len(running[which]) < together and (block := next(waiting, None)) is not None:
            running[which].append(block)
        expect(which, now)
    return now


def _units(
    launch: Launch,
    loops: Sequence[Sequence[Instruction]],
    once: Sequence[Instruction],
    chip: Chip,
    warps: int,
) -> dict[str, float]:
    """Cycles that each unit of a multiprocessor is busy, over the whole launch."""
    totals = [sum(trips[which] for trips in launch.trips) for which in range(len(loops))]
    units: dict[str, float] = collections.Counter()
    for code, times in [*zip(loops, totals, strict=True), (once, len(launch.trips))]:
        for name, cycles in unit_cycles(code, chip).items():
            units[name] += cycles * times * warps / chip.multiprocessors
    bytes_read = sum(times * loop.bytes for times, loop in zip(totals, launch.loops, strict=True))
    units["L2"] = bytes_read / chip.l2_bytes_per_cycle / chip.multiprocessors
    return dict(units)


def unit_cycles(code: Sequence[Instruction], chip: Chip) -> dict[str, float]:
    """Cycles of each unit for one warp of each scheduler: tensor, issue, fma, alu, special (exponentials), shared."""
    units = dict.fromkeys(("tensor", "issue", "fma", "alu", "special", "shared"), 0.0)
    for instruction in code:
        units["issue"] += 1
        pipe = schedule.pipe_of(instruction)
        if pipe in units and not schedule.is_off(instruction):
            units[pipe] += schedule.busy_cycles(instruction, chip)
    return units
