"""Products of warpgroups (sm_90): wgmma, its descriptors of shared memory, and the fences it needs.

A product is computed when it is issued. Until its group has been waited for, its registers belong to it and the
shared memory that it reads may not be written. It needs three things before it:

- wgmma.fence before its group, if other instructions touched its registers, and before the first product;
- a barrier after other threads wrote the shared memory, as every read does;
- fence.proxy.async after those writes: by the writers, or by the readers behind the barrier.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from ptx_arithmetic import from_half
from ptx_matrices import floats_of, halves_of
from ptx_memory import CELL, SEVERAL
from ptx_module import Instruction, names

GROUP = 128  # lanes of a warpgroup
SWIZZLE_WIDTH = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row, by the descriptor's mode


@dataclass
class Product:
    """One that is in flight, of the lanes in `mask`."""

    mask: np.ndarray
    group: np.ndarray  # by lane
    accumulator: frozenset[str]
    read: frozenset[str]  # other registers
    cells: np.ndarray  # of shared memory [warpgroup, n], of all warpgroups
    lanes: np.ndarray  # the first of each warpgroup


class Products:
    """The products in flight, and what fences have been passed."""

    def __init__(self, blocks) -> None:
        self.blocks, code = blocks, blocks.entry.code
        self.touched = _touched(code)
        self.pending: list[Product] = []
        self.groups = np.zeros(blocks.lanes, int)
        self.unfenced: dict[str, np.ndarray] = {}  # registers that others touched since the last wgmma.fence
        self.fenced_once = np.zeros(blocks.lanes, bool)
        self.opened = np.zeros(blocks.lanes, bool)  # passed a fence since they committed a group
        self.fenced = np.zeros(blocks.lanes, np.int64)  # writes of these lanes that a proxy fence has covered
        self.observed = np.zeros(blocks.lanes, np.int64)  # writes of all threads that it has covered
        self.before_barrier = np.zeros(blocks.count, np.int64)

    def after_barrier(self, free: np.ndarray) -> None:
        self.before_barrier[free] = self.blocks.memory.writes

    def note(self, at: int, mask: np.ndarray) -> None:
        """Of an ordinary instruction that touches registers of products."""
        touched, written = self.touched[at]
        self._require_no_use(touched, written, mask, self.blocks.entry.code[at].name)
        for name in touched:
            before = self.unfenced.get(name)
            self.unfenced[name] = mask if before is None else before | mask

    def _require_no_use(self, touched: set[str], written: set[str], mask: np.ndarray, by: str) -> None:
        for product in self.pending:
            wrong = product.accumulator & touched | product.read & written
            if wrong and (product.mask & mask).any():
                self.blocks.fault(f"{by} touches {min(wrong)}, which a product in flight uses")

    def require_fence(self, accumulator: list[str], left: list[str], mask: np.ndarray) -> None:
        """Of a product: between every other access to its registers and its group of products.

        The PTX ISA wants the fence after the access. LLVM moves arithmetic behind the fence that Triton wrote for it,
        and ptxas puts its own (WARPGROUP.ARRIVE) where it belongs: tests/backends/compile_triton.py looks there. So a
        fence is missed here if there is none since the last group was committed.
        """
        self._require_no_use(set(left), set(), mask, "wgmma")
        if not self.fenced_once[mask].all():
            self.blocks.fault("wgmma without a fence before the first one")
        for name in accumulator + left:
            before = self.unfenced.get(name)
            if before is not None and (before & mask & ~self.opened).any():
                self.blocks.fault(f"wgmma without a fence after an access to {name}")

    def fence_registers(self, mask: np.ndarray) -> None:
        self.fenced_once |= mask
        self.opened |= mask
        left = {name: where & ~mask for name, where in self.unfenced.items()}
        self.unfenced = {name: where for name, where in left.items() if where.any()}

    def fence_proxy(self, mask: np.ndarray) -> None:
        self.fenced[mask] = self.blocks.memory.writes
        self.observed[mask] = self.before_barrier[self.blocks.block_numbers[mask]]

    def require_proxy_fence(self, cells: np.ndarray, lanes: np.ndarray) -> None:
        memory = self.blocks.memory
        written = memory.written_at[cells]
        observed = self.observed.reshape(-1, GROUP).min(1)[lanes // GROUP]
        late = written > observed[:, None]
        if late.any():
            block = self.blocks.block_numbers[lanes]
            writer = (memory.shared_shadow.writer[cells] & SEVERAL) + (block * self.blocks.threads)[:, None]
            if (written[late] > self.fenced[writer[late]]).any():
                self.blocks.fault("wgmma reads shared memory without fence.proxy.async after it was written")

    def wait(self, mask: np.ndarray, left: int) -> None:
        pending, self.pending = self.pending, []
        for product in pending:
            ended = product.mask & mask & (product.group + left < self.groups)
            kept = product.mask & ~ended
            if ended.any():
                gone = ended[product.lanes]
                np.subtract.at(self.blocks.memory.multiplied, product.cells[gone].ravel(), np.int16(1))
                product.cells, product.lanes = product.cells[~gone], product.lanes[~gone]
                product.mask = kept
            if kept.any():
                self.pending.append(product)


def _touched(code: list[Instruction]) -> dict[int, tuple[set[str], set[str]]]:
    """By instruction other than a product: the registers of products that it touches, and those that it writes."""
    products = [i.operands[:2] for i in code if i.name.startswith("wgmma.mma")]
    registers = {name for operands in products for operand in operands for name in names(operand)}
    found = {}
    for at, instruction in enumerate(code if registers else []):
        touched = {
            name for operand in instruction.operands for name in re.findall(r"%\w+", operand)
        } & registers
        if touched and not instruction.name.startswith("wgmma"):
            found[at] = touched, touched.intersection(names(instruction.operands[0]))
    return found


def wgmma(blocks, suffixes, operands, mask):
    products = blocks.products
    blocks.require_whole_warps(mask, GROUP)
    if suffixes[0] == "fence":
        products.fence_registers(mask)
    elif suffixes[0] == "commit_group":
        products.groups[mask] += 1
        products.opened &= ~mask
    elif suffixes[0] == "wait_group":
        products.wait(mask, int(operands[0]))
    else:
        _multiply(blocks, suffixes, operands, mask)


def _multiply(blocks, suffixes, operands, mask):
    shape = re.fullmatch(r"m64n(\d+)k16", suffixes[3])
    kind = suffixes[-1]
    if shape is None or suffixes[4] != "f32" or kind not in ("bf16", "f16") or suffixes[-2] != kind:
        raise NotImplementedError(f"wgmma.{'.'.join(suffixes)}")
    columns = int(shape[1])
    accumulator, left, right, keeps, *flags = operands
    signs, transposed = flags[:2], [flag == "1" for flag in flags[2:]]
    if signs != ["1", "1"]:
        raise NotImplementedError("wgmma that negates an operand")
    registers = names(accumulator)
    from_registers = left[0] == "{"
    products, groups = blocks.products, blocks.lanes // GROUP
    products.require_fence(registers, names(left) if from_registers else [], mask)
    lanes = np.flatnonzero(mask)[::GROUP]
    cells = [_cells_of(blocks, right, columns, transposed[-1], lanes)]
    if from_registers:
        a = halves_of(blocks, names(left), kind).reshape(2, 2, groups, 4, 8, 4, 2)  # k r G w g p j
        a = a.transpose(2, 3, 1, 4, 0, 5, 6).reshape(groups, 64, 16)
    else:
        cells.append(_cells_of(blocks, left, 64, transposed[0], lanes))
        a = np.zeros((groups, 64, 16), np.float32)
        a[lanes // GROUP] = _read(blocks, cells[1], kind)
    b = np.zeros((groups, columns, 16), np.float32)
    b[lanes // GROUP] = _read(blocks, cells[0], kind)
    start = floats_of(blocks, registers).reshape(columns // 8, 2, 2, groups, 4, 8, 4)  # n r j G w g p
    start = start.transpose(3, 4, 1, 5, 0, 6, 2).reshape(groups, 64, columns)
    kept = blocks.value(keeps, "pred").reshape(groups, GROUP)[:, 0]
    product = np.where(kept[:, None, None], start, np.float32(0)) + a @ b.swapaxes(1, 2)
    product = product.reshape(groups, 4, 2, 8, columns // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
    for name, column in zip(registers, product.reshape(len(registers), -1), strict=True):
        blocks.assign(name, np.ascontiguousarray(column), mask)
    read = np.concatenate([c.reshape(len(lanes), -1) for c in cells], 1)
    products.require_proxy_fence(read, lanes)
    np.add.at(blocks.memory.multiplied, read.ravel(), np.int16(1))  # with a Python number 40 times as slow
    sources = frozenset(names(left)) if from_registers else frozenset()
    products.pending.append(
        Product(mask.copy(), products.groups.copy(), frozenset(registers), sources, read, lanes)
    )


def _cells_of(blocks, operand: str, rows: int, transposed: bool, lanes: np.ndarray) -> np.ndarray:
    """Which cells hold the elements [warpgroup, rows, 16] that the descriptors in a register name."""
    descriptors = blocks.value(operand, "u64").reshape(-1, GROUP)
    if (descriptors != descriptors[:, :1])[lanes // GROUP].any():
        blocks.fault("a warpgroup's lanes have different descriptors")
    at = addresses(descriptors[lanes // GROUP, 0], rows, transposed)
    return blocks.memory.shared_offsets(at, CELL, lanes) // CELL


def addresses(descriptors: np.ndarray, rows: int, transposed: bool) -> np.ndarray:
    """Addresses [descriptors, rows, 16] of a matrix of 16-bit elements; transposed: a row's neighbours lie together.

    A descriptor holds, in units of 16 bytes, the start, the leading and the stride offset, and the mode of swizzling:
    rows of 128, 64 or 32 bytes, of which each eight are a pattern. In it the 16-byte pieces change places by the
    exclusive or with the number of the row, which is a part of the address.
    """
    start, leading, stride = (
        (descriptors >> np.uint64(s) & np.uint64(0x3FFF)) << np.uint64(4) for s in (0, 16, 32)
    )
    start, leading, stride = (x.astype(np.int64)[:, None, None] for x in (start, leading, stride))
    mode = int(descriptors[0] >> np.uint64(62))
    offset_of_base = descriptors >> np.uint64(49) & np.uint64(7)
    if (descriptors >> np.uint64(62) != mode).any() or offset_of_base.any():
        raise NotImplementedError("descriptors of several modes, or with a base offset")
    width = SWIZZLE_WIDTH[mode]
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if transposed:
        piece = width // 2  # elements that lie together
        if mode:
            across, along = row // piece * leading, k // 8 * stride
        else:
            across, along = row // piece * stride, k // 8 * leading
        at = start + across + row % piece * 2 + along + k % 8 * width
    else:
        along = 2 * k if mode else k // 8 * leading + k % 8 * 2
        at = start + row // 8 * stride + row % 8 * width + along
    return at ^ (at >> 7 & width // 16 - 1) << 4


def _read(blocks, cells: np.ndarray, kind: str) -> np.ndarray:
    """Elements [warpgroup, rows, 16], read as the whole warpgroup."""
    memory = blocks.memory
    flat = cells.reshape(len(cells), -1)
    if memory.arriving[flat].any():
        blocks.fault("shared memory race: a product reads what a copy is on its way to")
    first = flat[:, 0] // (memory.shared_size // CELL) * blocks.threads
    tags = blocks.tags()[first] | SEVERAL
    if race := memory.shared_shadow.access(flat, tags, False):
        blocks.fault(f"shared memory {race} (a product)")
    return from_half(memory.shared.view(np.uint16)[cells], kind)


def fence(blocks, suffixes, operands, mask):
    if suffixes[0] == "proxy":
        if suffixes[1] != "async":
            raise NotImplementedError(f"fence.{'.'.join(suffixes)}")
        blocks.products.fence_proxy(mask)
    elif suffixes[0] not in ("acq_rel", "sc"):
        raise NotImplementedError(f"fence.{'.'.join(suffixes)}")


OPERATIONS = {"wgmma": wgmma, "fence": fence}
