"""The part of PTX that nvcc and Triton write: entries, parameters, registers, instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

TYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64,
    "u64": np.uint64, "s64": np.int64, "f64": np.float64, "bf16x2": np.uint32, "f16x2": np.uint32,
    "bf16": np.uint16, "f16": np.uint16,
}  # fmt: skip


class Instruction(NamedTuple):
    name: str  # e.g. "add.s32"
    operands: tuple[str, ...]
    guard: str  # the predicate register, or ""
    negated: bool
    line: str  # of the source, e.g. "forward.py:112"


@dataclass
class Entry:
    """A kernel. nvcc's have one parameter, a struct; Triton's have one for each argument."""

    name: str
    parameters: dict[str, int]  # name -> offset in the parameters' memory
    parameter_types: tuple[str, ...]
    dynamic_shared: set[str]  # names for the start of shared memory
    threads: int = 0  # of a block, where the module says it
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    labels: dict[str, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)

    def pack(self, arguments: list[int | float]) -> bytes:
        """The parameters' memory for these arguments, which are numbers and addresses."""
        packed = bytearray()
        for kind, argument in zip(self.parameter_types, arguments, strict=True):
            dtype = np.dtype(TYPES[kind])
            packed += bytes(-len(packed) % dtype.itemsize)
            if dtype.kind == "u":
                argument = int(argument) & ((1 << 8 * dtype.itemsize) - 1)
            packed += np.array(argument, dtype).tobytes()
        return bytes(packed)


def names(operand: str) -> list[str]:
    """The registers of an operand: several in braces, or one."""
    return operand.strip("{} ").replace(" ", "").split(",")


def parse(text: str) -> dict[str, Entry]:
    """The entries of a PTX module, by their mangled names."""
    text = re.sub(r"//.*", "", text)
    files = dict(re.findall(r'\.file\s+(\d+) .*?"(?:[^"]*/)?([^"/]+)"\s*(?:$|,)', text, re.MULTILINE))
    shared = set(re.findall(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\]", text))
    found = {}
    for name, parameters, directives, body in re.findall(
        r"\.entry (\w+)\s*\((.*?)\)(.*?)\n\{\n(.*?)\n\s*\}\s*\n(?=\s*(?:\.visible|\.weak|\.entry|\.file|\.section|\Z))",
        text,
        re.DOTALL,
    ):
        offsets, types = _parameters(parameters)
        threads = re.search(r"\.reqntid (\d+)", directives)
        found[name] = entry = Entry(name, offsets, types, shared, int(threads[1]) if threads else 0)
        _parse_body(entry, body, files)
    return found


def _parameters(text: str) -> tuple[dict[str, int], tuple[str, ...]]:
    offsets, types, end = {}, [], 0
    for declaration in filter(None, (line.strip().rstrip(",") for line in text.splitlines())):
        if struct := re.fullmatch(r"\.param \.align \d+ \.b8 (\w+)\[(\d+)\]", declaration):
            offsets[struct[1]], end = end, end + int(struct[2])
        else:
            scalar = re.fullmatch(r"\.param \.(\w+)(?: \.ptr.*)? (\w+)", declaration)
            size = np.dtype(TYPES[scalar[1]]).itemsize
            end += -end % size
            offsets[scalar[2]], end = end, end + size
            types.append(scalar[1])
    return offsets, tuple(types)


def _parse_body(entry: Entry, body: str, files: dict[str, str]) -> None:
    line = ""
    for raw in body.splitlines():
        text = raw.strip().lstrip("{ ")  # a scope's own registers come behind its brace
        if text.startswith(".loc"):
            _, file, number, *_ = text.split()
            line = f"{files.get(file, file)}:{number}"
        elif label := re.match(r"(\$\w+):", text):
            entry.labels[label[1]] = len(entry.code)
        elif register := re.match(r"\.reg \.(\w+)\s+(%?\w+)(?:<(\d+)>)?;", text):
            kind, name, count = register.groups()
            numbered = [f"{name}{i}" for i in range(int(count))] if count else [name]
            entry.registers.update(dict.fromkeys(numbered, kind))
        elif text and text not in "{}" and not text.startswith("."):
            for statement in filter(None, (part.strip() for part in text.removesuffix("}").split(";"))):
                entry.code.append(_instruction(statement, line))


def _instruction(statement: str, line: str) -> Instruction:
    guard, name, rest = re.fullmatch(r"(?:@(!?[%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", statement).groups()
    operands = tuple(o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest))
    guard = guard or ""
    return Instruction(name.replace("::", "."), operands, guard.lstrip("!"), guard[:1] == "!", line)
