"""The command instruct: zero-init prompts beside LoRA of several ranks, on instruction data."""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from ..shared import UserError, format_prompt, read_records
from .checkpoint import call, load_model, load_tokenizer
from .command import Defaults, command, digest_of, finish, parser_of, plan_of, run_of
from .protocol import Task

LAYOUT = (
    "a file of records (instruction, input, output), which are divided 8 : 1 : 1, or a folder with train.jsonl, "
    "valid.jsonl and test.jsonl"
)
METHODS = ("frozen", "zero-init", "one-softmax", "random-gates", "lora-2", "lora-4", "lora-8", "lora-16")
_PARTS = ("train", "valid", "test")
_EVALUATED_AT_ONCE = 8


class Instructions(Task):
    """The answers' tokens, each predicted from what is before it: their mean loss and how many come first.

    validation and test are scored by the loss, with its sign turned for the choice of a learning rate.
    """

    title = "Instruction tuning"
    score = "-loss"
    figures = ("loss", "perplexity", "tokens right, %")

    def __init__(self, base: Path, data: Path, max_length: int):
        self.base = base
        self.tokenizer = load_tokenizer(base)
        parts = _read(data)
        self.parts = {
            name: [row for record in records if (row := self._encode(record, max_length)) is not None]
            for name, records in parts.items()
        }
        for name, rows in self.parts.items():
            if not rows:
                raise UserError(f"no answer of {data} ({name}) begins within --max-length {max_length}.")

    def make(self, seed: int) -> Any:
        return load_model(transformers.AutoModelForCausalLM, self.base)

    def count(self, refit: bool) -> int:
        return len(self.parts["train"])

    def loss(self, model: Any, rows: Tensor, refit: bool) -> Tensor:
        logits, labels = self._predicted(model, [self.parts["train"][row] for row in rows.tolist()])
        return F.cross_entropy(logits, labels)

    def validate(self, model: Any) -> float:
        return -self._scores(model, "valid")[0]

    def test(self, model: Any) -> dict[str, float]:
        loss, right = self._scores(model, "test")
        return {"loss": loss, "perplexity": float(torch.tensor(loss).exp()), "tokens right, %": 100 * right}

    def _scores(self, model: Any, part: str) -> tuple[float, float]:
        rows = sorted(self.parts[part], key=lambda row: len(row[0]))
        total, right, count = 0.0, 0, 0
        for first in range(0, len(rows), _EVALUATED_AT_ONCE):
            logits, labels = self._predicted(model, rows[first : first + _EVALUATED_AT_ONCE])
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
            count += len(labels)
        return total / count, right / count

    def _predicted(self, model: Any, rows: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
        """Logits [N, vocabulary] and labels [N] of the answers' tokens alone."""
        longest = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row, _ in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in rows])
        kept = longest - min(begin for _, begin in rows) + 1
        few = (
            {"logits_to_keep": kept}
            if "logits_to_keep" in inspect.signature(model.forward).parameters
            else {}
        )
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False, **few}
        logits = call(model, inputs).logits
        places = [(n, place) for n, (row, begin) in enumerate(rows) for place in range(begin, len(row))]
        row, place = torch.tensor(places).unbind(1)
        chosen = logits[row.to(logits.device), (place - 1 - longest + logits.shape[1]).to(logits.device)]
        return chosen.float(), ids[row, place].to(logits.device)

    def _encode(self, record: Any, max_length: int) -> tuple[list[int], int] | None:
        """(tokens, where the answer begins), or None if no token of the answer is within max_length."""
        prompt = self.tokenizer(format_prompt(record.instruction, record.input))["input_ids"]
        end = self.tokenizer.eos_token_id
        if prompt and prompt[-1] == end:
            prompt = prompt[:-1]
        answer = self.tokenizer(record.output, add_special_tokens=False)["input_ids"]
        ids = [*prompt, *answer, *([] if end is None else [end])][:max_length]
        return (ids, len(prompt)) if 0 < len(prompt) < len(ids) else None


def _read(data: Path) -> dict[str, list[Any]]:
    if data.is_dir():
        return {name: read_records(path) for name, path in zip(_PARTS, files_of(data), strict=True)}
    records = read_records(data)
    if len(records) < 10:
        raise UserError(f"{data} holds {len(records)} records; at least 10 are needed to divide them.")
    random.Random(0).shuffle(records)
    tenth = len(records) // 10
    return {"train": records[2 * tenth :], "valid": records[:tenth], "test": records[tenth : 2 * tenth]}


def files_of(data: Path) -> list[Path]:
    """The files that are read. Raises UserError where one is missing."""
    files = [data / f"{name}.jsonl" for name in _PARTS] if data.is_dir() else [data]
    for path in files:
        if not path.is_file():
            raise UserError(f"there is no {path}; the data are {LAYOUT}.")
    return files


@command
def main(arguments: list[str]) -> None:
    """`python -m evaluate instruct`."""
    about = "Zero-init prompts beside LoRA of several ranks: the same data, the same steps"
    parser = parser_of("instruct", about, LAYOUT, Defaults(METHODS, steps=200, batch_size=8))
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a record (default: 256)")
    options = parser.parse_args(arguments)
    plan = plan_of(options, with_head=False)
    if options.max_length < 8:
        raise UserError(f"--max-length must be at least 8, got {options.max_length}.")
    files = files_of(options.data)
    run = run_of("instruct", options, plan, digest_of(files), {"max_length": options.max_length})
    finish(Instructions(options.base, options.data, options.max_length), plan, options, run)
