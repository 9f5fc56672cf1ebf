"""From an operator's arguments to kernel launches: allocations, grids, tiles. Torch on the host side, no arithmetic.

Each operator describes its call once, as a dictionary of operands by name, and each kernel takes those that it names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ...call import CALL, CacheCall, Call, batched, from_backward_arguments
from . import configs, kept, tuning
from .backward import zinit_grad_key_value_kernel, zinit_grad_query_kernel
from .cache import zinit_append_kernel
from .configs import Config, block_of
from .decode import splits_together, zinit_combine_kernel, zinit_decode_kernel
from .forward import zinit_forward_kernel
from .kept import Recorder
from .operands import (
    Operands,
    addressable,
    arch_of,
    cache_operands,
    has_no_prompts,
    key_operands,
    num_processors,
    prompt_operands,
    query_operands,
    view_of,
)
from .primitives import LOG2E
from .prompt_gradients import zinit_add_partials_kernel, zinit_partial_sums_kernel
from .ranges import named

_PARTIAL_ELEMENTS = 8192  # of dpk and of dpv that one program accumulates: 64 KB of registers together
_PARTIAL_ROWS = 64  # queries in the unit that the partial sums are dealt in
_ADD_PARTIALS = Config(0, 0, 1, 1)  # one warp: a thread adds up its columns, and none through shared memory
_APPEND = Config(0, 0, 4, 1)
_BLOCK_E = 128
_BLOCK_T = 16  # new tokens of a tile
_MOST_FUSED = _BLOCK_T  # new tokens that the decode kernel appends by itself
_MOST_SPLITS = 64


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """`zinit::forward_triton`."""
    return kept.run("forward", arguments[0], arguments, _forward)


def _forward(recorder: Recorder, *arguments: Any) -> tuple[Tensor, Tensor]:
    call = Call(*arguments)
    query = call.query
    out = recorder.token_major_like(query)
    lse = recorder.empty(query, query.shape[:3], torch.float32)
    sign, scale_log2 = _sign_and_size(call.scale)
    columns = query.shape[1] * call.batch_size
    operands = query_operands(call) | key_operands(call) | prompt_operands(call)
    operands |= {
        "out": view_of(out),
        "lse_ptr": lse,
        "scale_log2": scale_log2,
        "SCALE_SIGN": sign,
        **_cap(abs(call.scale), call.softcap),
    }

    def launch(config: Config) -> None:
        programs = triton.cdiv(call.max_seqlen_q, config.block_m) * columns
        _launch(recorder, zinit_forward_kernel, programs, operands, config)

    if call.max_seqlen_q * columns:
        with torch.cuda.device_of(query), named("forward"):
            _run("forward", query, operands, columns, launch)
    return out, lse


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """`zinit::backward_triton`. What is not wanted is neither allocated nor computed."""
    return kept.run("backward", arguments[0], arguments, _backward)


def _backward(recorder: Recorder, *arguments: Any) -> list[Tensor | None]:
    saved, call, needs = from_backward_arguments(arguments)
    grads = {
        name: _empty_gradient(recorder, call, name, needs >> i & 1)
        for i, name in enumerate(CALL.differentiable)
    }
    operands = query_operands(call) | key_operands(call) | prompt_operands(call)
    operands |= {
        "out": view_of(saved.out),
        "lse_ptr": saved.lse,
        "grad_out": view_of(addressable(saved.grad_out)),
        "grad_lse_ptr": saved.grad_lse,
        "grad_query": view_of(grads["query"]),
        "grad_key": view_of(grads["key"]),
        "grad_value": view_of(grads["value"]),
        "grad_prompt_key_ptr": grads["prompt_key"],
        "grad_prompt_value_ptr": grads["prompt_value"],
        "grad_gate_ptr": grads["gate"],
        "grad_sinks_ptr": grads["sinks"],
        "delta_ptr": None,
        "scale": call.scale,
        "scale_log2": call.scale * LOG2E.value,
        **_cap(call.scale, call.softcap),
    }
    heads_q, heads_kv = (call.batch_size * tensor.shape[1] for tensor in (call.query, call.key))

    def launch_key_value(config: Config) -> None:
        programs = triton.cdiv(call.max_seqlen_k, config.block_n) * heads_kv
        _launch(recorder, zinit_grad_key_value_kernel, programs, operands, config)

    def launch_query(config: Config) -> None:
        programs = triton.cdiv(call.max_seqlen_q, config.block_m) * heads_q
        _launch(recorder, zinit_grad_query_kernel, programs, operands, config)

    with torch.cuda.device_of(call.query):
        delta = saved.lse.shape if grads["query"] is not None or grads["key"] is not None else None
        operands["delta_ptr"] = _prompt_gradients(recorder, call, operands, heads_q, delta)
        if call.max_seqlen_k * heads_q > 0 and (grads["key"] is not None or grads["value"] is not None):
            with named("backward.key_value"):
                _run("grad_key_value", call.query, operands, heads_q, launch_key_value)
        if call.max_seqlen_q * heads_q > 0 and grads["query"] is not None:
            with named("backward.query"):
                _run("grad_query", call.query, operands, heads_q, launch_query)
    return list(grads.values())


def _empty_gradient(recorder: Recorder, call: Call, name: str, wanted: int) -> Tensor | None:
    """Where the gradient of a differentiable argument is written; None where it is not wanted."""
    tensor = getattr(call, name)
    if tensor is None or not wanted:
        return None
    if batched(name):
        return recorder.token_major_like(tensor)
    # the last step of the prompt gradients writes all of them, if there are prompts
    return recorder.zeros_like(tensor) if has_no_prompts(call) else recorder.empty_like(tensor)


def _prompt_gradients(
    recorder: Recorder, call: Call, operands: Operands, heads_q: int, delta_shape: Sequence[int] | None
) -> Tensor | None:
    """Fills and returns delta, where it is wanted, and fills the gradients of the prompts, the gate and the sinks.

    heads_q: query heads of all sequences together.
    """
    wanted = [operands[f"grad_{name}_ptr"] for name in ("prompt_key", "prompt_value", "gate")]
    wants_prompt = operands["gate_ptr"] is not None and any(grad is not None for grad in wanted)
    grad_sinks = operands["grad_sinks_ptr"]
    if delta_shape is None and grad_sinks is None and not wants_prompt:
        return None
    query, prompt_length = call.query, operands["prompt_length"]
    head_dim, sequences = query.shape[3], call.batch_size
    block_d, block_p = block_of(head_dim), operands["BLOCK_P"]
    parts = num_parts(triton.cdiv(call.max_seqlen_q, _PARTIAL_ROWS), heads_q)
    slots, table = (sequences, query.shape[1], parts), (prompt_length, head_dim)
    shapes: list[Sequence[int] | None] = [
        slots + shape if wants_prompt and grad is not None else None
        for grad, shape in zip(wanted, (table, table, ()), strict=True)
    ]
    kept_longer = [None if grad_sinks is None else slots, delta_shape]
    # The partials are read before the query's gradient is written: at 32 x 512 tokens they are 2 % of all gradients.
    partials = recorder.scratch_in(operands["grad_query"].ptr, shapes)
    if partials is None:
        *partials, partial_sinks, delta = recorder.scratch(query, [*shapes, *kept_longer])
    else:
        partial_sinks, delta = recorder.scratch(query, kept_longer)
    partial_key, partial_value, partial_gate = partials
    wants_table = partial_key is not None or partial_value is not None
    chunk_d = min(block_d, _PARTIAL_ELEMENTS // block_p) if wants_table else block_d
    operands = operands | {
        "delta_ptr": delta,
        "partial_key_ptr": partial_key,
        "partial_value_ptr": partial_value,
        "partial_gate_ptr": partial_gate,
        "partial_sinks_ptr": partial_sinks,
        "num_parts": parts,
        "num_sequences": sequences,
        "CHUNK_D": chunk_d,
        "BLOCK_E": _BLOCK_E,
        "BLOCK_S": 16,
    }

    def launch(config: Config) -> None:
        _launch(recorder, zinit_partial_sums_kernel, parts * (block_d // chunk_d) * heads_q, operands, config)

    if heads_q:
        with named("backward.prompt_sums"):
            _run("prompt_gradients", query, operands, heads_q, launch)
    if partial_sinks is not None:
        recorder.add_up(partial_sinks, grad_sinks)
    if wants_prompt:
        tiles = triton.cdiv(prompt_length * head_dim, _BLOCK_E)  # the kernel counts them so, wanted or not
        programs = tiles * call.key.shape[1] * operands["prompt_rows"]
        with named("backward.prompt_finish"):
            _launch(recorder, zinit_add_partials_kernel, programs, operands, _ADD_PARTIALS)
    return delta


def decode(*arguments: Any) -> tuple[Tensor, ...]:
    """`zinit::decode_triton`. Reads nothing back from the device: safe to capture in a graph."""
    return kept.run("decode", arguments[0], arguments, _decode)


def _decode(recorder: Recorder, *arguments: Any) -> tuple[Tensor, Tensor]:
    call = CacheCall(*arguments).head_major()
    if call.new_key is not None and 0 in call.new_key.shape:
        call = call._replace(new_key=None, new_value=None)
    query = call.query
    result = recorder.empty(query, arguments[0].shape)
    out = result.transpose(1, 2)
    lse = recorder.empty(query, query.shape[:3], torch.float32)
    sequences, heads_q, seqlen_q, _ = query.shape
    heads_kv = call.key_cache.shape[1]
    rows, columns = seqlen_q * (heads_q // heads_kv), heads_kv * sequences
    sign, scale_log2 = _sign_and_size(call.scale)
    operands = cache_operands(call) | prompt_operands(call)
    operands |= {
        "query": view_of(query),
        "new_key": view_of(call.new_key),
        "new_value": view_of(call.new_value),
        "out": view_of(out),
        "lse_ptr": lse,
        "num_heads_q": heads_q,
        "seqlen_q": seqlen_q,
        "scale_log2": scale_log2,
        "SCALE_SIGN": sign,
        **_cap(abs(call.scale), call.softcap),
        "ONE_TOKEN": seqlen_q == 1,
        "ADVANCE": call.window_left >= 0 or call.window_right >= 0,
        "BLOCK_T": _BLOCK_T,
    }

    def launch(config: Config) -> None:
        programs = triton.cdiv(rows, config.block_m) * columns
        key_blocks = triton.cdiv(operands["capacity"], config.block_n)
        together = splits_together(operands["HEAD_DIM"], 8 * query.element_size())
        splits = call.num_splits or choose_splits(programs, key_blocks, num_processors(query), together)
        partial_out = partial_lse = None
        if splits > 1:
            partial_out = recorder.empty(query, (splits, *query.shape), torch.float32)
            partial_lse = recorder.empty(query, (*query.shape[:3], splits), torch.float32)
        split = {"partial_out_ptr": partial_out, "partial_lse_ptr": partial_lse, "num_splits": splits}
        _launch(recorder, zinit_decode_kernel, splits * programs, operands | split, config)
        if splits > 1:
            split |= {"scale_log2": call.scale * LOG2E.value, **_cap(call.scale, call.softcap)}
            config = _candidates("combine", query, operands)[0]
            programs = triton.cdiv(rows, config.block_m) * columns
            _launch(recorder, zinit_combine_kernel, programs, operands | split, config)

    with torch.cuda.device_of(query):
        # A long chunk is rotated once, by a launch of its own: in the decode kernel every tile of queries would do it.
        if call.new_key is not None and (operands["seqlen_new"] > _MOST_FUSED or not rows):
            with named("decode.append"):
                programs = triton.cdiv(operands["seqlen_new"], _BLOCK_T) * columns
                _launch(recorder, zinit_append_kernel, programs, operands, _APPEND)
            operands |= {"new_key": view_of(None), "new_value": view_of(None)}
        if rows * columns:
            with named("decode"):
                _run("decode" if seqlen_q == 1 else "extend", query, operands, columns, launch)
    return result, lse


def num_parts(tiles: int, columns: int) -> int:
    """Into how many parts the query tiles are dealt for the partial sums; a function of the shape alone.

    Enough programs for every chip (512), and partials a thousandth of the queries they sum.
    """
    return max(1, min(tiles, triton.cdiv(512, max(columns, 1))))


@functools.lru_cache(maxsize=1024)
def choose_splits(programs: int, key_blocks: int, processors: int, together: int) -> int:
    """Pieces of the keys: those that end soonest, in times that a program takes for one block of keys.

    Two programs run on a multiprocessor. The launch that combines the pieces takes 7 of these times, and one more for
    each `together` pieces: projections for an H200 (bench project), no GPU has timed them. From the capacity of the
    cache alone: the lengths are on the device, and a captured graph keeps its grid.
    """

    def cost(splits: int) -> int:
        waves = triton.cdiv(splits * programs, 2 * processors)
        combination = 7 + triton.cdiv(splits, together) if splits > 1 else 0
        return waves * triton.cdiv(key_blocks, splits) + combination

    return min(range(1, max(2, min(key_blocks // 2, _MOST_SPLITS) + 1)), key=cost)


def _sign_and_size(scale: float) -> tuple[int, float]:
    """The scale as forward and decode take it: its sign, and its size times log2(e), which is never 0."""
    if abs(scale) < 1e-37:  # 0, or so small that float32 may flush it
        return 0, 1.0
    return (1 if scale > 0 else -1), abs(scale) * LOG2E.value


def _cap(scale: float, softcap: float) -> Operands:
    """A soft cap as the kernels take it: scale / softcap in float32's range, and softcap."""
    if not softcap:
        return {"cap_scale": None, "cap_size": None}
    return {"cap_scale": max(-3e38, min(scale / softcap, 3e38)), "cap_size": softcap}


