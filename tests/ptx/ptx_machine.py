"""Runs PTX on numpy: what nvcc and Triton wrote, inline assembly included.

A lane stands for each thread of a block, and several blocks run side by side. Lanes with the lowest program counter
run first. Reported with the line of the source: accesses outside the registered buffers or misaligned, warp
instructions with lanes elsewhere, races (ptx_memory.py), and products of warpgroups without their fences
(ptx_warpgroup.py).
"""

from __future__ import annotations

import struct

import numpy as np
import ptx_arithmetic
import ptx_matrices
import ptx_memory
import ptx_warpgroup
from ptx_counters import Counters
from ptx_memory import BLOCK, EPOCH, PARAMETERS, SHARED, WARP_EPOCH, Buffers, Fault, Memory
from ptx_module import TYPES, Entry, Instruction

__all__ = ["Buffers", "Fault", "run"]
LANES = 2048  # side by side: numpy's calls cost as much as a few hundred of them
DTYPES = {kind: np.dtype(dtype) for kind, dtype in TYPES.items()}
OPERATIONS = {
    **ptx_arithmetic.OPERATIONS,
    **ptx_memory.OPERATIONS,
    **ptx_matrices.OPERATIONS,
    **ptx_warpgroup.OPERATIONS,
}


def run(
    entry: Entry,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    argument: bytes,
    buffers: Buffers,
    counters: Counters | None = None,
) -> None:
    """One launch of a kernel; argument: the parameters' memory."""
    buffers.new_launch()
    every = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    together = max(1, LANES // threads)
    for first in range(0, len(every), together):
        indices = every[first : first + together]
        Blocks(entry, first, indices, grid, threads, shared, argument, buffers, counters).run()


class Blocks:
    """Blocks that run side by side: registers, control, barriers."""

    def __init__(self, entry, first, indices, grid, threads, shared, argument, buffers, counters=None):
        self.counters = counters
        self.entry, self.threads, self.count, self.first = entry, threads, len(indices), first
        self.lanes = threads * self.count
        self.lane_numbers = np.arange(self.lanes)
        self.block_numbers = self.lane_numbers // threads
        thread = self.lane_numbers % threads
        self.constants: dict[tuple[str, str], np.ndarray] = {}
        undefined = {
            kind: np.full(self.lanes, 0xFF, np.uint8).repeat(DTYPES[kind].itemsize).view(DTYPES[kind])
            for kind in set(entry.registers.values()) - {"pred"}
        }
        undefined["pred"] = np.zeros(self.lanes, bool)
        self.registers = {name: undefined[kind] for name, kind in entry.registers.items()}
        self.registers["%tid.x"] = thread.astype(np.uint32)
        for axis, size in enumerate(grid):
            which = np.array([index[axis] for index in indices], np.uint32)
            self.registers[f"%ctaid.{'xyz'[axis]}"] = which[self.block_numbers]
            self.registers[f"%nctaid.{'xyz'[axis]}"] = np.full(self.lanes, size, np.uint32)
        self.symbols = {name: PARAMETERS + offset for name, offset in entry.parameters.items()}
        self.symbols |= dict.fromkeys(entry.dynamic_shared, SHARED)
        self.counter = np.zeros(self.lanes, int)
        self.waiting, self.done = np.zeros(self.lanes, bool), np.zeros(self.lanes, bool)
        self.epochs = np.zeros(self.count, np.int64)
        self.warp_epochs = np.zeros(self.lanes // 32, np.int64)
        self.warp = self.lane_numbers // 32
        self._thread_tags = (self.block_numbers + first + 1 << BLOCK) | thread
        self._tags: np.ndarray | None = None
        self.memory = Memory(self, shared, argument, buffers)
        self.products = ptx_warpgroup.Products(self)
        self.line, self.whole = "", False
        self.steps = {name: _step_of(name) for name in {instruction.name for instruction in entry.code}}

    def fault(self, message: str) -> None:
        last = f" to {self.first + self.count - 1}" if self.count > 1 else ""
        raise Fault(f"{self.entry.name}, {self.line}: {message} [block {self.first}{last}]")

    def tags(self) -> np.ndarray:
        """Of an access now, by lane; see ptx_memory.py."""
        if self._tags is None:
            self._tags = (
                self._thread_tags
                | self.epochs[self.block_numbers] << EPOCH
                | (self.warp_epochs[self.warp] & 0xFFFF) << WARP_EPOCH
            )
        return self._tags

    # Control

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while not self.done.all():
                active = ~(self.waiting | self.done)
                if not active.all():
                    self._release(active)
                    active = ~(self.waiting | self.done)
                self._run_lowest(active)

    def _release(self, active: np.ndarray) -> None:
        """Lets go the blocks whose threads have all reached the barrier, or ended."""
        waiting = self.waiting.reshape(self.count, -1)
        free = waiting.any(1) & ~active.reshape(self.count, -1).any(1)
        if free.any():
            waiting[free] = False
            self.epochs[free] += 1
            self._tags = None
            self.products.after_barrier(free)

    def _run_lowest(self, active: np.ndarray) -> None:
        """The lanes at the lowest counter, until they part or meet others."""
        at = int(self.counter[active].min())
        mask = active & (self.counter == at)
        others = self.counter[active & ~mask]
        code = self.entry.code
        until = int(others.min()) if others.size else len(code)
        all_of_them = bool(mask.all())
        while at < until:
            instruction = code[at]
            self.line = instruction.line
            chosen, self.whole = mask, all_of_them
            if instruction.guard:
                chosen = mask & (self.registers[instruction.guard] ^ instruction.negated)
                self.whole = bool(chosen.all())
            if self.counters:
                self.counters.instruction(instruction.name, chosen)
            step = self.steps[instruction.name]
            if step is None:
                self._turn(instruction, mask, chosen, at)
                return
            if self.whole or chosen.any():
                if at in self.products.touched:
                    self.products.note(at, chosen)
                step(self, instruction.operands, chosen)
            at += 1
        self.counter[mask] = at

    def _turn(self, instruction: Instruction, mask: np.ndarray, chosen: np.ndarray, at: int) -> None:
        """A branch, the end, or a barrier of the block."""
        self.counter[mask] = at + 1
        if instruction.name.startswith("bra"):
            self.counter[chosen] = self.entry.labels[instruction.operands[0]]
        elif instruction.name.startswith("ret"):
            self.done |= chosen
        elif instruction.operands != ("0",):
            raise NotImplementedError(f"bar.sync {instruction.operands}: barriers of a part of the block")
        else:
            self.waiting |= chosen

    # Registers

    def value(self, operand: str, kind: str) -> np.ndarray:
        """What an operand holds, by lane; not to be changed in place."""
        dtype = DTYPES[kind]
        register = self.registers.get(operand)
        if register is not None:
            if register.dtype == dtype:
                return register
            return register.view(dtype) if register.itemsize == dtype.itemsize else register.astype(dtype)
        constant = self.constants.get((operand, kind))
        if constant is None:
            constant = self.constants[operand, kind] = self._constant(operand, dtype)
        return constant

    def _constant(self, operand: str, dtype: np.dtype) -> np.ndarray:
        if operand in self.symbols:
            return np.full(self.lanes, self.symbols[operand], dtype)
        if operand[:2] in ("0f", "0d"):
            kind = ">f" if operand[1] == "f" else ">d"
            number = struct.unpack(kind, bytes.fromhex(operand[2:]))[0]
            found = np.full(self.lanes, number, np.float32 if kind == ">f" else np.float64)
            return found.view(dtype) if found.itemsize == dtype.itemsize else found.astype(dtype)
        number = int(operand, 0)
        if dtype.kind == "b":
            return np.full(self.lanes, number != 0)
        bits = number & ((1 << 8 * dtype.itemsize) - 1)
        return np.full(self.lanes, bits, np.dtype(f"u{dtype.itemsize}")).view(dtype)

    def assign(self, name: str, value: np.ndarray, mask: np.ndarray) -> None:
        register = self.registers[name]
        if value.dtype != register.dtype:
            same_size = value.itemsize == register.itemsize
            value = (
                np.ascontiguousarray(value).view(register.dtype)
                if same_size
                else value.astype(register.dtype)
            )
        self.registers[name] = value if self.whole else np.where(mask, value, register)

    # Warps

    def require_whole_warps(self, mask: np.ndarray, lanes: int = 32) -> None:
        if not self.whole:
            together = mask.reshape(-1, lanes)
            if (together.any(1) != together.all(1)).any():
                what = "warp" if lanes == 32 else "warpgroup"
                self.fault(f"a {what} instruction with some of its lanes elsewhere")

    def pass_warp_barrier(self, mask: np.ndarray) -> None:
        self.require_whole_warps(mask)
        self.warp_epochs[np.unique(self.warp[mask])] += 1
        self._tags = None


def _step_of(name: str):
    """A function (blocks, operands, mask) for an instruction; None for what _turn does."""
    kind, *suffixes = name.split(".")
    if kind in ("bra", "ret", "exit") or name in ("bar.sync", "barrier.sync"):
        return None
    if name == "bar.warp.sync":
        return lambda blocks, operands, mask: blocks.pass_warp_barrier(mask)
    if operation := OPERATIONS.get(kind):
        return lambda blocks, operands, mask: operation(blocks, suffixes, operands, mask)
    if kind in ptx_arithmetic.ELEMENTWISE:
        return lambda blocks, operands, mask: ptx_arithmetic.elementwise(
            blocks, kind, suffixes, operands, mask
        )
    raise NotImplementedError(name)
