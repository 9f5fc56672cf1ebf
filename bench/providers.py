"""Who computes a problem: this package's backends, what users write without them, other libraries, plain attention.

A provider that cannot run a problem says why; a library that is not installed is named once and left out.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import cache, partial

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zinit_kernels import explain, zero_init_attention, zero_init_attention_with_kvcache

from .machine import why_missing
from .problem import Call, Problem, Provider, make_problem

PAGE = 64  # keys in a page
BACKENDS = ("cpu", "triton", "cuda")
PLAIN, TWICE = "plain SDPA", "SDPA twice + add"
# ends of this package's names: the token branch alone, a paged cache, and prompts of its own for each sequence
WITHOUT_PROMPTS, PAGED, EACH = ", no prompts", ", paged", ", an adapter each"
Prepare = Callable[[Problem], Call]
WhyNot = Callable[[Problem, bool], str]


def official(query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor, gate: Tensor,
             mask: Tensor | None) -> Tensor:  # fmt: skip
    """Equations 6 to 8 of the paper as written: one row of scores, whose two parts have a softmax each."""
    batch, heads = query.shape[:2]
    group = heads // key.shape[1]
    prompt_key, prompt_value = (t.expand(batch, -1, -1, -1) for t in (prompt_key, prompt_value))
    keys = torch.cat([prompt_key, key], 2).repeat_interleave(group, 1)
    values = torch.cat([prompt_value, value], 2).repeat_interleave(group, 1)
    scores = query @ keys.mT / math.sqrt(query.shape[-1])
    prompts, tokens = scores.split([prompt_key.shape[2], key.shape[2]], -1)
    if mask is not None:
        tokens = tokens + mask
    prompts = prompts.float().softmax(-1) * gate.tanh()[:, None, None]
    return torch.cat([prompts, tokens.float().softmax(-1)], -1).to(query.dtype) @ values


def causal_mask(problem: Problem) -> Tensor | None:
    """Additive [T, S]; None where every query sees every key."""
    shape = problem.shape
    if not shape.causal or shape.seqlen_q == 1:
        return None
    hidden = torch.full(
        (shape.seqlen_q, shape.seqlen_k), -math.inf, device=problem.device, dtype=problem.dtype
    )
    return hidden.triu(1 + shape.seqlen_k - shape.seqlen_q)


def sdpa_over_prompts(query: Tensor, prompt_key: Tensor, prompt_value: Tensor, grouped: bool) -> Tensor:
    tables = (t.expand(query.shape[0], -1, -1, -1) for t in (prompt_key, prompt_value))
    return F.scaled_dot_product_attention(query, *tables, enable_gqa=grouped)


def sdpa_twice(query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor, gate: Tensor,
               is_causal: bool) -> Tensor:  # fmt: skip
    """What a careful user writes without a fused kernel."""
    grouped = query.shape[1] != key.shape[1]
    tokens = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=grouped)
    prompts = sdpa_over_prompts(query, prompt_key, prompt_value, grouped)
    return tokens + gate.tanh().to(query.dtype)[:, None, None] * prompts


def twice(problem: Problem) -> Call:
    return partial(sdpa_twice, *problem.tensors, is_causal=problem.shape.causal and not problem.is_decode)


def written_out(problem: Problem) -> Call:
    return partial(official, *problem.tensors, mask=causal_mask(problem))


def plain_sdpa(problem: Problem) -> Call:
    grouped = problem.shape.heads_q != problem.shape.heads_kv
    is_causal = problem.shape.causal and not problem.is_decode
    return partial(
        F.scaled_dot_product_attention, *problem.tensors[:3], is_causal=is_causal, enable_gqa=grouped
    )


def plain_sdpa_by(kernel: SDPBackend, problem: Problem) -> Call:
    call = plain_sdpa(problem)

    def run() -> Tensor:
        with sdpa_kernel(kernel):
            return call()

    return run


def cannot_run(prepare: Prepare, problem: Problem, backward: bool) -> str:
    """Tries a sibling of the problem: SDPA refuses a kernel only by an error when it is called."""
    small = make_problem(problem.shape.sibling(), problem.dtype, problem.device, problem.layout)
    if backward:
        small = small.with_tensors(*(t.requires_grad_() for t in small.tensors))
    try:
        out = prepare(small)()
        if backward:
            out.sum().backward()
    except Exception as error:  # any: a library's refusal is the answer
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""


def by_trying(prepare: Prepare, module: str = "torch") -> WhyNot:
    """Whether `module` is installed, and a sibling of the problem runs."""
    return lambda problem, backward: why_missing(module) or cannot_run(prepare, problem, backward)


def fused(backend: str, prompted: bool, problem: Problem) -> Call:
    tensors = problem.tensors if prompted else problem.tensors[:3]
    return partial(zero_init_attention, *tensors, is_causal=problem.shape.causal, backend=backend)


def fused_why_not(backend: str, problem: Problem, backward: bool) -> str:
    tensors = problem.tensors
    if backward:
        tensors = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    try:
        reason = explain(*tensors, is_causal=problem.shape.causal).get(backend, "no such backend")
    except ValueError as error:
        return str(error)
    return "" if reason == "usable" else reason


def cached(backend: str, variant: str, problem: Problem) -> Call:
    """The cache function; caches, lengths and tables are made before the clock starts."""
    shape, device = problem.shape, problem.device
    query, key, value, *prompts = (t.transpose(1, 2) for t in problem.tensors[:5])
    gate = problem.gate
    lengths = torch.full((shape.batch,), shape.seqlen_k, dtype=torch.int32, device=device)
    options = {"cache_seqlens": lengths, "causal": True}
    if variant == EACH:  # equal values in memory of their own
        prompts = [t.repeat(shape.batch, 1, 1, 1) for t in prompts]
        gate = gate.repeat(shape.batch, 1)
    if variant != WITHOUT_PROMPTS:
        options |= {"prompt_k": prompts[0], "prompt_v": prompts[1], "gate": gate}
    if variant == PAGED:
        key, value = (paged_copy(t) for t in (key, value))
        pages = key.shape[0] // shape.batch
        table = torch.arange(shape.batch * pages, dtype=torch.int32, device=device)
        options["block_table"] = table.view(shape.batch, pages)
    nothing = {"prompt_k": None, "prompt_v": None, "gate": None}
    return partial(
        zero_init_attention_with_kvcache, query, key, value, backend=backend, **{**nothing, **options}
    )


def paged_copy(cache: Tensor) -> Tensor:
    """[B, S, Hkv, D] as pages [B * pages, PAGE, Hkv, D]; the last page of a sequence is filled with zeros."""
    missing = -cache.shape[1] % PAGE
    return F.pad(cache, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, PAGE)).flatten(0, 1)


def cached_why_not(backend: str, variant: str, problem: Problem, backward: bool) -> str:
    call = cached(backend, variant, problem)
    assert isinstance(call, partial)
    keywords = {name: value for name, value in call.keywords.items() if name != "backend"}
    reason = explain(*call.args, **keywords).get(backend, "no such backend")
    return "" if reason == "usable" else reason


def fixed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile for exactly the shapes of the first call."""
    # dynamo counts compilations by function; after 8 it would run this one eagerly, and only log that
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(function, dynamic=False)


