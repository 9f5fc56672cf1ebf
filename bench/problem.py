"""One attention call to be measured: its shape, its tensors, and who computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

PROMPTS = 10  # the paper's number of prompts
PRODUCTS = {"forward": 2, "decode": 2, "backward": 5, "forward+backward": 7}  # matrix products in each mode
# the shapes for which providers that use torch.compile are measured, unless --compile says otherwise
COMPILED = ("LLaMA-7B, B 1, T 512", "LLaMA-7B, B 1, S 2048", "LLaMA-7B, B 32, T 512", "LLaMA-7B, B 8, T 2048")


@dataclass(frozen=True)
class Shape:
    """One attention call: T queries against S keys in each of B sequences, and P prompts."""

    name: str
    batch: int
    heads_q: int
    heads_kv: int
    head_dim: int
    seqlen_q: int
    seqlen_k: int
    prompt_length: int = PROMPTS
    causal: bool = True

    @property
    def sizes(self) -> dict[str, int]:
        """The fields as a ledger keeps them."""
        return {name: int(value) for name, value in asdict(self).items() if name != "name"}

    @property
    def pairs(self) -> float:
        """(query, key) pairs per head and sequence: those that the bottom-right causal mask keeps, and the prompts."""
        hidden = self.seqlen_q * (self.seqlen_q - 1) / 2 if self.causal else 0.0
        return self.seqlen_q * self.seqlen_k - hidden + self.seqlen_q * self.prompt_length

    @property
    def scores(self) -> int:
        """Scores of all heads and sequences, masked ones included."""
        return self.batch * self.heads_q * self.seqlen_q * self.seqlen_k

    def flops(self, mode: str) -> float:
        """Useful floating-point operations: two products forward, five backward (one recomputes the scores)."""
        return 2.0 * PRODUCTS[mode] * self.batch * self.heads_q * self.head_dim * self.pairs

    def cache_bytes(self, itemsize: int) -> int:
        """Bytes of all keys and values."""
        return 2 * self.batch * self.seqlen_k * self.heads_kv * self.head_dim * itemsize

    def sibling(self) -> Shape:
        """A small shape for the float64 reference, with the same head_dim and group: an odd length, two key heads."""
        group = self.heads_q // self.heads_kv
        heads_kv, length = min(self.heads_kv, 2), min(self.seqlen_k, 197)
        return replace(
            self, name="sibling", batch=min(self.batch, 2), heads_q=heads_kv * group, heads_kv=heads_kv,
            seqlen_q=min(self.seqlen_q, length), seqlen_k=length,
        )  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """The attention heads of an architecture."""

    heads_q: int
    heads_kv: int
    head_dim: int
    causal: bool = True
    seqlen: int = 0  # where the model fixes it (an image's patches); 0 = any


MODELS = {
    "LLaMA-7B": Heads(32, 32, 128),
    "Llama-3-8B": Heads(32, 8, 128),  # Mistral-7B has the same heads
    "Llama-3.2-1B": Heads(32, 8, 64),
    "Llama-3.2-3B": Heads(24, 8, 128),
    "ViT-B/16": Heads(12, 12, 64, causal=False, seqlen=197),  # CLIP-B/16's vision encoder has the same heads
    "RoBERTa-large": Heads(16, 16, 64, causal=False, seqlen=512),
    "CLIP-B/16 text": Heads(8, 8, 64, seqlen=77),
}


def prefill(model: str, batch: int, seqlen: int = 0, prompt_length: int = PROMPTS) -> Shape:
    """Self-attention over a whole sequence, as in training; `seqlen` 0 = the model's own."""
    heads = MODELS[model]
    length = seqlen or heads.seqlen
    name = f"{model}, B {batch}, T {length}" + ("" if prompt_length == PROMPTS else f", P {prompt_length}")
    return Shape(
        name, batch, heads.heads_q, heads.heads_kv, heads.head_dim, length, length, prompt_length, heads.causal
    )  # fmt: skip


def decode(model: str, batch: int, seqlen: int, prompt_length: int = PROMPTS) -> Shape:
    """One new token in each of `batch` sequences, `seqlen` keys in the cache."""
    heads = MODELS[model]
    name = f"{model}, B {batch}, S {seqlen}" + ("" if prompt_length == PROMPTS else f", P {prompt_length}")
    return Shape(name, batch, heads.heads_q, heads.heads_kv, heads.head_dim, 1, seqlen, prompt_length)


