"""Compiles the Triton kernels ahead of time for given chips, with no GPU, and prints what the compiler made of each.

    python tests/backends/compile_triton.py 80 90 100

One JSON line per kernel: registers, spill instructions, local and shared memory in bytes, tensor core instructions.
bfloat16, causal, a shared prompt table: the training call; with `--float32` in that, and as many prompts as there may
be too. Compiling is not running.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zinit_kernels.backends.triton import backward, configs, decode, forward, prompt_gradients

HEAD_DIMS = (64, 128, 256)
KERNELS = {
    "forward": (forward.forward_kernel, "forward"),
    "partial_sums": (prompt_gradients.partial_sums_kernel, "prompt_gradients"),
    "add_partials": (prompt_gradients.add_partials_kernel, "prompt_gradients"),
    "grad_key_value": (backward.grad_key_value_kernel, "grad_key_value"),
    "grad_query": (backward.grad_query_kernel, "grad_query"),
    "append": (decode.append_kernel, "decode"),
    "decode": (decode.decode_kernel, "decode"),
    "combine": (decode.combine_kernel, "combine"),
}
FLOAT32 = ("gate_ptr", "lse_ptr", "grad_lse_ptr", "delta_ptr", "key_bias_ptr", "grad_gate_ptr")
INT32 = ("cache_seqlens_ptr", "block_table_ptr", "prompt_index_ptr", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr")
ABSENT = (
    "key_bias_ptr", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "prompt_index_ptr", "block_table_ptr", "grad_lse_ptr",
)  # fmt: skip


def compile_kernel(
    name: str, head_dim: int, arch: int, itemsize: int = 2, block_p: int = 16
) -> dict[str, object]:
    kernel, stage = KERNELS[name]
    config = configs.choose(stage, head_dim, block_p, itemsize, arch)
    precision, element = ("tf32", "*bf16") if itemsize == 2 else ("ieee", "*fp32")
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_P": block_p, "CHUNK_D": min(head_dim, 8192 // block_p), "BLOCK_E": 128, "BLOCK_S": 16, "BLOCK_T": 16,
        "PAGE_SIZE": 1, "HALF": head_dim // 2, "INTERLEAVED": False, "ADVANCE": True, "HAS_LEFT": False,
        "HAS_RIGHT": True, "TANH": True, "PRECISION": precision,
    } | dict.fromkeys(ABSENT)  # fmt: skip
    signature: dict[str, object] = {}
    values: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], object] = {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[(i,)] = "constexpr", constants[argument]
        elif argument.endswith("_strides"):
            signature[argument] = ("i32",) * 3
            attributes.update({(i, j): [["tt.divisibility", 16]] for j in range(3)})
        elif argument.endswith("_ptr"):
            is_float = argument in FLOAT32 or argument.startswith("partial_")
            signature[argument] = "*fp32" if is_float else "*i32" if argument in INT32 else element
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument.startswith("scale") else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, local, spills = resources(compiled.asm["cubin"])
    return {
        "kernel": name, "head_dim": head_dim, "block_p": block_p, "arch": arch, "registers": registers, "local": local,
        "spills": spills, "shared": compiled.metadata.shared,
        "estimate": configs.shared_memory(stage, config, head_dim, block_p, itemsize),
        "limit": configs.SHARED_MEMORY[arch], "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "config": config,
    }  # fmt: skip


def resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers, local memory in bytes, loads and stores of local memory) that cuobjdump reads from the binary."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:\d+ SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2]), len(re.findall(r"\b(?:LDL|STL)\b", code))


if __name__ == "__main__":
    itemsize = 4 if "--float32" in sys.argv else 2
    sizes = [(d, 16) for d in HEAD_DIMS] if itemsize == 2 else [(128, 16), (256, 16), (256, 128)]
    kernels = [
        name for name in KERNELS if itemsize == 2 or name not in ("append", "add_partials")
    ]  # have no tiles
    archs = [int(word) for word in sys.argv[1:] if word.isdigit()]
    jobs = [(name, d, arch, itemsize, p) for arch, name, (d, p) in itertools.product(archs, kernels, sizes)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for result in pool.map(compile_kernel, *zip(*jobs, strict=True)):
            print(json.dumps(result), flush=True)