def compiled(prepare: Prepare) -> Prepare:
    """The call under torch.compile, compiled for each problem."""

    def prepare_compiled(problem: Problem) -> Call:
        call = prepare(problem)
        assert isinstance(call, partial)
        return partial(fixed(call.func), *call.args, **call.keywords)

    return prepare_compiled


def compiler_why_not(problem: Problem, backward: bool) -> str:
    if problem.device.type == "cpu" and shutil.which("g++") is None:
        return "torch.compile needs g++ on a CPU"
    return ""


def flex_twice(problem: Problem) -> Call:
    """FlexAttention over the tokens, SDPA over the prompts."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape, attend = problem.shape, fixed(flex_attention)
    block_mask = None
    if shape.causal:
        block_mask = create_block_mask(
            lambda b, h, q, k: q >= k, None, None, shape.seqlen_q, shape.seqlen_k, device=problem.device.type
        )
    grouped = shape.heads_q != shape.heads_kv

    def run() -> Tensor:
        query, key, value, prompt_key, prompt_value, gate = problem.tensors
        tokens = attend(query, key, value, block_mask=block_mask, enable_gqa=grouped)
        prompts = sdpa_over_prompts(query, prompt_key, prompt_value, grouped)
        return tokens + gate.tanh().to(query.dtype)[:, None, None] * prompts

    return run


def flex_why_not(problem: Problem, backward: bool) -> str:
    if backward and problem.device.type == "cpu":
        return "FlexAttention has no backward on a CPU"
    return compiler_why_not(problem, backward)


def flash_twice(problem: Problem) -> Call:
    """flash-attn over the tokens and over the prompts; its tensors are token-major."""
    from flash_attn import flash_attn_func

    batch = problem.shape.batch

    def run() -> Tensor:
        query, key, value, prompt_key, prompt_value, gate = (
            t.transpose(1, 2) if t.dim() == 4 else t for t in problem.tensors
        )
        tokens = flash_attn_func(query, key, value, causal=problem.shape.causal)
        prompts = flash_attn_func(
            query, prompt_key.expand(batch, -1, -1, -1), prompt_value.expand(batch, -1, -1, -1)
        )
        return tokens + gate.tanh().to(query.dtype)[:, None] * prompts

    return run


def xformers_twice(problem: Problem) -> Call:
    """xformers over the tokens and over the prompts; token-major, with key heads repeated to the query's."""
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    bias = LowerTriangularMask() if problem.shape.causal and not problem.is_decode else None
    batch, group = problem.shape.batch, problem.shape.heads_q // problem.shape.heads_kv

    def run() -> Tensor:
        query, *rest, gate = problem.tensors
        key, value, prompt_key, prompt_value = (
            t.repeat_interleave(group, 1).expand(batch, -1, -1, -1).transpose(1, 2) for t in rest
        )
        tokens = memory_efficient_attention(query.transpose(1, 2), key, value, attn_bias=bias)
        prompts = memory_efficient_attention(query.transpose(1, 2), prompt_key, prompt_value)
        return tokens + gate.tanh().to(query.dtype)[:, None] * prompts

    return run


