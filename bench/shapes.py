"""What is measured: the attention shapes of models in use, and sweeps around them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

PROMPTS = 10  # the paper's P


@dataclass(frozen=True)
class Shape:
    """One attention call: T queries against S keys of each of B sequences, and P prompts."""

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
        """For the ledger."""
        return {name: int(value) for name, value in asdict(self).items() if name != "name"}

    @property
    def pairs(self) -> float:
        """(query, key) pairs per head of one sequence: what bottom-right causality leaves, and the prompts."""
        hidden = self.seqlen_q * (self.seqlen_q - 1) / 2 if self.causal else 0.0
        return self.seqlen_q * self.seqlen_k - hidden + self.seqlen_q * self.prompt_length

    @property
    def scores(self) -> int:
        """Of all heads of all sequences, the hidden ones too."""
        return self.batch * self.heads_q * self.seqlen_q * self.seqlen_k

    def flops(self, mode: str) -> float:
        """Useful floating-point operations: two products forward, five backward (one of them recomputes the scores)."""
        products = {"forward": 2, "decode": 2, "backward": 5, "forward+backward": 7}[mode]
        return 2.0 * products * self.batch * self.heads_q * self.head_dim * self.pairs

    def cache_bytes(self, itemsize: int) -> int:
        """Keys and values, read once."""
        return 2 * self.batch * self.seqlen_k * self.heads_kv * self.head_dim * itemsize

    def sibling(self) -> Shape:
        """The same heads and head_dim, small enough for the float64 reference: two key heads, an odd length."""
        group = self.heads_q // self.heads_kv
        heads_kv = min(self.heads_kv, 2)
        length = min(self.seqlen_k, 197)
        return replace(
            self,
            batch=min(self.batch, 2),
            heads_q=heads_kv * group,
            heads_kv=heads_kv,
            seqlen_q=min(self.seqlen_q, length),
            seqlen_k=length,
        )


@dataclass(frozen=True)
class Heads:
    """What an architecture's attention looks like."""

    heads_q: int
    heads_kv: int
    head_dim: int
    causal: bool = True
    seqlen: int = 0  # fixed by the model: an image's patches; 0 = any


MODELS = {
    "LLaMA-7B": Heads(32, 32, 128),
    "Llama-3-8B": Heads(32, 8, 128),
    "Llama-3.2-1B": Heads(32, 8, 64),
    "Llama-3.2-3B": Heads(24, 8, 128),
    "Mistral-7B": Heads(32, 8, 128),  # the same as Llama-3-8B, which stands for both
    "ViT-B/16": Heads(12, 12, 64, causal=False, seqlen=197),
    "RoBERTa-large": Heads(16, 16, 64, causal=False, seqlen=512),
    "CLIP-B/16 vision": Heads(12, 12, 64, causal=False, seqlen=197),
    "CLIP-B/16 text": Heads(8, 8, 64, seqlen=77),
}


def prefill(model: str, batch: int, seqlen: int = 0, prompt_length: int = PROMPTS) -> Shape:
    """Self-attention of a whole sequence, as in training; `seqlen` 0 = the model's own."""
    heads = MODELS[model]
    length = seqlen or heads.seqlen
    name = f"{model}, B {batch}, T {length}" + ("" if prompt_length == PROMPTS else f", P {prompt_length}")
    return Shape(
        name,
        batch,
        heads.heads_q,
        heads.heads_kv,
        heads.head_dim,
        length,
        length,
        prompt_length,
        heads.causal,
    )


def decode(model: str, batch: int, seqlen: int, prompt_length: int = PROMPTS) -> Shape:
    """One new token of each of `batch` sequences, `seqlen` keys in the cache."""
    heads = MODELS[model]
    name = f"{model}, B {batch}, S {seqlen}" + ("" if prompt_length == PROMPTS else f", P {prompt_length}")
    return Shape(name, batch, heads.heads_q, heads.heads_kv, heads.head_dim, 1, seqlen, prompt_length)


# On a CPU of a few cores a shape may take a second a round, on a GPU it must fill the chip.
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
# where a minute of torch.compile is spent unless another choice is made
COMPILED = ("LLaMA-7B, B 1, T 512", "LLaMA-7B, B 1, S 2048", "LLaMA-7B, B 32, T 512", "LLaMA-7B, B 8, T 2048")
# What the CPU kernels' goals are stated for: MHA, 32/8 heads, and 8 heads of 64.
BARS_PREFILL = [
    shape
    for seqlen in (128, 512, 2048)
    for shape in (
        prefill("LLaMA-7B", 1, seqlen),
        prefill("Llama-3-8B", 1, seqlen),
        prefill("CLIP-B/16 text", 1 if seqlen == 2048 else 4, seqlen),
    )
]
BARS_DECODE = [
    decode(model, 1, seqlen) for model in ("LLaMA-7B", "Llama-3-8B") for seqlen in (512, 2048, 8192)
]
SMOKE_PREFILL = [prefill("CLIP-B/16 text", 1), prefill("Llama-3-8B", 1, 64)]
SMOKE_DECODE = [decode("Llama-3-8B", 1, 256)]
