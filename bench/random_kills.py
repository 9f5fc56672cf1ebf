"""Kills random processes of a training run, and compares what comes of it with the undisturbed run.

    python -m bench.random_kills --minutes 60 --out /tmp/kills

torchrun starts `--processes` (2) of model.train on a tiny base of random weights. Every `--every` seconds (20) one of
them, chosen at random, is ended by SIGKILL; torchrun starts all again, and --auto-resume goes on from the last
checkpoint. When a run has reached its last step, its adapter must be that of an undisturbed run, byte for byte,
and so must every entry of metrics.jsonl but the times. Runs follow one another until the minutes are over; the last one
is finished undisturbed. Exits with 1 at the first difference. The same --seed chooses the same ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import tokenizers
import torch

from model.config import LlamaConfig
from model.llama import Llama
from model.loading import save_base
from model.run_folder import read_metrics
from zinit_kernels.console import Parser
from zinit_kernels.console import run as run_program

from .machine import ROOT

CONFIG = LlamaConfig(131, 64, 96, num_layers=4, num_heads_q=4, num_heads_kv=2, head_dim=16, max_seq_len=512)
TIMES = ("seconds",)  # of an entry, what two runs do not share
RECORDS, BATCH = 64, 8
_POLL = 0.05
_FRUITLESS = (
    2  # kills in a row without a step between them; then one is waited for, or a slow machine never ends
)


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    options.out.mkdir(parents=True)
    make_inputs(options.out)
    began = time.monotonic()
    finish(start(options, options.out / "undisturbed"))
    taken = time.monotonic() - began
    print(f"undisturbed: {len(steps_of(options.out / 'undisturbed'))} steps in {taken:.0f} s", flush=True)
    chance = random.Random(options.seed)
    total = runs = 0
    began = time.monotonic()
    until = began + 60 * options.minutes
    while time.monotonic() < until:
        runs += 1
        folder = options.out / f"disturbed-{runs}"
        killed = disturb(start(options, folder), folder / "metrics.jsonl", options.every, until, chance)
        total += len(killed)
        ranks = " ".join(map(str, killed))
        if found := difference(folder, options.out / "undisturbed"):
            print(f"run {runs}: DIFFERENT after {len(killed)} kills (ranks {ranks}): {found}", flush=True)
            sys.exit(1)
        passed = (time.monotonic() - began) / 60
        print(f"run {runs}: equal after {len(killed)} kills (ranks {ranks}); {passed:.1f} min", flush=True)
    if total == 0:
        print("nothing was killed: take more --minutes than --every, and more --epochs", flush=True)
        sys.exit(1)
    print(f"{total} kills in {runs} runs: every loss and the adapter are those of the undisturbed run.")


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m bench.random_kills", description=(__doc__ or "").partition("\n")[0])
    default = "(default: %(default)s)"
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help=f"of kills {default}")
    parser.add_argument(
        "--every", type=float, default=20.0, metavar="SECONDS", help=f"between kills {default}"
    )
    parser.add_argument("--processes", type=int, default=2, help=default)
    parser.add_argument(
        "--epochs", type=int, default=200, help=f"of a run, {RECORDS // BATCH} steps each {default}"
    )
    parser.add_argument("--seed", type=int, default=0, help=f"of the choice of ranks {default}")
    return parser


def make_inputs(folder: Path) -> None:
    """A base with random weights, a tokenizer with one token per character, and records."""
    torch.manual_seed(0)
    save_base(Llama(CONFIG).initialise(std=0.3).freeze(), folder / "base")
    write_tokenizer(folder / "base")
    lines = [
        json.dumps({"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n % 9 + 1)))})
        for n in range(RECORDS)
    ]
    (folder / "data.jsonl").write_text("\n".join(lines))


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json with one token per ASCII character."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(code): code + 3 for code in range(128)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def start(options: argparse.Namespace, output: Path) -> subprocess.Popen[bytes]:
    """torchrun with the processes of one run, each with one thread."""
    folder = options.out
    words = [
        "--nproc-per-node", options.processes, "--max-restarts", 10**6, "-m", "model.train",
        "--base", folder / "base", "--data", folder / "data.jsonl", "--out", output, "--device", "cpu",
        "--epochs", options.epochs, "--batch-size", BATCH, "--prompt-length", 3, "--base-lr", 0.05,
        "--validation", 0, "--save-every", 5, "--auto-resume",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with output.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *map(str, words)],
            env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def finish(launcher: subprocess.Popen[bytes]) -> None:
    if launcher.wait() != 0:
        raise SystemExit(f"the run ended with {launcher.returncode}; its .log in --out says why")


def disturb(
    launcher: subprocess.Popen[bytes], metrics: Path, every: float, until: float, chance: random.Random
) -> list[int]:
    """Kills one of the launcher's processes every so many seconds, and waits until the run is over. Returns the ranks.

    until: by time.monotonic(), when the last one is killed; the run then goes to its end.
    """
    killed: list[int] = []
    due = time.monotonic() + every
    reached = fruitless = 0
    try:
        while launcher.poll() is None:
            if due <= time.monotonic() < until:
                workers, size = workers_of(launcher.pid), metrics.stat().st_size if metrics.exists() else 0
                fruitless = 0 if size > reached else fruitless
                if workers and fruitless < _FRUITLESS:
                    rank = chance.choice(sorted(workers))
                    os.kill(workers[rank], signal.SIGKILL)
                    killed.append(rank)
                    reached, fruitless = size, fruitless + 1
                    due = time.monotonic() + every
            time.sleep(_POLL)
    finally:
        if launcher.poll() is None:  # Ctrl-C, or a fault here
            launcher.terminate()
    finish(launcher)
    return killed


def workers_of(launcher: int) -> dict[int, int]:
    """Process numbers by rank, of the launcher's children that live."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) != launcher or fields[0] == "Z":
                continue
            variables = (path.parent / "environ").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile
            continue
        ranks = [int(variable[5:]) for variable in variables if variable.startswith(b"RANK=")]
        if ranks:
            found[ranks[0]] = int(path.parent.name)
    return found


def steps_of(folder: Path) -> list[dict[str, object]]:
    """The entries of a run's metrics without their times."""
    entries = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in entries]


def difference(folder: Path, other: Path) -> str:
    """What two finished runs do not share; "" if they are equal."""
    ours, theirs = steps_of(folder), steps_of(other)
    if len(ours) != len(theirs):
        return f"{len(ours)} entries in metrics.jsonl, not {len(theirs)}"
    for mine, wanted in zip(ours, theirs, strict=True):
        if mine != wanted:
            return f"metrics.jsonl says {mine}, not {wanted}"
    adapters = [(path / "adapter.safetensors").read_bytes() for path in (folder, other)]
    return "" if adapters[0] == adapters[1] else "the adapters differ"


if __name__ == "__main__":
    run_program(main)
