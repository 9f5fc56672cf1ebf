"""The best adapter of a run, when to stop early, and what the model says while it is trained."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .adapter import LlamaAdapter
from .data import Sample
from .errors import UserError, warn
from .llama import Llama, about_images
from .records import read_prompts
from .run_folder import append, write_file, writing
from .sampling import generate
from .tokenizer import Tokenizer

_PREVIEWS = 3  # samples whose prompts are asked if no file names others
_PREVIEW_TOKENS = 64


class Best:
    """The lowest validation loss of a run. It is read from the metrics, so a resumed run knows it."""

    def __init__(self, entries: Iterable[Mapping[str, Any]], patience: int | None = None):
        self.loss, self.since, self.patience = math.inf, 0, patience
        for entry in entries:
            if "val_loss" in entry:
                self.improves(entry["val_loss"])

    def improves(self, loss: float) -> bool:
        """Takes the loss of a validation. Whether it is the lowest until now."""
        if loss < self.loss:
            self.loss, self.since = loss, 0
            return True
        self.since += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether as many validations as --patience allows brought nothing better."""
        return self.patience is not None and self.since >= self.patience


class Previews:
    """Answers of the model as it is, one JSON object a line: the step, the prompt and the answer.

    The likeliest token is taken each time, so nothing that training draws is disturbed.
    """

    def __init__(
        self, path: Path, tokenizer: Tokenizer, prompts: Path | None, samples: Sequence[Sample], context: int
    ):
        self.path, self.tokenizer = path, tokenizer
        if prompts is not None:
            asked = [(tokenizer.encode(text, eos=False, limit=context), ()) for text in read_prompts(prompts)]
        else:
            asked = [(sample.tokens[: sample.prompt_length], sample.images) for sample in samples[:_PREVIEWS]]
        self.asked = [
            (tokens, images) for tokens, images in asked if len(tokens) + _PREVIEW_TOKENS <= context
        ]
        if not self.asked:
            raise UserError(
                f"--sample-every: no prompt leaves room for {_PREVIEW_TOKENS} tokens in the context of {context}: pass "
                "shorter ones by --sample-prompts."
            )

    @classmethod
    def of(
        cls, options: argparse.Namespace, tokenizer: Tokenizer, samples: Sequence[Sample], context: int
    ) -> Previews | None:
        """The previews that the options ask for."""
        if options.sample_every is None:
            return None
        return cls(options.out / "previews.jsonl", tokenizer, options.sample_prompts, samples, context)

    def write(self, step: int, base: Llama, adapter: LlamaAdapter) -> str:
        """Asks, appends the answers to the file, and returns the first one as a line to show."""
        lines = []
        for tokens, images in self.asked:
            with torch.no_grad():
                (answer,) = generate(
                    base,
                    [tokens],
                    about_images(adapter, [images]),
                    max_new_tokens=_PREVIEW_TOKENS,
                    temperature=0,
                )
            lines.append(
                {
                    "step": step,
                    "prompt": self.tokenizer.decode(tokens),
                    "answer": self.tokenizer.decode(answer),
                }
            )
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with writing(self.path), open(self.path, "ab", buffering=0) as file:
            append(file, text.encode())
        return f"step {step}: {lines[0]['answer']!r}"


def drop_later(path: Path, steps_done: int) -> None:
    """Drops the previews of later steps, which a resumed run writes again; a new run begins without any.

    A line that cannot be read is left out, with a warning that names it; without one if it is the last, which a crash
    may have cut short.
    """
    if not path.is_file():
        return
    kept, broken = [], []
    lines = path.read_bytes().splitlines(keepends=True) if steps_done else []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] <= steps_done:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            broken.append(number)
    if broken and broken != [len(lines)]:
        warn(f"{path}: what is in line {', '.join(map(str, broken))} cannot be read and is left out.")
    write_file(path, b"".join(kept))
