"""The part of PTX that nvcc writes for the kernels of csrc/cuda: entries, parameters, registers, instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

TYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64,
    "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip


class Instruction(NamedTuple):
    name: str  # e.g. "add.s32"
    operands: tuple[str, ...]
    guard: str  # the predicate register, or ""
    negated: bool
    line: int  # of the CUDA source


@dataclass
class Entry:
    name: str
    parameter: str  # the kernels have one, a struct
    dynamic_shared: set[str]  # names for the start of shared memory
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    labels: dict[str, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)


def parse(text: str) -> dict[str, Entry]:
    """The entries of a PTX module, by their mangled names."""
    text = re.sub(r"//.*", "", text)
    shared = set(re.findall(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\]", text))
    found = {}
    for name, parameters, body in re.findall(
        r"\.entry (\w+)\s*\((.*?)\).*?\n\{\n(.*?)\n\}\n(?=\s*(?:\.visible|\.weak|\.entry|\.file|\.section|\Z))",
        text,
        re.DOTALL,
    ):
        (parameter,) = re.findall(r"\.param \.align \d+ \.b8 (\w+)\[\d+\]", parameters)
        found[name] = entry = Entry(name, parameter, shared)
        _parse_body(entry, body)
    return found


def _parse_body(entry: Entry, body: str) -> None:
    line = 0
    for raw in body.splitlines():
        text = raw.strip().lstrip("{ ")  # a scope's own registers come behind its brace
        if text.startswith(".loc"):
            line = int(text.split()[2])
        elif label := re.match(r"(\$\w+):", text):
            entry.labels[label[1]] = len(entry.code)
        elif register := re.match(r"\.reg \.(\w+)\s+(%?\w+)(?:<(\d+)>)?;", text):
            kind, name, count = register.groups()
            names = [f"{name}{i}" for i in range(int(count))] if count else [name]
            entry.registers.update(dict.fromkeys(names, kind))
        elif text and text not in "{}" and not text.startswith("."):
            for statement in filter(None, (part.strip() for part in text.removesuffix("}").split(";"))):
                guard, name, rest = re.fullmatch(
                    r"(?:@(!?[%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", statement
                ).groups()
                operands = tuple(o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest))
                guard = guard or ""
                entry.code.append(
                    Instruction(name.replace("::", "."), operands, guard.lstrip("!"), guard[:1] == "!", line)
                )
