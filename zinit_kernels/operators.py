"""The registered operators: their schemas and fake kernels, made from the fields of `call.py`.

One operator per stage and backend, `zinit::<stage>_<backend>`:

    forward(Call) -> (out, lse)             out [B, Hq, T, D], stored [B, T, Hq, D], in the query's dtype;
                                            lse float32 [B, Hq, T], natural logarithm of the token branch's sum with
                                            its sink, -inf for a query without keys and sink
    backward(Saved, Call, needs) -> grads   one for each differentiable field, as `call.batched` says; bit i of `needs`
                                            asks for the i-th, one not asked for comes back with no elements
    decode(CacheCall) -> (out, lse)         out [B, T, Hq, D] contiguous; writes the caches
    prompt(PromptCall) -> ()                adds onto out

and, on the CPU alone, what decoding does around attention:

    linear -> out                           out [M, rows]: input [M, K] times a transposed weight, plain [rows, K] or
                                            packed by a scheme (`packed.py`); of up to 32 rows in one pass over it
    unpack -> out                           a packed weight's numbers, or those of some of its rows, in like's dtype
    decode_layers -> out                    out [B, T, C]: the next T tokens of B cached sequences through all layers
                                            of a LLaMA and its last norm (`model/decoding.py`); writes the caches,
                                            [L, B, S, Hkv, D] or, with a block_table [B, columns], pages
                                            [L, pages, page size, Hkv, D]; two rows may be of one sequence
    prefill_layers -> out                   the same for the first tokens of B packed sequences, input [total, C]; out
                                            [total, C], or [B, C] of each one's last token; needs AVX-512
    choose -> tokens                        int64 [B], one for each row of logits, -1 where the largest is no finite
                                            number: the likeliest, or drawn by a seed of int64 (`model/choice.py`)

For many tokens, `keep_layers` takes the arguments of decode_layers once, with the embedding and the head, and returns a
number. `decode_kept` takes that number, tokens [B, T] and what belongs to these sequences; it returns the logits
[B * T, vocab_size] and of each row the first of the largest, or -1 where that is no finite number; it adds T to
cache_seqlens. A cache of pages serves other sequences with every call. `drop_layers` frees what the
number stands for. Between the two the tensors must keep their memory. None of the three can be traced.

and what a training step does between its matrix products (`rows.py`): rms_norm, swiglu, rotate, cross_entropy, and the
gradients of the first two.

They are defined here, in Python, so that they exist without any native file. The compiled libraries and the Triton room
register their kernels for them; `backends/fused.py` puts autograd around them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .call import CACHE_CALL, CALL, PROMPT_CALL, SAVED, CacheCall, Call, batched, from_backward_arguments

NAMESPACE = "zinit"
STAGES = {
    "cpu": ("forward", "backward", "decode"),
    "triton": ("forward", "backward", "decode"),
    "cuda": ("forward", "decode", "prompt"),
    "hybrid": ("forward", "backward"),
}
SCHEMAS = {
    "forward": f"({CALL.parameters}) -> (Tensor out, Tensor lse)",
    "backward": f"({SAVED.parameters}, {CALL.parameters}, int needs) -> "
    f"({', '.join(f'Tensor grad_{name}' for name in CALL.differentiable)})",
    "decode": f"({CACHE_CALL.parameters}) -> (Tensor out, Tensor lse)",
    "prompt": f"({PROMPT_CALL.parameters}) -> ()",
}
# What a model does around attention, on the CPU alone. See `packed.py`, `rows.py` and `model/decoding.py`.
AROUND = {
    "linear": "(Tensor input, Tensor weight, int rows, int scheme) -> Tensor",
    "unpack": "(Tensor weight, int rows, int columns, int scheme, Tensor? indices, Tensor like) -> Tensor",
    "decode_layers": "(Tensor input, Tensor[] weights, int[] schemes, Tensor final_norm, float eps, int num_heads_q, "
    "int num_heads_kv, int intermediate, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_seqlens, "
    "Tensor? block_table, Tensor rotary_cos, Tensor rotary_sin, Tensor[] prompts, int[] prompt_layers, "
    "Tensor? prompt_index, float scale, int window_left, bool tanh_gate) -> Tensor",
    "prefill_layers": "(Tensor input, Tensor[] weights, int[] schemes, Tensor final_norm, float eps, int num_heads_q, "
    "int num_heads_kv, int intermediate, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cu_seqlens, "
    "Tensor rotary_cos, Tensor rotary_sin, Tensor[] prompts, int[] prompt_layers, Tensor? prompt_index, float scale, "
    "int window_left, bool tanh_gate, bool last) -> Tensor",
    "choose": "(Tensor logits, float temperature, float top_p, Tensor seeds) -> Tensor",
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> (Tensor out, Tensor rstd)",
    "rms_norm_backward": "(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> Tensor",
    "swiglu": "(Tensor gate, Tensor up) -> Tensor",
    "swiglu_backward": "(Tensor grad, Tensor gate, Tensor up) -> (Tensor grad_gate, Tensor grad_up)",
    "rotate": "(Tensor x, Tensor cos, Tensor sin, bool backwards) -> Tensor",
    "cross_entropy": "(Tensor(a!) logits, Tensor targets, bool wants_gradient) -> Tensor",
}
# On the CPU alone: the arguments of `decode_layers` but those that every token has anew
LAYERS = {
    "keep_layers": "(Tensor[] weights, int[] schemes, Tensor final_norm, float eps, int num_heads_q, int num_heads_kv, "
    "int intermediate, Tensor key_cache, Tensor value_cache, Tensor rotary_cos, Tensor rotary_sin, Tensor[] prompts, "
    "int[] prompt_layers, float scale, int window_left, bool tanh_gate, Tensor embedding, int embedding_scheme, "
    "Tensor head, int head_scheme, int vocab_size) -> int",
    "decode_kept": "(int layers, Tensor tokens, Tensor(a!) cache_seqlens, Tensor? block_table, Tensor? prompt_index) "
    "-> (Tensor logits, Tensor likeliest)",
    "drop_layers": "(int layers) -> ()",
}
NAMES = {
    "forward": CALL.names,
    "backward": (*SAVED.names, *CALL.names, "needs"),
    "decode": CACHE_CALL.names,
    "prompt": PROMPT_CALL.names,
    **{stage: tuple(re.findall(r"(\w+)[,)]", schema.partition("->")[0])) for stage, schema in AROUND.items()},
}


def token_major_like(tensor: Tensor) -> Tensor:
    """[B, H, T, D] stored as [B, T, H, D]: a following projection reads it without a copy."""
    batch, heads, seqlen, head_dim = tensor.shape
    return tensor.new_empty((batch, seqlen, heads, head_dim)).transpose(1, 2)


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    query = Call(*arguments).query
    return token_major_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    _, call, needs = from_backward_arguments(arguments)
    grads = []
    for i, name in enumerate(CALL.differentiable):
        tensor = getattr(call, name)
        if tensor is None or not needs >> i & 1:
            grads.append(call.query.new_empty((0,), dtype=torch.float32))
        else:
            grads.append(token_major_like(tensor) if batched(name) else tensor.new_empty(tensor.shape))
    return tuple(grads)


def _decode_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    query = CacheCall(*arguments).query
    batch, seqlen, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, seqlen), dtype=torch.float32)


_FAKES: dict[str, Callable[..., Any]] = {
    "forward": _forward_fake,
    "backward": _backward_fake,
    "decode": _decode_fake,
    "prompt": lambda *arguments: None,
    "linear": lambda input, weight, rows, scheme: input.new_empty((input.shape[0], rows)),
    "unpack": lambda weight, rows, columns, scheme, indices, like: like.new_empty(
        (rows if indices is None else indices.shape[0], columns)
    ),
    "decode_layers": lambda input, *others: input.new_empty(input.shape),
    "prefill_layers": lambda input, *others: input.new_empty(
        (others[9].shape[0] - 1, input.shape[1]) if others[-1] else input.shape
    ),
    "choose": lambda logits, temperature, top_p, seeds: logits.new_empty(logits.shape[:1], dtype=torch.int64),
    "rms_norm": lambda x, weight, eps: (
        x.new_empty(x.shape),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    ),
    "rms_norm_backward": lambda grad, x, weight, rstd: x.new_empty(x.shape),
    "swiglu": lambda gate, up: gate.new_empty(gate.shape),
    "swiglu_backward": lambda grad, gate, up: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
    "rotate": lambda x, cos, sin, backwards: x.new_empty(x.shape),
    "cross_entropy": lambda logits, targets, wants_gradient: logits.new_empty(
        targets.shape, dtype=torch.float32
    ),
}


def _fake(stage: str) -> Callable[..., Any]:
    """The fake kernel of a stage, for tensors of one device.

    The dispatcher calls a fake as soon as one argument is a meta tensor. Beside tensors with memory that is
    refused: the output would be allocated on their device, and no kernel would write it.
    """

    def fake(*arguments: Any) -> Any:
        tensors = zip(NAMES[stage], arguments, strict=True)
        first, *rest = ((name, given) for name, given in tensors if isinstance(given, Tensor))
        for name, given in rest:
            if given.device != first[1].device:
                raise RuntimeError(
                    f"{name} must be on the device of {first[0]}, {first[1].device}, got {given.device}"
                )
        return _FAKES[stage](*arguments)

    return fake


_KEPT = "_zinit_kernels"


def _define() -> tuple[torch.library.Library, set[str]]:
    """The operators' library, and the names of those that have a Python kernel.

    The process keeps both on `torch.ops.zinit`. Torch lets nobody define an operator twice, so a package that is
    imported again, after `sys.modules` was cleared, takes the operators that are there.
    """
    namespace = getattr(torch.ops, NAMESPACE)
    library: torch.library.Library
    implemented: set[str]
    if kept := vars(namespace).get(_KEPT):
        library, implemented, schemas = kept
        if schemas != SCHEMAS | AROUND | LAYERS:
            raise ImportError(
                "another version of zinit_kernels has defined its operators in this process: start a new one"
            )
        return library, implemented
    implemented = set()
    library = torch.library.Library(NAMESPACE, "DEF")
    for backend, stages in STAGES.items():
        for stage in stages:
            library.define(f"{stage}_{backend}{SCHEMAS[stage]}")
            torch.library.register_fake(f"{NAMESPACE}::{stage}_{backend}", _fake(stage), lib=library)
    for stage, schema in AROUND.items():
        library.define(f"{stage}_cpu{schema}")
        torch.library.register_fake(f"{NAMESPACE}::{stage}_cpu", _fake(stage), lib=library)
    for stage, schema in LAYERS.items():
        library.define(f"{stage}_cpu{schema}")
    setattr(namespace, _KEPT, (library, implemented, SCHEMAS | AROUND | LAYERS))
    return library, implemented


_library, _implemented = _define()


def implement(stage: str, backend: str, kernel: Callable[..., Any], keys: Iterable[str]) -> None:
    """Registers a Python kernel for the dispatch keys, once in a process."""
    name = f"{stage}_{backend}"
    if name not in _implemented:
        _implemented.add(name)
        for key in keys:
            _library.impl(name, kernel, key)


def operator(stage: str, backend: str) -> torch._ops.OpOverload:
    """zinit::<stage>_<backend>."""
    return getattr(getattr(torch.ops, NAMESPACE), f"{stage}_{backend}").default