def flash_cached_twice(problem: Problem) -> Call:
    """flash-attn's cache function over the tokens and over the prompts."""
    from flash_attn import flash_attn_with_kvcache

    shape = problem.shape
    query, key, value, prompt_key, prompt_value = (t.transpose(1, 2) for t in problem.tensors[:5])
    lengths = torch.full((shape.batch,), shape.seqlen_k, dtype=torch.int32, device=problem.device)
    prompt_key, prompt_value = (
        t.expand(shape.batch, -1, -1, -1).contiguous() for t in (prompt_key, prompt_value)
    )
    gate = problem.gate.tanh().to(problem.dtype)[:, None]

    def run() -> Tensor:
        tokens = flash_attn_with_kvcache(query, key, value, cache_seqlens=lengths, causal=True)
        return tokens + gate * flash_attn_with_kvcache(query, prompt_key, prompt_value)

    return run


def flashinfer_twice(problem: Problem) -> Call:
    """flashinfer's decode of a single sequence over the tokens and over the prompts."""
    import flashinfer

    query = problem.query[0, :, 0]
    key, value, prompt_key, prompt_value = (t[0].transpose(0, 1) for t in problem.tensors[1:5])
    gate = problem.gate.tanh().to(problem.dtype)[:, None]

    def run() -> Tensor:
        tokens = flashinfer.single_decode_with_kv_cache(query, key, value)
        prompts = flashinfer.single_decode_with_kv_cache(query, prompt_key, prompt_value)
        return (tokens + gate * prompts)[None, None]

    return run


def flashinfer_why_not(problem: Problem, backward: bool) -> str:
    if reason := why_missing("flashinfer"):
        return reason
    if problem.shape.batch > 1:
        return "flashinfer's call without a plan takes one sequence"
    return cannot_run(flashinfer_twice, problem, backward)


# plain attention, by torch's own choice of kernel and by each kernel
PLAIN_ATTENTION: dict[str, Prepare] = {
    PLAIN: plain_sdpa,
    f"{PLAIN}, flash": partial(plain_sdpa_by, SDPBackend.FLASH_ATTENTION),
    f"{PLAIN}, cuDNN": partial(plain_sdpa_by, SDPBackend.CUDNN_ATTENTION),
    f"{PLAIN}, efficient": partial(plain_sdpa_by, SDPBackend.EFFICIENT_ATTENTION),
    f"{PLAIN}, math": partial(plain_sdpa_by, SDPBackend.MATH),
}


@cache
def prefill_providers() -> tuple[Provider, ...]:
    """For whole sequences, forward and backward."""
    ours = [
        Provider(
            f"zinit {name}{variant}", partial(fused, name, not variant), partial(fused_why_not, name),
            prompted=not variant,
        )
        for variant in ("", WITHOUT_PROMPTS)
        for name in BACKENDS
    ]  # fmt: skip
    ours.append(Provider("zinit hybrid", partial(fused, "hybrid", True), partial(fused_why_not, "hybrid")))
    plain = [
        Provider(name, make, by_trying(make), prompted=False, quadratic=name.endswith("math"))
        for name, make in PLAIN_ATTENTION.items()
    ]
    return (
        *ours,
        *plain,
        Provider(TWICE, twice),
        Provider(f"{TWICE}, compiled", compiled(twice), compiler_why_not, compiles=True),
        Provider("official formula", written_out, quadratic=True),
        Provider(
            "official formula, compiled", compiled(written_out), compiler_why_not, compiles=True, quadratic=True
        ),
        Provider("FlexAttention + SDPA + add", flex_twice, flex_why_not, compiles=True),
        Provider("flash-attn twice + add", flash_twice, by_trying(flash_twice, "flash_attn"), heads_first=False),
        Provider("xformers twice + add", xformers_twice, by_trying(xformers_twice, "xformers"), heads_first=False),
    )  # fmt: skip


@cache
def decode_providers() -> tuple[Provider, ...]:
    """For one new token per sequence against a cache."""
    ours = [
        Provider(
            f"zinit {name}{variant}", partial(cached, name, variant), partial(cached_why_not, name, variant),
            prompted=variant != WITHOUT_PROMPTS, heads_first=False, batches_only=variant == EACH,
        )
        for name in BACKENDS
        for variant in ("", WITHOUT_PROMPTS, PAGED, EACH)
    ]  # fmt: skip
    return (
        *ours,
        Provider(PLAIN, plain_sdpa, prompted=False),
        Provider(TWICE, twice),
        Provider(f"{TWICE}, compiled", compiled(twice), compiler_why_not, compiles=True),
        Provider("official formula", written_out),
        Provider(
            "flash-attn twice + add", flash_cached_twice, by_trying(flash_cached_twice, "flash_attn"),
            heads_first=False,
        ),
        Provider("flashinfer twice + add", flashinfer_twice, flashinfer_why_not, heads_first=False),
    )  # fmt: skip
