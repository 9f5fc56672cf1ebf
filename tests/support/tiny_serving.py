"""A tiny base with a few unlike adapters, and an engine for them."""

from __future__ import annotations

import torch
from tiny_runs import make_base

from model.adapter import LlamaAdapter
from model.config import AdapterConfig, LlamaConfig
from model.llama import Llama
from model.sampling import generate
from model.serving.engine import Engine
from model.serving.request import Sampling

# prompts in a layer, adapted layers, activation of the gates
ADAPTERS = {"tall": (10, None, "tanh"), "short": (5, 1, "tanh"), "identity": (4, 3, "identity")}


def make_adapter(model: LlamaConfig, seed: int, length=10, layers=None, activation="tanh") -> LlamaAdapter:
    """An adapter whose gates are far from 0."""
    generator = torch.Generator().manual_seed(seed)
    adapter = LlamaAdapter(model, AdapterConfig(length, layers, activation), generator)
    with torch.no_grad():
        adapter.gates.normal_(generator=generator)
    return adapter.requires_grad_(False)


def make_adapters(model: LlamaConfig) -> dict[str, LlamaAdapter]:
    return {name: make_adapter(model, seed, *shape) for seed, (name, shape) in enumerate(ADAPTERS.items())}


def make_engine(**options) -> tuple[Engine, dict[str | None, LlamaAdapter | None]]:
    """An engine, and its adapters by name; None is the base."""
    base = make_base()
    engine = Engine(base, **{"cache_tokens": 4096, "max_running": 8, "chunk": 32} | options)
    adapters = make_adapters(base.config)
    for name, adapter in adapters.items():
        engine.add_adapter(name, adapter)
    return engine, {None: None, **adapters}


def alone(base: Llama, prompt, adapter, sampling: Sampling) -> list[list[int]]:
    """What `generate` answers this prompt alone, for each choice."""
    return [
        generate(
            base, [prompt], adapter, max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature,
            top_p=sampling.top_p, seed=sampling.seed + choice, eos_ids=sampling.eos_ids,
        )[0]
        for choice in range(sampling.choices)
    ]  # fmt: skip


def random_prompts(count: int, longest: int = 120, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, 131, (length,), generator=generator).tolist() for length in lengths]


class Listener:
    """Keeps what a request is told."""

    def __init__(self):
        self.tokens: dict[int, list[int]] = {}
        self.logprobs = []
        self.ends = {}

    def __call__(self, event):
        if hasattr(event, "token"):
            self.tokens.setdefault(event.choice, []).append(event.token)
            self.logprobs.append(event.logprobs)
        else:
            self.ends[event.choice] = (event.reason, event.error)


def run(engine: Engine, most: int = 10_000) -> int:
    """Steps until there is nothing to do; how many."""
    for step in range(most):
        if not engine.step():
            return step
    raise AssertionError(f"not done after {most} steps")
