"""A kernel's machine code: its instructions with the compiler's scheduling, its loops, its registers.

`cuobjdump`, which comes with Triton, disassembles the cubin. The upper half of each 128-bit instruction holds what
ptxas decided about its issue: how many cycles the warp stalls after it, which of six scoreboards it sets, and which it
waits for. The layout of these bits has been the same since Volta (Jia et al., "Dissecting the NVIDIA Volta GPU
Architecture via Microbenchmarking", arXiv:1804.06826, section 2).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,5})\*/\s+(?:(@!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/"
)
_NO_SCOREBOARD = 7


class Instruction(NamedTuple):
    """name: with its suffixes, "HGMMA.64x128x16.F32"; stall: cycles until the warp's next instruction.

    sets, frees: the scoreboards that are set until the result is there, and until the operands have been read, or None.
    waits: a bit for each scoreboard that must be clear.
    """

    address: int
    guard: str
    name: str
    operands: str
    stall: int
    sets: int | None
    frees: int | None
    waits: int

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]


class Code(NamedTuple):
    """registers: per thread; local_bytes: per thread, of spilled registers and arrays."""

    instructions: list[Instruction]
    registers: int
    local_bytes: int


def disassemble(cubin: bytes) -> Code:
    """The only kernel of a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, listing = (
            subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:\d+ SHARED:\d+ LOCAL:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump names no registers: {usage!r}")
    return Code(parse(listing), int(found[1]), int(found[2]))


def parse(listing: str) -> list[Instruction]:
    """The instructions of `cuobjdump -sass`."""
    return [_instruction(*groups) for groups in _INSTRUCTION.findall(listing)]


def _instruction(address: str, guard: str, name: str, operands: str, upper_half: str) -> Instruction:
    control = int(upper_half, 16) >> 41
    sets, frees = (control >> shift & 7 for shift in (5, 8))
    return Instruction(
        int(address, 16), guard, name, operands, control & 15,
        None if sets == _NO_SCOREBOARD else sets, None if frees == _NO_SCOREBOARD else frees, control >> 11 & 63,
    )  # fmt: skip


def is_product(instruction: Instruction) -> bool:
    """Whether the tensor cores run it."""
    return instruction.kind in ("HMMA", "HGMMA")


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops, in the order of their addresses; each from its first instruction to the branch back."""
    spans = []
    for instruction in code:
        target = re.search(r"0x([0-9a-f]+)\)?$", instruction.operands)
        if instruction.kind == "BRA" and target and int(target[1], 16) < instruction.address:
            spans.append((int(target[1], 16), instruction.address))
    innermost = [
        span for span in set(spans)
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)
    ]  # fmt: skip
    return [[i for i in code if first <= i.address <= last] for first, last in sorted(innermost)]