# On a CPU of a few cores a shape may take a second per round; on a GPU it must fill the chip.
PREFILL = {
    "cpu": [
        *(prefill("LLaMA-7B", 1, seqlen) for seqlen in (128, 512, 1024, 2048)),
        prefill("Llama-3-8B", 1, 512),
        prefill("Llama-3.2-1B", 2, 512),
        prefill("Llama-3.2-3B", 1, 512),
        prefill("ViT-B/16", 8),
        prefill("RoBERTa-large", 2),
        prefill("CLIP-B/16 text", 8),
        *(prefill("LLaMA-7B", 1, 512, prompts) for prompts in (1, 32, 128)),
    ],
    "cuda": [
        *(prefill("LLaMA-7B", max(1, 16384 // seqlen), seqlen) for seqlen in (512, 1024, 2048, 4096, 8192)),
        *(prefill("Llama-3-8B", max(1, 16384 // seqlen), seqlen) for seqlen in (512, 2048, 8192)),
        prefill("Llama-3.2-1B", 16, 1024),
        prefill("Llama-3.2-3B", 4, 512),
        prefill("ViT-B/16", 128),
        prefill("RoBERTa-large", 32),
        prefill("CLIP-B/16 text", 256),
        *(prefill("LLaMA-7B", 8, 2048, prompts) for prompts in (1, 32, 128)),
    ],
}
DECODE = {
    "cpu": [
        *(decode("LLaMA-7B", 1, seqlen) for seqlen in (512, 2048, 8192)),
        *(decode("Llama-3-8B", 1, seqlen) for seqlen in (512, 2048, 8192)),
        decode("Llama-3.2-1B", 8, 1024),
    ],
    "cuda": [
        *(decode("Llama-3-8B", 1, seqlen) for seqlen in (1024, 4096, 16384)),
        decode("LLaMA-7B", 1, 4096),
        decode("LLaMA-7B", 32, 4096),
        decode("Llama-3-8B", 32, 4096),
        decode("Llama-3-8B", 64, 8192),
    ],
}
MEMORY = {
    "cpu": [prefill("LLaMA-7B", 1, 2048)],  # each figure takes a process of its own, 5 s
    "cuda": [prefill("LLaMA-7B", max(1, 16384 // seqlen), seqlen) for seqlen in (512, 2048, 8192)],
}
SMOKE_PREFILL = [prefill("CLIP-B/16 text", 1), prefill("Llama-3-8B", 1, 64)]
SMOKE_DECODE = [decode("Llama-3-8B", 1, 256)]


@dataclass(frozen=True)
class Problem:
    """query [B, Hq, T, D]; key, value [B, Hkv, S, D], any strides; prompts [1, Hkv, P, D]; gate float32 [Hq], raw."""

    shape: Shape
    query: Tensor
    key: Tensor
    value: Tensor
    prompt_key: Tensor
    prompt_value: Tensor
    gate: Tensor
    layout: str = "head-major"  # of key and value in memory; or token-major

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.query, self.key, self.value, self.prompt_key, self.prompt_value, self.gate)

    @property
    def is_decode(self) -> bool:
        return self.shape.seqlen_q == 1

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    def with_tensors(self, *tensors: Tensor) -> Problem:
        return Problem(self.shape, *tensors, self.layout)


def make_problem(
    shape: Shape, dtype: torch.dtype, device: torch.device, layout: str = "head-major", seed: int = 0
) -> Problem:
    """Random values (a chip that saves power is faster on zeros), and gates around 0.3, away from zero."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    cache = (shape.batch, shape.heads_kv, shape.seqlen_k, shape.head_dim)
    table = (1, shape.heads_kv, shape.prompt_length, shape.head_dim)
    query = normal(shape.batch, shape.heads_q, shape.seqlen_q, shape.head_dim)
    key, value, prompt_key, prompt_value = (normal(*size) for size in (cache, cache, table, table))
    if layout == "token-major":
        key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (key, value))
    gate = torch.randn(shape.heads_q, generator=generator, device=device) + 0.3
    return Problem(shape, query, key, value, prompt_key, prompt_value, gate, layout)


def name_of(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Provider:
    """Someone who computes a problem. `prepare` makes a call without arguments of it.

    What a user converts once (a layout, a table of pages) is converted by `prepare`, and so it is not timed.
    """

    name: str
    prepare: Callable[[Problem], Call]
    why_not: Callable[[Problem, bool], str] = lambda problem, backward: ""  # "" = it can; else the reason
    prompted: bool = True  # False: plain attention, which computes less than is asked for
    heads_first: bool = True  # its output is [B, H, T, D]; False: [B, T, H, D]
    compiles: bool = False  # its first call compiles for up to a minute
    batches_only: bool = False  # it equals another provider where there is one sequence
    quadratic: bool = False  # it keeps all T x S scores in memory

    @property
    def family(self) -> str:
        """The backend for this package's own: a reason that keeps one variant from running keeps all of them."""
        return self.name.partition(",")[0] if self.name.startswith("zinit") else self.name
