"""A tiny base with a tokenizer and some records, and the training program run on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch

from model import train as program
from model.config import LlamaConfig
from model.errors import run_program
from model.llama import Llama
from model.loading import save_base
from model.run_folder import read_metrics

CONFIG = LlamaConfig(
    vocab_size=131,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads_q=4,
    num_heads_kv=2,
    head_dim=8,
    max_seq_len=512,
)  # fmt: skip


def make_base(seed: int = 0, config: LlamaConfig = CONFIG) -> Llama:
    torch.manual_seed(seed)
    return Llama(config).initialise(std=0.3).freeze()


def write_tokenizer(directory: Path) -> None:
    """One token per ASCII character."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(code): code + 3 for code in range(128)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))


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


def losses_of(output: Path) -> list[tuple]:
    """Everything in the metrics that does not depend on the clock."""
    return [
        tuple(entry.get(key) for key in ("step", "loss", "grad_norm", "learning_rate", "val_loss"))
        for entry in read_metrics(output / "metrics.jsonl")
    ]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
