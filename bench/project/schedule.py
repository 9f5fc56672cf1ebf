"""How many cycles a multiprocessor takes for a loop of machine code, with several blocks on it.

The model follows one of the four schedulers and its warps; the other three do the same. An instruction is issued when
its warp's stall is over, the scoreboards that it waits for are clear, and its pipe is free. A scheduler issues one per
cycle. ptxas wrote the stalls and scoreboards into the code (`machine_code`), the pipes' rates belong to the chip
(`chips`), and the latencies below come from published microbenchmarks. The products of warpgroups run beside
everything else, one after another, until the warp waits for them.

A roofline leaves this out: a warp cannot exponentiate scores before their product has ended.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from .chips import Chip
from .machine_code import Instruction

SCHEDULERS = 4
# Cycles from issue to result. Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via
# Microbenchmarking", arXiv:2402.13499; Abdelkhalik et al., arXiv:2208.11174 (A100).
LATENCY = {"MUFU": 23, "LDS": 29, "LDSM": 33, "SHFL": 24, "HMMA": 33, "HGMMA": 32, "S2R": 25, "R2UR": 12}
OTHER_LATENCY = 14
READ_OPERANDS = 10  # until a load or store has read its registers
BARRIER = 15
PASS_BYTES = 128  # what shared memory hands over per cycle

FMA = {"FFMA", "FMUL", "FADD", "FFMA2", "HFMA2", "HADD2", "HMUL2"}
INTEGER_MULTIPLY = {"IMAD"}
SPECIAL = {"MUFU", "F2I", "I2F", "F2F"}
SHARED = {"LDS", "STS", "LDSM", "STSM", "SHFL", "LDGSTS", "ATOMS"}
GLOBAL = {"LDG", "STG", "LD", "ST", "LDL", "STL", "RED", "ATOM", "ATOMG"}
CONTROL = {
    "BRA", "BAR", "WARPGROUP", "DEPBAR", "LDGDEPBAR", "SYNCS", "EXIT", "NOP", "BSSY", "BSYNC", "MEMBAR", "FENCE",
    "WARPSYNC", "UTMALDG", "UTMASTG", "ELECT", "YIELD", "ERRBAR", "CCTL", "NANOSLEEP",
}  # fmt: skip


def pipe_of(instruction: Instruction) -> str:
    """tensor, fma, special, shared, global, control, uniform, or alu for all else."""
    kind = instruction.kind
    if kind in ("HMMA", "HGMMA"):
        return "tensor"
    for pipe, kinds in (
        ("fma", FMA | INTEGER_MULTIPLY),
        ("special", SPECIAL),
        ("shared", SHARED),
        ("global", GLOBAL),
    ):
        if kind in kinds:
            return pipe
    if kind in CONTROL:
        return "control"
    return "uniform" if kind.startswith("U") or kind == "R2UR" or kind == "VOTEU" else "alu"


def is_off(instruction: Instruction) -> bool:
    """Guarded by a constant false: it is issued and does nothing."""
    return instruction.guard == "@!PT"


def passes(instruction: Instruction) -> float:
    """Passes over shared memory that an instruction of a warp takes where no bank conflicts with another."""
    name = instruction.name
    if is_off(instruction):
        return 0.0
    if instruction.kind in ("LDSM", "STSM"):
        matrices = name.rpartition(".")[2]  # of 8 x 8; LDSM.16.M88.4 moves four
        return float(matrices) if matrices in ("2", "4") else 1.0
    if instruction.kind in ("LDS", "STS", "LDGSTS"):
        return 4.0 if ".128" in name else 2.0 if ".64" in name else 1.0
    return 1.0 if instruction.kind in ("SHFL", "ATOMS") else 0.0


def product_cycles(instruction: Instruction, chip: Chip) -> float:
    """How long a product keeps the tensor core of its scheduler busy."""
    shape = re.match(r"\w+\.(\d+)x(\d+)x(\d+)", instruction.name)
    if shape:  # of a warpgroup: 64 rows, 16 of which are this scheduler's
        m, n, k = map(int, shape.groups())
        busy = 2 * m * n * k / chip.tensor_flops_per_cycle
        from_registers = re.match(r"R\d+, R\d+", instruction.operands) is not None
        bytes_read = 2 * n * k + (0 if from_registers else 2 * m * k)
        return max(busy, bytes_read / PASS_BYTES)
    found = re.match(r"HMMA\.(\d+)", instruction.name)
    flops = 4096 if not found or found[1] == "16816" else 2048
    return flops * SCHEDULERS / (chip.tensor_flops_per_cycle * chip.mma_share)


@dataclass(eq=False)
class Warp:
    number: int
    block: int
    at: int = 0
    time: float = 0.0  # from when its next instruction may be issued
    clear: list[float] = field(default_factory=lambda: [0.0] * 6)  # when each scoreboard is clear
    products: list[float] = field(default_factory=list)  # ends of the committed groups of products
    last_product: float = 0.0
    copies: list[float] = field(default_factory=list)  # ends of the committed groups of copies
    last_copy: float = 0.0
    load: float = 0.0  # when the last bulk copy arrives


def busy_cycles(instruction: Instruction, chip: Chip) -> float:
    """How long an instruction of a warp keeps its pipe, as one scheduler sees it."""
    pipe = pipe_of(instruction)
    if pipe == "tensor":
        return product_cycles(instruction, chip)
    if pipe == "fma":
        return 2.0 if instruction.kind in INTEGER_MULTIPLY else 32 * SCHEDULERS / chip.fma_lanes
    if pipe == "special":
        return 32 * SCHEDULERS / chip.special_lanes
    if pipe == "alu":
        return 32 * SCHEDULERS / chip.alu_lanes
    if pipe == "shared":
        return SCHEDULERS * passes(instruction)
    return 2.0 if pipe in ("global", "uniform") else 1.0


def cycles(
    loop: Sequence[Instruction],
    chip: Chip,
    warps: int,
    blocks: int,
    iterations: int,
    memory_latency: float,
    is_loop: bool = True,
) -> float:
    """Cycles until every warp of `blocks` blocks, `warps` of each on this scheduler, has run the loop so often.

    Asynchronous copies: in a loop cp.async is waited for, and a bulk copy is there when it is wanted, because it was
    asked for some iterations before. Outside loops it is the other way round: what cp.async copies there is for a loop.
    """
    decoded = [_decode(instruction, chip) for instruction in loop]
    everyone = [
        Warp(number, number // warps, time=37.0 * (number // warps)) for number in range(blocks * warps)
    ]
    free = dict.fromkeys(("tensor", "fma", "alu", "special", "shared", "global", "control", "uniform"), 0.0)
    scheduler = 0.0
    waiting: dict[int, list[Warp]] = {block: [] for block in range(blocks)}
    queue = [(warp.time, warp.number) for warp in everyone]
    heapq.heapify(queue)
    length, last = len(decoded), 0.0
    end = length * iterations
    while queue:
        guess, number = heapq.heappop(queue)
        warp = everyone[number]
        op = decoded[warp.at % length]
        ready = max(warp.time, op.earliest(warp))
        if op.pipe != "tensor" or not op.queued:
            ready = max(ready, free[op.pipe])
        ready = max(ready, scheduler)
        if ready > guess:
            heapq.heappush(queue, (ready, number))
            continue
        scheduler = ready + 1
        if op.queued:
            begin = max(ready, free["tensor"])
            free["tensor"] = begin + op.busy
            warp.last_product = begin + op.busy
            if op.commits:
                warp.products.append(warp.last_product + op.latency)
        else:
            free[op.pipe] = max(free[op.pipe], ready) + op.busy
        op.apply(warp, ready, 0.0 if op.kind == "LDGSTS" and not is_loop else memory_latency)
        if op.kind == "UTMALDG" and not is_loop:
            for other in everyone:
                if other.block == warp.block:
                    other.load = ready + memory_latency
        warp.time = ready + op.stall
        warp.at += 1
        last = max(last, warp.time)
        if op.kind == "BAR":
            group = waiting[warp.block]
            group.append(warp)
            if len(group) < warps:
                continue  # the last to come wakes the others
            for other in group:
                other.time = max(other.time, ready + BARRIER)
                if other.at < end:
                    heapq.heappush(queue, (other.time, other.number))
            waiting[warp.block] = []
        elif warp.at < end:
            heapq.heappush(queue, (warp.time, number))
    return max(last, *(max([0.0, *warp.products[-1:]]) for warp in everyone))


@dataclass
class _Op:
    kind: str
    pipe: str
    busy: float
    stall: int
    latency: float
    sets: int | None
    frees: int | None
    waits: list[int]
    queued: bool = False  # a product of a warpgroup
    commits: bool = False
    left: int = 0  # groups that may still be on their way after a wait
    off: bool = False

    def earliest(self, warp: Warp) -> float:
        found = max((warp.clear[which] for which in self.waits), default=0.0)
        if self.kind == "WARPGROUP.DEPBAR":
            done = warp.products[: len(warp.products) - self.left]
            found = max(found, done[-1] if done else 0.0)
        elif self.kind == "DEPBAR":
            done = warp.copies[: len(warp.copies) - self.left]
            found = max(found, done[-1] if done else 0.0)
        elif self.kind == "TRYWAIT":
            found = max(found, warp.load)
        return found

    def apply(self, warp: Warp, now: float, memory_latency: float) -> None:
        latency = self.latency + self.busy
        if self.kind in ("LDG", "LDGSTS", "LD"):
            latency = memory_latency
        if self.kind == "LDGSTS":
            warp.last_copy = now + latency
        elif self.kind == "LDGDEPBAR":
            warp.copies.append(warp.last_copy)
        if self.off:
            latency = 4.0
        if self.sets is not None:
            warp.clear[self.sets] = max(warp.clear[self.sets], now + latency)
        if self.frees is not None:
            warp.clear[self.frees] = max(warp.clear[self.frees], now + READ_OPERANDS + self.busy)


def _decode(instruction: Instruction, chip: Chip) -> _Op:
    kind, pipe = instruction.kind, pipe_of(instruction)
    queued = kind == "HGMMA"
    left = 0
    if kind == "WARPGROUP" and "DEPBAR" in instruction.name or kind == "DEPBAR":
        found = re.search(r", 0x([0-9a-f]+)", instruction.operands)
        left = int(found[1], 16) if found else 0
    if kind == "WARPGROUP" and "DEPBAR" in instruction.name:
        kind = "WARPGROUP.DEPBAR"
    if kind == "SYNCS" and "TRYWAIT" in instruction.name:
        kind = "TRYWAIT"
    return _Op(
        kind, pipe, 1.0 if is_off(instruction) else busy_cycles(instruction, chip), max(instruction.stall, 1),
        LATENCY.get(instruction.kind, OTHER_LATENCY), instruction.sets, instruction.frees,
        [which for which in range(6) if instruction.waits >> which & 1],
        queued, queued and "gsb0" in instruction.operands, left, is_off(instruction),
    )  # fmt: skip


def cycles_per_iteration(
    loop: Sequence[Instruction], chip: Chip, warps: int, blocks: int, memory_latency: float
) -> float:
    """Of all the blocks together, in the long run: the difference of two loop lengths."""
    short, long = (cycles(loop, chip, warps, blocks, n, memory_latency) for n in (6, 18))
    return (long - short) / 12
