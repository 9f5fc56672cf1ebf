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
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zinit_kernels.backends.triton import (
    backward,
    cache,
    configs,
    decode,
    forward,
    launch,
    prompt_gradients,
    prompt_terms,
)
from zinit_kernels.backends.triton.operands import View

HEAD_DIMS = (64, 128, 256)
KERNELS = {
    "forward": (forward.zinit_forward_kernel, "forward"),
    "partial_sums": (prompt_gradients.zinit_partial_sums_kernel, "prompt_gradients"),
    "add_partials": (prompt_gradients.zinit_add_partials_kernel, "prompt_gradients"),
    "grad_key_value": (backward.zinit_grad_key_value_kernel, "grad_key_value"),
    "grad_query": (backward.zinit_grad_query_kernel, "grad_query"),
    "add_prompts": (prompt_terms.zinit_add_prompts_kernel, "prompt_gradients"),
    "add_prompt_grad_query": (prompt_terms.zinit_add_prompt_grad_query_kernel, "prompt_gradients"),
    "append": (cache.zinit_append_kernel, "decode"),
    "decode": (decode.zinit_decode_kernel, "decode"),
    "extend": (decode.zinit_decode_kernel, "extend"),
    "combine": (decode.zinit_combine_kernel, "combine"),
}
FIXED = {"add_partials": launch._ADD_PARTIALS, "append": launch._APPEND}
FLOAT32 = ("gate_ptr", "lse_ptr", "grad_lse_ptr", "delta_ptr", "key_bias_ptr", "grad_gate_ptr", "sinks_ptr")
INT32 = (
    "cache_seqlens_ptr", "cache_leftpad_ptr", "block_table_ptr", "prompt_index_ptr", "cu_seqlens_q_ptr",
    "cu_seqlens_k_ptr",
)  # fmt: skip
VIEWS = (
    "query", "key", "value", "out", "prompt_key", "prompt_value", "grad_out", "grad_query", "grad_key", "grad_value",
    "key_cache", "value_cache", "new_key", "new_value", "source", "target",
)  # fmt: skip
# what a mask adds to the call without any: run-time arguments that are there
MASKS = {
    "none": (),
    "causal": ("window_right",),
    "window": ("window_left", "window_right"),
    "padding": ("key_bias_ptr",),
    "packed": ("window_right", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr"),
    "paged": ("window_right", "block_table_ptr"),
    "sinks": ("window_right", "sinks_ptr", "partial_sinks_ptr"),
    "softcap": ("window_right", "cap_scale", "cap_size"),
    "leftpad": ("window_right", "cache_leftpad_ptr"),
}
ABSENT = {name for names in MASKS.values() for name in names} | {"prompt_index_ptr", "grad_lse_ptr"}


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
    kernel, stage = KERNELS[name]
    block_d = configs.block_of(head_dim)
    config = config or FIXED.get(name) or configs.choose(stage, block_d, block_p, itemsize, arch)
    element = "*bf16" if itemsize == 2 else "*fp32"
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_P": block_p,
        "CHUNK_D": min(block_d, 8192 // block_p), "BLOCK_E": 128, "BLOCK_S": 16, "BLOCK_T": 16,
        "PAGE_SIZE": 16 if mask == "paged" else 1, "HALF": head_dim // 2, "INTERLEAVED": False, "ADVANCE": True,
        "TANH": True, "SCALE_SIGN": 1, "ONE_TOKEN": name == "decode",
        "SUBTRACT": True,
    } | dict.fromkeys(ABSENT - set(MASKS[mask]))  # fmt: skip
    signature: dict[str, object] = {}
    values: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], object] = {}
    aligned = [["tt.divisibility", 16]]
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[(i,)] = "constexpr", constants[argument]
        elif argument in VIEWS:
            signature[argument] = View(element, "i32", "i32", "i32")
            attributes.update({(i, j): aligned for j in range(4)})
        elif argument.endswith("_ptr"):
            is_float = argument in FLOAT32 or argument.startswith("partial_")
            signature[argument] = "*fp32" if is_float else "*i32" if argument in INT32 else element
            attributes[(i,)] = aligned
        else:
            signature[argument] = "fp32" if argument.startswith(("scale", "cap_")) else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if config.max_registers:
        options["maxnreg"] = config.max_registers
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    if keep:
        Path(keep).write_bytes(compiled.asm["cubin"])
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
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, listing = (
            subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:\d+ SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    code = [
        (int(address, 16), re.sub(r"^@!?U?P\w+ ", "", text))
        for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", listing)
    ]
    operations = [(address, text.split()[0].split(".")[0]) for address, text in code]
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
        "registers": int(found[1]), "local": int(found[2]), "spills": spills, "loop_spills": loop_spills,
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
    names = [name for name in options.kernels.split(",") if name] or list(KERNELS)
    if options.float32:
        sizes = [(128, 16), (256, 16), (256, 128)]
        names = [name for name in names if name not in ("append", "add_partials")]  # have no tiles
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
