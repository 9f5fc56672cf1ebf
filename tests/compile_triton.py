"""Compiles the Triton kernels ahead of time for given chips, with no GPU, and prints what the compiler made of each.

    python tests/compile_triton.py 80 90 100

One JSON line per kernel: registers, spill instructions, local and shared memory in bytes, tensor core instructions.
bfloat16, causal, a shared prompt table: the training call. Compiling is not running.
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


def compile_kernel(name: str, head_dim: int, arch: int) -> dict[str, object]:
    kernel, stage = KERNELS[name]
    config = configs.choose(stage, head_dim, 16, 2, arch)
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_P": 16,
        "CHUNK_D": head_dim, "BLOCK_E": 128, "BLOCK_S": 16, "BLOCK_T": 16, "PAGE_SIZE": 1, "HALF": head_dim // 2,
        "INTERLEAVED": False, "ADVANCE": True, "HAS_LEFT": False, "HAS_RIGHT": True, "TANH": True, "PRECISION": "tf32",
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
            signature[argument] = "*fp32" if is_float else "*i32" if argument in INT32 else "*bf16"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument.startswith("scale") else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, local, spills = resources(compiled.asm["cubin"])
    return {
        "kernel": name, "head_dim": head_dim, "arch": arch, "registers": registers, "local": local, "spills": spills,
        "shared": compiled.metadata.shared, "estimate": configs.shared_memory(stage, config, head_dim, 16, 2),
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
    jobs = [(name, d, int(arch)) for arch, name, d in itertools.product(sys.argv[1:], KERNELS, HEAD_DIMS)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for result in pool.map(compile_kernel, *zip(*jobs, strict=True)):
            print(json.dumps(result), flush=True)
