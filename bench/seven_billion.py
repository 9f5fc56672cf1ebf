"""A LLaMA of 7B shape on a small machine: random bfloat16 weights, loaded memory-mapped, trained one step,
decoded.

    python -m bench.seven_billion --directory /tmp/seven-billion

Writes 13.5 GB, measures in a fresh process, deletes what it wrote. Prints seconds and peak resident memory,
which counts the pages of the mapped checkpoint that were touched: all of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.adapter import LlamaAdapter
from model.config import LlamaConfig
from model.generation import generate
from model.llama import Llama
from model.loading import load_base
from model.loss import answer_loss

from .contenders import SEVEN_BILLION

LAYERS_PER_SHARD = 4


def write_checkpoint(directory: Path, config: LlamaConfig) -> int:
    """Random weights as a sharded Hugging Face directory, one shard in memory at a time; their bytes."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Llama(config).state_dict().items()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
        shards.setdefault(f"model-{layer // LAYERS_PER_SHARD:05d}.safetensors", []).append(name)
    weight_map, size = {}, 0
    for file, names in shards.items():
        tensors = {}
        for name in names:
            weight = torch.randn(shapes[name]).mul_(0.02).add_(len(shapes[name]) == 1)  # norms around 1
            tensors[name if name == "lm_head.weight" else f"model.{name}"] = weight.to(torch.bfloat16)
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(weight.nbytes for weight in tensors.values())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return size


def measure(directory: Path, num_tokens: int) -> None:
    """Loads, trains one step on `num_tokens` packed tokens, generates 8; prints the seconds and the peak so
    far of each.
    """
    start = time.perf_counter()

    def report(what: str) -> None:
        nonlocal start
        seconds = time.perf_counter() - start
        # not getrusage: its peak survives exec, so it would be the writing parent's
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
        print(
            f"{what:<40}{seconds:8.1f} s   peak resident {int(peak.split()[1]) * 1024 / 1e9:6.2f} GB",
            flush=True,
        )
        start = time.perf_counter()

    base = load_base(directory).freeze()
    adapter = LlamaAdapter(base.config)
    report("load, memory-mapped")

    optimizer = torch.optim.AdamW(adapter.parameters(), lr=9e-3)
    tokens = torch.randint(3, base.config.vocab_size, (num_tokens,))
    cu_seqlens = torch.arange(0, num_tokens + 1, num_tokens // 4, dtype=torch.int32)
    hidden = base.hidden_states(tokens, adapter, cu_seqlens=cu_seqlens)
    loss = answer_loss(hidden, tokens.roll(-1), base.output_weight)
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and bool((adapter.gates != 0).all())
    report(f"one training step, 4 x {num_tokens // 4} tokens")

    output = generate(base, [tokens[:16].tolist()], adapter, max_new_tokens=8, temperature=0, eos_ids=[])
    assert len(output[0]) == 8
    report("a prompt of 16 tokens, 8 generated")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.seven_billion")
    parser.add_argument(
        "--directory", type=Path, required=True, help="a folder to be made, and deleted again"
    )
    parser.add_argument(
        "--tokens", type=int, default=256, help="of the training step, in 4 sequences (default: 256)"
    )
    parser.add_argument("--layers", type=int, default=32, help="fewer for a trial (default: 32)")
    parser.add_argument("--measure-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_only:
        return measure(arguments.directory, arguments.tokens)
    if arguments.directory.exists():
        sys.exit(f"error: {arguments.directory} exists; name a folder to be made and deleted again.")
    try:
        start = time.perf_counter()
        size = write_checkpoint(arguments.directory, replace(SEVEN_BILLION, num_layers=arguments.layers))
        seconds = time.perf_counter() - start
        print(f"wrote {size / 1e9:.2f} GB in {seconds:.0f} s, {torch.get_num_threads()} threads", flush=True)
        measuring = [sys.executable, "-m", "bench.seven_billion", *sys.argv[1:], "--measure-only"]
        subprocess.run(measuring, check=True)
    finally:
        shutil.rmtree(arguments.directory, ignore_errors=True)


if __name__ == "__main__":
    main()
