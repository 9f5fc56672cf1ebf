"""Matrices of a warp: ldmatrix, stmatrix and mma, in the layouts of the PTX ISA.

In a fragment, lane 4 g + p holds the elements 2 p and 2 p + 1 of row g. Arrays are named by their axes: r and k are
halves of the rows and of the inner dimension, j the two elements.
"""

from __future__ import annotations

import numpy as np
from ptx_arithmetic import from_half
from ptx_module import names


def ldmatrix(blocks, suffixes, operands, mask):
    """xN: the lanes 8 i to 8 i + 7 name the rows of the i-th matrix."""
    blocks.require_whole_warps(mask)
    registers = names(operands[0])
    lanes = _naming_lanes(blocks, mask, len(registers))
    at = blocks.memory.addresses(operands[1], lanes)
    rows = blocks.memory.access("shared", at, 16, lanes).view(np.uint16)
    matrices = rows.reshape(-1, len(registers), 8, 8)  # warp, matrix, row, column
    if "trans" in suffixes:
        matrices = matrices.swapaxes(2, 3)
    words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, len(registers), 32)
    for i, name in enumerate(registers):
        value = np.zeros(blocks.lanes, np.uint32)
        value[mask] = words[:, i].ravel()
        blocks.assign(name, value, mask)


def stmatrix(blocks, suffixes, operands, mask):
    blocks.require_whole_warps(mask)
    registers = names(operands[1])
    lanes = _naming_lanes(blocks, mask, len(registers))
    words = np.stack([blocks.value(name, "b32")[mask].reshape(-1, 32) for name in registers], 1)
    matrices = np.ascontiguousarray(words).view(np.uint16).reshape(-1, len(registers), 8, 8)
    if "trans" in suffixes:
        matrices = matrices.swapaxes(2, 3)
    rows = np.ascontiguousarray(matrices).reshape(-1, 8).view(np.uint8)
    blocks.memory.access("shared", blocks.memory.addresses(operands[0], lanes), 16, lanes, rows)


def _naming_lanes(blocks, mask: np.ndarray, matrices: int) -> np.ndarray:
    return np.flatnonzero(mask & (blocks.lane_numbers % 32 < 8 * matrices))


def halves_of(blocks, registers: list[str], kind: str) -> np.ndarray:
    """float32 [register, warp, g, p, j] of registers with two elements each."""
    words = np.stack([blocks.value(name, "b32") for name in registers])
    return from_half(words.view(np.uint16), kind).reshape(len(registers), -1, 8, 4, 2)


def floats_of(blocks, registers: list[str]) -> np.ndarray:
    """[register, warp, g, p]"""
    return np.stack([blocks.value(name, "f32") for name in registers]).reshape(len(registers), -1, 8, 4)


def mma(blocks, suffixes, operands, mask):
    if "m16n8k16" not in suffixes or suffixes[-1] != "f32" or suffixes[-2] not in ("bf16", "f16"):
        raise NotImplementedError(f"mma.{'.'.join(suffixes)}")
    blocks.require_whole_warps(mask)
    d, a, b, c = (names(operand) for operand in operands)
    warps, kind = blocks.lanes // 32, suffixes[-2]
    left = halves_of(blocks, a, kind).reshape(2, 2, warps, 8, 4, 2)  # k r w g p j
    left = left.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, 16)
    right = halves_of(blocks, b, kind).transpose(1, 0, 3, 4, 2).reshape(warps, 16, 8)  # k w g p j -> w kpj g
    start = floats_of(blocks, c).reshape(2, 2, warps, 8, 4)  # r j w g p
    start = start.transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
    product = (start + left @ right).reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    for name, column in zip(d, product.reshape(4, -1), strict=True):
        blocks.assign(name, np.ascontiguousarray(column), mask)


OPERATIONS = {"ldmatrix": ldmatrix, "stmatrix": stmatrix, "mma": mma}
