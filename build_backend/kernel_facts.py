"""What ptxas says about the kernels it assembled (nvcc -Xptxas=-v): architecture, registers, stack, spilled bytes,
shared memory beside the dynamic.

As a program, for the build: python kernel_facts.py OUT.inc LOG... writes them as a C++ string literal of JSON.
"""

import json
import re
import sys
from pathlib import Path


def parse(log: str) -> list[dict]:
    """One row per kernel and architecture."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers(?:, used \d+ barriers)?(?:, (\d+) bytes smem)?",
        re.DOTALL,
    )
    return [
        {"kernel": name, "arch": arch, "registers": int(registers), "stack": int(stack),
         "spilled": int(stores) + int(loads), "shared": int(shared or 0)}
        for name, arch, stack, stores, loads, registers, shared in pattern.findall(log)
    ]  # fmt: skip


def main(out: str, *logs: str) -> None:
    rows = [row for log in logs for row in parse(Path(log).read_text())]
    Path(out).write_text(f'R"json({json.dumps(rows)})json"\n')


if __name__ == "__main__":
    main(*sys.argv[1:])
