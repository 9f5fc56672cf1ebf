"""A LLaMA of 7B shape on a small machine: seconds and peak memory to load it, to train one step, and to generate.

    python -m bench seven_billion --scratch /tmp

writes a checkpoint of random weights (13.5 GB of bfloat16) into a folder of its own, measures in a fresh process, and
deletes the folder. A mapped checkpoint's pages count as resident memory once they are touched, and all of them are.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from model.adapter import LlamaAdapter
from model.config import LlamaConfig
from model.llama import Llama
from model.loading import load_base
from model.loss import answer_loss
from model.sampling import generate

from ..ledger import BenchError, Row
from ..measure import in_fresh_process, resident, restart_peak
from ..methods import ADAPTER, SEVEN_BILLION, TINY
from ..runner import Chart, Job, Note, Options, Suite

LAYERS_PER_SHARD = 4
SEQUENCES, PROMPT, NEW = 4, 16, 8
SECONDS, RESIDENT_GB = "seconds", "peak resident GB"


class Base(NamedTuple):
    """A checkpoint to write, and how it is loaded. Another kind of base (quantised, say) is another row of BASES."""

    name: str
    config: LlamaConfig
    load: Callable[[Path], Llama] = load_base
    tokens: int = 256  # of the training step


BASES = (
    Base("LLaMA-7B, memory-mapped", SEVEN_BILLION),
    *(Base(f"LLaMA-7B, {how}", SEVEN_BILLION, partial(load_base, quantise=how)) for how in ("int8", "int4")),
)
SMOKE = (
    Base("tiny LLaMA, memory-mapped", replace(TINY, num_layers=5)),
    Base("tiny LLaMA, int4", replace(TINY, num_layers=5), partial(load_base, quantise="int4")),
)


def jobs(options: Options) -> list[Job]:
    """One per base; on a CPU only, where the weights are mapped from the file."""
    if options.device.type != "cpu":
        return []
    return [
        Job(f"seven_billion, {base.name}", partial(rows, options, base))
        for base in (SMOKE if options.smoke else BASES)
        if options.wants_shape(base.name)
    ]


def bytes_of(config: LlamaConfig) -> int:
    with torch.device("meta"):
        return sum(2 * weight.numel() for weight in Llama(config).state_dict().values())


def write_checkpoint(folder: Path, config: LlamaConfig) -> None:
    """Random weights in bfloat16 as a sharded Hugging Face folder, with one shard in memory at a time."""
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Llama(config).state_dict().items()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
        shards.setdefault(f"model-{layer // LAYERS_PER_SHARD:05d}.safetensors", []).append(name)
    weight_map: dict[str, str] = {}
    for file, names in shards.items():
        tensors = {}
        for name in names:
            weight = torch.randn(shapes[name]).mul_(0.02).add_(len(shapes[name]) == 1)  # norms are around 1
            tensors[name if name == "lm_head.weight" else f"model.{name}"] = weight.to(torch.bfloat16)
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def used(folder: Path, base: Base, threads: int) -> dict[str, tuple[float, int]]:
    """Seconds and bytes resident at the peak of each phase, which counts what the phases before it left."""
    torch.set_num_threads(threads)
    found: dict[str, tuple[float, int]] = {}
    start = time.perf_counter()

    def done(phase: str) -> None:
        nonlocal start
        found[phase] = time.perf_counter() - start, resident("VmHWM")
        restart_peak()
        start = time.perf_counter()

    restart_peak()
    model = base.load(folder).freeze()
    adapter = LlamaAdapter(model.config)
    done("load")

    optimizer = torch.optim.AdamW(adapter.parameters(), lr=9e-3)
    tokens = torch.randint(3, model.config.vocab_size, (base.tokens,))
    cu_seqlens = torch.arange(0, base.tokens + 1, base.tokens // SEQUENCES, dtype=torch.int32)
    hidden = model.hidden_states(tokens, adapter, cu_seqlens=cu_seqlens)
    loss = answer_loss(hidden, tokens.roll(-1), model.output_weight)
    loss.backward()
    optimizer.step()
    if not loss.isfinite() or not bool((adapter.gates != 0).all()):
        raise AssertionError(f"the step did not train: loss {loss.item()}")
    done(f"training step, {SEQUENCES} x {base.tokens // SEQUENCES} tokens")

    output = generate(
        model, [tokens[:PROMPT].tolist()], adapter, max_new_tokens=NEW, temperature=0, eos_ids=[]
    )
    if len(output[0]) != NEW:
        raise AssertionError(f"{len(output[0])} tokens were generated, not {NEW}")
    done(f"generate, {PROMPT} + {NEW} tokens")
    return found


def rows(options: Options, base: Base, note: Note) -> Iterator[Row]:
    scratch = options.scratch or Path(tempfile.gettempdir())
    needed, free = bytes_of(base.config), shutil.disk_usage(scratch).free
    if needed > free:
        raise BenchError(
            f"{base.name} takes {needed / 1e9:.1f} GB and {scratch} has {free / 1e9:.1f} GB free: "
            "name another folder by --scratch"
        )
    with tempfile.TemporaryDirectory(dir=scratch, prefix="seven-billion-") as name:
        write_checkpoint(Path(name), base.config)
        found = in_fresh_process(used, Path(name), base, torch.get_num_threads())
    for phase, (seconds, peak) in found.items():
        yield Row(
            "seven_billion", base.name, {"tokens": base.tokens, "layers": base.config.num_layers}, phase, "bfloat16",
            ADAPTER, rounds=1, figures={SECONDS: seconds, RESIDENT_GB: peak / 1e9},
        )  # fmt: skip


SUITES = (
    Suite(
        "seven_billion",
        "Seconds and peak resident memory with a base of 7B shape (random bfloat16 weights, mapped from the file) and "
        "this project's adapter. Each phase includes what the phases before it left in memory. This suite runs only "
        "when named, since it writes 13.5 GB.",
        jobs,
        charts=(Chart(RESIDENT_GB, "", ADAPTER, "", higher_is_better=False),),
        in_all=False,
    ),
)
