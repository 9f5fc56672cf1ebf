"""Compiles the Triton kernels ahead of time for given chips, with no GPU, and prints what the compiler made of each.

    python tests/backends/compile_triton.py 80 90 100 [--float32] [--kernels forward,decode] [--masks causal,padding]

One JSON line per kernel: registers, spill instructions, local and shared memory in bytes, tensor core instructions, and
the loops that hold tensor core instructions. bfloat16, causal, a shared prompt table: the training call. With
`--float32` in that type, and with as many prompts as there may be too. Compiling is not running.
"""

import argparse
import collections
import itertools
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from bench.project import compiled as compiled_kernels  # noqa: E402 (needs the line above)
from bench.project import machine_code  # noqa: E402
from zinit_kernels.backends.triton import configs  # noqa: E402

HEAD_DIMS = (64, 128, 256)


def compile_kernel(
    name: str,
    head_dim: int,
    arch: int,
    itemsize: int = 2,
    block_p: int = 16,
    mask: str = "causal",
    config: configs.Config | None = None,
    keep: str = "",
) -> dict[str, object]:
    """keep: a file name for the cubin; config: other than the written choice."""
    compiled, config = compiled_kernels.compile_kernel(name, head_dim, arch, itemsize, block_p, mask, config)
    if keep:
        Path(keep).write_bytes(compiled.asm["cubin"])
    stage, block_d = compiled_kernels.KERNELS[name][1], configs.block_of(head_dim)
    return {
        "kernel": name, "head_dim": head_dim, "block_p": block_p, "arch": arch, "mask": mask,
        **read_binary(compiled.asm["cubin"]), "shared": compiled.metadata.shared,
        "estimate": configs.shared_memory(stage, config, block_d, block_p, itemsize),
        "limit": configs.SHARED_MEMORY[arch], "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "config": config,
    }  # fmt: skip


def read_binary(cubin: bytes) -> dict[str, object]:
    """Registers, local memory in bytes, loads and stores of it, all instructions, and the loops with products.

    A loop is "instructions / tensor core instructions / instructions of the exponential's unit" of one warp.
    `loop_spills` are the loads and stores of local memory in these loops.
    """
    found = machine_code.disassemble(cubin)
    operations = [(instruction.address, instruction.kind) for instruction in found.instructions]
    code = [(i.address, f"{i.name} {i.operands}".rstrip()) for i in found.instructions]
    loops: list[str] = []
    loop_spills = 0
    for address, text in code:
        target = re.search(r"0x([0-9a-f]+)\)?$", text) if text.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            count = collections.Counter(op for at, op in operations if int(target[1], 16) <= at <= address)
            products = sum(number for op, number in count.items() if "MMA" in op)
            if products:
                loop_spills += count["LDL"] + count["STL"]
                loops.append(f"{count.total()}/{products}/{count['MUFU']}")
    spills = sum(op in ("LDL", "STL") for _, op in operations)
    return {
        "registers": found.registers, "local": found.local_bytes, "spills": spills, "loop_spills": loop_spills,
        "instructions": len(code), "loops": loops, "late_registers": count_late_registers([text for _, text in code]),
    }  # fmt: skip


def count_late_registers(code: list[str]) -> int:
    """Warpgroup products one of whose registers is written between them and the fence before them (WARPGROUP.ARRIVE).

    In the PTX that LLVM makes, arithmetic stands between the fence and the product. ptxas has to put that right.
    """
    written: set[int] = set()
    late = 0
    for text in code:
        operation, _, rest = text.partition(" ")
        registers = [int(number) for number in re.findall(r"(?<!U)R(\d+)", rest.replace("gdesc[UR", "["))]
        if operation.startswith("WARPGROUP.ARRIVE"):
            written = set()
        elif shape := re.match(r"HGMMA\.64x(\d+)x", operation):
            used = {registers[0] + i for i in range(int(shape[1]) // 2)}
            if left := re.match(r"R\d+, R(\d+)", rest):
                used |= {int(left[1]) + i for i in range(4)}
            late += bool(used & written)
        elif registers and re.match(r"R\d+", rest) and not operation.startswith(("ST", "RED")):
            width = 4 if ".128" in operation or ".WIDE" in operation else 2 if ".64" in operation else 1
            written |= {registers[0] + i for i in range(width)}
    return late


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("archs", nargs="+", type=int)
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--kernels", default="")
    parser.add_argument("--masks", default="causal")
    parser.add_argument("--head-dims", default=",".join(map(str, HEAD_DIMS)))
    options = parser.parse_args()
    sizes = [(int(d), 16) for d in options.head_dims.split(",")]
    names = [name for name in options.kernels.split(",") if name] or list(compiled_kernels.KERNELS)
    if options.float32:
        sizes = [(128, 16), (256, 16), (256, 128)]
        left_out = ("append", "add_partials", "add_prompts", "add_prompt_grad_query")
        names = [name for name in names if name not in left_out]  # without tiles; refused in float32 on a GPU
    itemsize = 4 if options.float32 else 2
    jobs = [
        (name, d, arch, itemsize, p, mask)
        for arch, name, (d, p), mask in itertools.product(
            options.archs, names, sizes, options.masks.split(",")
        )
    ]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for result in pool.map(compile_kernel, *zip(*jobs, strict=True)):
            print(json.dumps(result), flush=True)
