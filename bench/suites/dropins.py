"""PEFT's adaption prompts, accelerated, against PEFT's own and against the frozen base: CPU time of one thread.

Llama-shaped random models in float32, gates away from 0. No figure where the accelerated logits differ from PEFT's by
more than 1e-5.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..conditions import why_missing
from ..interleave import measure
from ..ledger import Row
from ..runner import Job, Note, Options
from ..shapes import PROMPTS

LAYERS, HEADS, SEQLEN, CONTEXT, TOKENS, VOCABULARY = 4, 8, 512, 64, 8, 1000
WIDTH = {"training step": 512, "decode": 1024}
BASE, PEFT, ACCELERATED = "frozen base", "PEFT adaption prompt", "PEFT adaption prompt, accelerated"
GATE, TOLERANCE = 0.3, 1e-5


def jobs(options: Options) -> list[Job]:
    """One for many and for few key heads, training and decoding; on a CPU alone."""
    if options.device.type != "cpu":
        return []
    return [
        Job(f"dropins, {mode}, {HEADS}/{heads_kv} heads", partial(rows, options, mode, heads_kv))
        for heads_kv in (8, 2)
        for mode in WIDTH
    ]


def cpu_seconds(function: Callable[[], object]) -> float:
    """Of the second call: the first is charged for the caches that another function left behind."""
    function()
    start = time.process_time()
    function()
    return time.process_time() - start


def models(hidden_size: int, heads_kv: int) -> dict[str, Any]:
    """The frozen base, PEFT's model of it and the accelerated copy."""
    from peft import AdaptionPromptConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from zinit_kernels.integrations.peft import accelerate

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=LAYERS, vocab_size=VOCABULARY,
        num_attention_heads=HEADS, num_key_value_heads=heads_kv,
    )  # fmt: skip
    base = LlamaForCausalLM(config).requires_grad_(False)
    adapter = AdaptionPromptConfig(adapter_len=PROMPTS, adapter_layers=LAYERS, task_type="CAUSAL_LM")
    theirs = get_peft_model(copy.deepcopy(base), adapter)
    for name, parameter in theirs.named_parameters():
        if name.endswith("adaption_gate"):
            parameter.data.fill_(GATE)
    return {ACCELERATED: accelerate(copy.deepcopy(theirs)), PEFT: theirs, BASE: base}


@torch.no_grad()
def difference(known: dict[str, Any]) -> float:
    """The greatest, of the accelerated model's logits from PEFT's."""
    tokens = torch.randint(VOCABULARY, (2, 40))
    return float(
        (known[ACCELERATED](input_ids=tokens).logits - known[PEFT](input_ids=tokens).logits).abs().max()
    )


def training_step(model: Any, seqlen: int) -> Callable[[], object]:
    """Forward and backward, down to the embeddings of every model: the base has nothing else to differentiate."""
    ids = torch.randint(VOCABULARY, (1, seqlen))
    embeddings = model.train().get_input_embeddings()(ids).detach()

    def step() -> None:
        model.zero_grad()
        model(inputs_embeds=embeddings.clone().requires_grad_(), labels=ids, use_cache=False).loss.backward()

    return step


def decode(model: Any, seqlen: int) -> Callable[[], object]:
    """TOKENS tokens behind `seqlen` of them."""
    from transformers import DynamicCache

    ids = torch.randint(VOCABULARY, (1, seqlen))
    cache = DynamicCache()
    with torch.no_grad():
        model.eval()(input_ids=ids, past_key_values=cache)

    @torch.no_grad()
    def run() -> None:
        for _ in range(TOKENS):
            model(input_ids=ids[:, :1], past_key_values=cache)
        cache.crop(-TOKENS)

    return run


def rows(options: Options, mode: str, heads_kv: int, note: Note) -> Iterator[Row]:
    if reason := why_missing("transformers", "peft"):
        note(f"dropins left out: {reason}")
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        known = models(WIDTH[mode] // (4 if options.smoke else 1), heads_kv)
        found = difference(known)
        if not found <= TOLERANCE:
            note(f"dropins, {mode}: no figure, the accelerated logits differ from PEFT's by {found:.2g}")
            return
        make, seqlen = (decode, CONTEXT) if mode == "decode" else (training_step, SEQLEN)
        functions = {
            name: make(model, seqlen // (4 if options.smoke else 1)) for name, model in known.items()
        }
        times = measure(functions, options.seconds if options.smoke else 4 * options.seconds, cpu_seconds)
    finally:
        torch.set_num_threads(threads)
    per = TOKENS if mode == "decode" else 1
    for name in known:
        p20, p50, p80 = (1e3 * times.quantile(name, q) / per for q in (0.2, 0.5, 0.8))
        yield Row(
            suite="dropins", shape=f"{LAYERS} layers of {WIDTH[mode]}, {HEADS}/{heads_kv} heads", mode=mode,
            sizes={"seqlen": seqlen, "hidden_size": WIDTH[mode], "heads_q": HEADS, "heads_kv": heads_kv},
            dtype="float32", provider=name, rounds=times.rounds, p20_ms=p20, p50_ms=p50, p80_ms=p80,
            ratios={other: times.ratio(name, other) for other in (PEFT, BASE) if other != name},
        )  # fmt: skip
