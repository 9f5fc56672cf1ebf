"""python -m bench.dropins: PEFT's adaption prompts, accelerated, against PEFT's own and against the frozen base.

One interleaved run of CPU time on one thread, float32; Llama-shaped random models, gates away from 0. No number where
the accelerated logits differ from PEFT's by more than 1e-5.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable

import torch
from peft import AdaptionPromptConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from zinit_kernels.integrations.peft import accelerate

from . import probes
from .interleave import Times, measure

LAYERS, PROMPTS, CONTEXT, TOKENS = 4, 10, 64, 8
# (what, faster, slower, at most)
BARS = (("training step", "accelerated", "PEFT", 0.92), ("training step", "accelerated", "base", 1.05))
BARS += (("decode", "accelerated", "PEFT", 0.70), ("decode", "accelerated", "base", 1.05))


def cpu_seconds(function: Callable[[], object]) -> float:
    """Of the second call: the first is charged for the caches that another function left behind."""
    function()
    start = time.process_time()
    function()
    return time.process_time() - start


def models(hidden_size: int, heads: int, heads_kv: int, vocabulary: int = 1000) -> dict[str, torch.nn.Module]:
    """The frozen base, PEFT's model of it and the accelerated copy."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=LAYERS, vocab_size=vocabulary,
        num_attention_heads=heads, num_key_value_heads=heads_kv,
    )  # fmt: skip
    base = LlamaForCausalLM(config).requires_grad_(False)
    adapter = AdaptionPromptConfig(adapter_len=PROMPTS, adapter_layers=LAYERS, task_type="CAUSAL_LM")
    theirs = get_peft_model(copy.deepcopy(base), adapter)
    for name, parameter in theirs.named_parameters():
        if name.endswith("adaption_gate"):
            parameter.data.fill_(0.3)
    ours = accelerate(copy.deepcopy(theirs))
    tokens = torch.randint(vocabulary, (2, 40))
    with torch.no_grad():
        difference = float((ours(input_ids=tokens).logits - theirs(input_ids=tokens).logits).abs().max())
    if not difference <= 1e-5:
        sys.exit(f"the accelerated logits differ from PEFT's by {difference:.2g}: nothing was measured")
    return {"base": base, "PEFT": theirs, "accelerated": ours}


def training_step(model: torch.nn.Module, batch: int, tokens: int) -> Callable[[], object]:
    """Forward and backward; the base's gradients flow to its embeddings, as in a layer below."""
    ids = torch.randint(1000, (batch, tokens))
    embeddings = model.get_input_embeddings()(ids).detach()  # type: ignore[operator]
    trainable = any(parameter.requires_grad for parameter in model.parameters())

    def step() -> None:
        model.zero_grad()
        inputs = embeddings if trainable else embeddings.clone().requires_grad_()
        model(inputs_embeds=inputs, labels=ids, use_cache=False).loss.backward()

    return step


def decode(model: torch.nn.Module) -> Callable[[], object]:
    """TOKENS tokens behind CONTEXT of them."""
    ids = torch.randint(1000, (1, CONTEXT))
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)

    @torch.no_grad()
    def run() -> None:
        for _ in range(TOKENS):
            model(input_ids=ids[:, :1], past_key_values=cache)
        cache.crop(-TOKENS)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.dropins", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="for each of the four parts (default: 20)"
    )
    parser.add_argument("--batch", type=int, default=4, help="sequences of 512 tokens in a training step")
    told = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    table = Table(
        "", "heads", "ratio", "measured", "at most", "", title="CPU time, medians of interleaved rounds"
    )
    for heads_kv in (8, 2):
        found: dict[str, Times] = {}
        for what, hidden_size in (("training step", 512), ("decode", 1024)):
            known = models(hidden_size, 8, heads_kv)
            if what == "decode":
                functions = {name: decode(model.eval()) for name, model in known.items()}
            else:
                functions = {n: training_step(m.train(), told.batch, 512) for n, m in known.items()}
            found[what] = measure(functions, told.seconds, clock=cpu_seconds)
        for what, one, other, bar in BARS:
            ratio = found[what].ratio(one, other)
            verdict = "met" if ratio <= bar else "MISSED"
            ms = 1e3 * found[what].median(one) / (TOKENS if what == "decode" else 1)
            table.add_row(
                what, f"8/{heads_kv}", f"{one} / {other}", f"{ratio:.3f} ({ms:.1f} ms, {found[what].rounds} rounds)",
                f"{bar:.2f}", verdict,
            )  # fmt: skip
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in probes.machine().items()))


if __name__ == "__main__":
    main()