def _run(
    stage: str, query: Tensor, operands: Operands, columns: int, launch: Callable[[Config], None]
) -> None:
    """Launches a stage with the configuration for its sizes and chip. columns: heads of all sequences together."""
    candidates = _candidates(stage, query, operands)
    key = (stage, query.device, query.dtype, *tuning.key_of(operands, columns)) if tuning.ENABLED else ()
    tuning.run(key, candidates, launch)


def _candidates(stage: str, query: Tensor, operands: Operands) -> tuple[Config, ...]:
    block_d, block_p = block_of(operands["HEAD_DIM"]), operands["BLOCK_P"]
    if stage == "grad_key_value":  # reads no prompts
        block_p = block_of(0)
    return configs.candidates(stage, block_d, block_p, query.element_size(), arch_of(query))


def _launch(recorder: Recorder, kernel: Any, programs: int, operands: Operands, config: Config) -> None:
    """Launches a kernel with those of the operands that are its parameters."""
    operands = operands | {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    taken = {name: operands[name] for name in _parameters(kernel)}
    # fused multiply-adds are named because Triton 3.10 turns its default around
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if config.max_registers:
        options["maxnreg"] = config.max_registers
    recorder.launch(kernel, programs, taken, options)


@functools.cache
def _parameters(kernel: Any) -> tuple[str, ...]:
    """Triton makes a new list of them at every look, which costs 30 us."""
    return tuple(kernel.arg_names)
