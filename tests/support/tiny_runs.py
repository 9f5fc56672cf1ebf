"""A tiny base with a tokenizer and some records, and the training program run on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bench.random_kills import write_tokenizer
from model import run_output
from model import train as program
from model.config import LlamaConfig
from model.errors import run_program
from model.llama import Llama
from model.loading import save_base
from model.run_folder import read_metrics

CONFIG = LlamaConfig(131, 32, 48, num_layers=4, num_heads_q=4, num_heads_kv=2, head_dim=8, max_seq_len=512)


def make_base(seed: int = 0, config: LlamaConfig = CONFIG) -> Llama:
    torch.manual_seed(seed)
    return Llama(config).initialise(std=0.3).freeze()


RECORDS = [
    {"instruction": f"Say {word}.", "input": "twice" * (index % 2), "output": f"{word} {word}"}
    for index, word in enumerate(
        ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
]


def make_folder(path: Path) -> Path:
    """base/ and data.jsonl, to be read by every test and written by none."""
    save_base(make_base(), path / "base")
    write_tokenizer(path / "base")
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return path


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    fixed = {"--base": folder / "base", "--data": folder / "data.jsonl", "--out": output, "--device": "cpu"}
    small = {"--epochs": 3, "--batch-size": 4, "--prompt-length": 3, "--base-lr": 0.5, "--validation": 0.2}
    pairs = {
        **{k: str(v) for k, v in (fixed | small).items()},
        **dict(zip(more[::2], more[1::2], strict=False)),
    }
    flags = [word for word in more if word in ("--resume", "--overwrite", "--padded")]
    return [word for pair in pairs.items() if pair[0] not in flags for word in pair] + flags


def run(*words: str, main: Callable[[list[str]], None] = program.main) -> int:
    """A program's exit status; training's unless told."""
    try:
        run_program(lambda: main(list(words)))
    except SystemExit as end:
        return end.code
    return 0


@contextmanager
def power_cut(save: int) -> Iterator[None]:
    """Training ends in a RuntimeError at its checkpoint number `save`, which is not written."""
    real, saves = run_output.save_checkpoint, 0

    def crash(*args) -> None:
        nonlocal saves
        saves += 1
        if saves == save:
            raise RuntimeError("power cut")
        real(*args)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(RuntimeError, match="power cut"):
        patched.setattr(run_output, "save_checkpoint", crash)
        yield


def losses_of(output: Path) -> list[tuple]:
    """Everything in the metrics that does not depend on the clock."""
    return [
        tuple(entry.get(key) for key in ("step", "loss", "grad_norm", "learning_rate", "val_loss"))
        for entry in read_metrics(output / "metrics.jsonl")
    ]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
