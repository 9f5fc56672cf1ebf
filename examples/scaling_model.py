"""A paper model of a training step on many GPUs: python examples/scaling_model.py

It prints the tables of docs/scaling.md. Nothing in it was measured on a GPU: bytes and FLOPs are counted from shapes,
and rates are the data sheet's times a share that is assumed. Change them to those of your cluster.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Model(NamedTuple):
    """A LLaMA, and the adapter on its topmost layers."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads_kv: float  # share of the key and value heads: 1 = as many as query heads
    vocabulary: int
    prompts: int = 10
    heads: int = 32

    @property
    def layer_weights(self) -> float:
        """Weights of one layer."""
        return self.hidden * (2 * self.hidden + 2 * self.hidden * self.heads_kv + 3 * self.intermediate)

    @property
    def weights(self) -> float:
        """Weights of the base, the embedding and the output projection among them."""
        return self.layers * self.layer_weights + 2 * self.vocabulary * self.hidden

    @property
    def adapter(self) -> float:
        """Numbers that are trained: prompts and gates of all but the lowest two layers."""
        return (self.layers - 2) * (self.prompts * self.hidden + self.heads)

    def flops(self, tokens: int) -> float:
        """Of a step's products: 2 for each weight and token forward, and 2 backward where a layer is adapted."""
        output = self.vocabulary * self.hidden
        backward = (self.layers - 2) * self.layer_weights + output
        return 2.0 * tokens * (self.layers * self.layer_weights + output + backward)


class Cluster(NamedTuple):
    """GPUs in nodes of eight. Rates are per GPU and direction."""

    flops: float = 989e12  # H100 SXM, bfloat16, dense: the data sheet
    utilisation: float = 0.4  # assumed
    overhead: float = 1.05  # a step's time over its products': measured on a CPU
    inside: float = 450e9 * 0.8  # NVLink 4, bytes/s; 0.8 assumed
    between: float = 50e9 * 0.8  # 400 Gb/s a GPU
    latency: float = 10e-6  # of one hop, assumed

    def rate(self, gpus: int) -> float:
        """Bytes per second of a collective among so many GPUs."""
        return self.inside if gpus <= 8 else self.between

    def all_reduce(self, size: float, gpus: int) -> float:
        """Seconds: each byte crosses a link twice."""
        if gpus == 1:
            return 0.0
        return 2 * size * (gpus - 1) / gpus / self.rate(gpus) + 2 * math.log2(gpus) * self.latency

    def all_gather(self, size: float, gpus: int) -> float:
        """Seconds."""
        if gpus == 1:
            return 0.0
        return size * (gpus - 1) / gpus / self.rate(gpus) + math.log2(gpus) * self.latency


class Step(NamedTuple):
    """One GPU's part of a step."""

    gpus: int
    memory: float  # bytes: weights, adapter and optimizer; activations come on top
    sent: float  # bytes
    compute: float  # seconds
    waiting: float  # seconds of communication that no computation hides
    tokens: int  # of all GPUs

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / (self.compute + self.waiting)


SEVEN = Model("7B", 32, 4096, 11008, 1, 32000)
SEVENTY = Model("70B", 80, 8192, 28672, 1 / 8, 128256, heads=64)
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def step(
    model: Model, gpus: int, tokens: int, shard: bool = False, tensor: int = 1, on: Cluster | None = None
) -> Step:
    """A step in which every group of `tensor` GPUs computes `tokens` tokens."""
    on = on or Cluster()
    groups = gpus // tensor
    compute = model.flops(tokens) * on.overhead / (on.flops * on.utilisation) / tensor
    weights = 2 * model.weights / tensor
    bucket = 4 * model.adapter
    sent = 2 * bucket * (gpus - 1) / gpus
    waiting = on.all_reduce(bucket, gpus)
    if tensor > 1:  # two sums of a layer's outputs forward, and five of its inputs' gradients backward
        sums = 2 * model.layers + 5 * (model.layers - 2)
        activations = 2.0 * tokens * model.hidden
        sent += sums * 2 * activations * (tensor - 1) / tensor
        waiting += sums * on.all_reduce(activations, tensor)
    if (
        shard
    ):  # each layer is gathered forward and, where it is adapted, backward; one ahead of its computation
        gathered = 2 * weights
        sent += gathered * (groups - 1) / groups
        waiting += max(on.all_gather(gathered, groups) - compute, 0.0)
        weights /= groups
    return Step(gpus, weights + 16 * model.adapter, sent, compute, waiting, tokens * groups)


def table(model: Model, tokens: int, shard: bool = False, tensor: int = 1) -> list[str]:
    """The rows for 1 to 1024 GPUs, as docs/scaling.md has them."""
    rows = [
        "| GPUs | GiB of weights and state a GPU | MB sent a GPU and step | ms computing | ms waiting | tokens/s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for gpus in GPUS:
        if gpus >= tensor and (not shard or gpus // tensor > 1):
            at = step(model, gpus, tokens, shard, tensor)
            rows.append(
                f"| {gpus} | {at.memory / 2**30:.1f} | {at.sent / 1e6:,.1f} | {at.compute * 1e3:.0f} | "
                f"{at.waiting * 1e3:.1f} | {at.rate:,.0f} |"
            )
    return rows


TABLES = {
    "7B, whole on every GPU, 4,096 tokens a GPU and step": (SEVEN, 4096, False, 1),
    "70B, `--shard`, 4,096 tokens a GPU and step": (SEVENTY, 4096, True, 1),
    "70B, `--shard`, 16,384 tokens a GPU and step": (SEVENTY, 16384, True, 1),
    "70B, `--tensor-parallel 8`, 16,384 tokens a group and step": (SEVENTY, 16384, False, 8),
}


def main() -> None:
    """Prints the tables."""
    for title, choice in TABLES.items():
        print(f"**{title}**\n")
        print("\n".join(table(*choice)), "\n")


if __name__ == "__main__":
    main()
