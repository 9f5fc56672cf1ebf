"""Compiles the Triton kernels ahead of time for a chip, without one: the signatures that a launch would have."""

from __future__ import annotations

from typing import Any

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

# name -> (kernel, the stage whose tile it takes)
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
ALIGNED = [["tt.divisibility", 16]]


def compile_kernel(
    name: str,
    head_dim: int,
    arch: int,
    itemsize: int = 2,
    block_p: int = 16,
    mask: str = "causal",
    config: configs.Config | None = None,
) -> tuple[Any, configs.Config]:
    """Triton's compiled kernel (`asm`, `metadata`) and its tile; config: another tile than the chip's.

    bfloat16 at itemsize 2, float32 at 4. block_p: the padded number of prompts. The arguments are those of a training
    call with a prompt table for all sequences, or of a decode call, with aligned pointers and strides.
    """
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
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[(i,)] = "constexpr", constants[argument]
        elif argument in VIEWS:
            signature[argument] = View(element, "i32", "i32", "i32")
            attributes.update({(i, j): ALIGNED for j in range(4)})
        elif argument.endswith("_ptr"):
            is_float = argument in FLOAT32 or argument.startswith("partial_")
            signature[argument] = "*fp32" if is_float else "*i32" if argument in INT32 else element
            attributes[(i,)] = ALIGNED
        else:
            signature[argument] = "fp32" if argument.startswith(("scale", "cap_")) else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if config.max_registers:
        options["maxnreg"] = config.max_registers
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options), config
