"""Instruction data: Alpaca-style records to token samples, and samples to batches, packed or padded.

    records = read_records("alpaca.json")
    samples, report = encode(records, tokenizer, max_seq_len=512)
    for batch in batches(samples, max_tokens=4096): ...

A sample is BOS, the template filled with the instruction, the answer, EOS. The loss is taken on the answer and
EOS alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import UserError
from .loss import IGNORE
from .tokenizer import Tokenizer

# The templates of Stanford Alpaca, which the official LLaMA-Adapter is trained and asked with too.
TEMPLATE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
TEMPLATE_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


class Record(NamedTuple):
    """One line of an Alpaca-style file."""

    instruction: str
    output: str
    input: str = ""

    @property
    def prompt(self) -> str:
        """The template, filled: what the model is given."""
        return format_prompt(self.instruction, self.input)


class Sample(NamedTuple):
    """One record in tokens: `tokens[prompt_length:]` is what the model learns to say."""

    tokens: list[int]
    prompt_length: int


class EncodingReport(NamedTuple):
    """What the context length did to the records."""

    max_seq_len: int
    truncated: int  # answers cut at the context's end, so without EOS
    dropped: int  # prompts that fill the context: no answer is left to learn from

    def __str__(self) -> str:
        if not self.truncated and not self.dropped:
            return f"every sample fits the context of {self.max_seq_len} tokens"
        return (
            f"{self.truncated} answers are cut at {self.max_seq_len} tokens and "
            f"{self.dropped} samples are left out because their instruction alone is that long"
        )


class Batch(NamedTuple):
    """Inputs and the targets one token ahead, int64.

    Packed: [total] with int32 cu_seqlens [B + 1]. Padded on the right: [B, max_seqlen], cu_seqlens None.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int
    num_answer_tokens: int
    num_tokens: int  # without padding

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        moved = (
            None if tensor is None else tensor.to(device)
            for tensor in (self.tokens, self.targets, self.cu_seqlens)
        )
        return Batch(*moved, *self[3:])


def format_prompt(instruction: str, input: str = "") -> str:
    """The Alpaca prompt for an instruction, with or without an input."""
    if input:
        return TEMPLATE_WITH_INPUT.format(instruction=instruction, input=input)
    return TEMPLATE_WITHOUT_INPUT.format(instruction=instruction)


def read_records(path: str | Path) -> list[Record]:
    """The records of a JSON list or of a JSONL file (one object a line), in order.

    Each is an object with the strings `instruction`, `output` (neither empty) and, if wanted, `input`; other fields are
    passed over. Raises UserError naming the file, the line and what is wrong there.
    """
    path = Path(path)
    text = read_text(path)
    objects = _list_objects if text.lstrip().startswith("[") else line_objects
    found = [(line, _record(value, f"{path}, line {line}")) for line, value in objects(text, path)]
    if not found:
        raise UserError(f"{path} holds no records.")
    for field in ("instruction", "output"):
        if empty := [line for line, record in found if not getattr(record, field).strip()]:
            also = f", and that of {len(empty) - 1} other records" if len(empty) > 1 else ""
            raise UserError(f"{path}, line {empty[0]}: the {field} is empty{also}: leave such records out.")
    return [record for _, record in found]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, a byte order mark left out. Raises UserError naming the line that is none."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 text (byte 0x{error.object[error.start]:02x})."
        ) from None


def line_objects(text: str, path: Path) -> Iterator[tuple[int, object]]:
    """(line number, value) of every line of JSONL that is not blank."""
    for number, line in enumerate(text.split("\n"), start=1):  # JSON strings may hold other line ends
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _not_json(path, number, error) from None


def check_text(value: object, name: str, where: str) -> str:
    """The value if it is a string that a tokenizer takes; UserError if not."""
    if not isinstance(value, str):
        raise UserError(f"{where}: the field {name!r} must be a string, got a {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start].encode("unicode_escape").decode()
        raise UserError(f"{where}: the field {name!r} holds {half}, half a character.") from None
    return value


def encode(
    records: Sequence[Record], tokenizer: Tokenizer, max_seq_len: int
) -> tuple[list[Sample], EncodingReport]:
    """Samples of at most max_seq_len tokens. A longer one loses the end of its answer, as in the official script;
    one whose prompt leaves no room for an answer is left out. Both are counted."""
    samples, truncated, dropped = [], 0, 0
    for record in records:
        prompt = tokenizer.encode(record.prompt)
        tokens = tokenizer.encode(record.prompt + record.output, eos=True)
        # A tokenizer may merge across the border; the answer begins where the two sequences part.
        pairs = enumerate(zip(prompt, tokens, strict=False))
        prompt_length = next((index for index, (ours, whole) in pairs if ours != whole), len(prompt))
        if prompt_length >= max_seq_len:
            dropped += 1
            continue
        truncated += len(tokens) > max_seq_len
        samples.append(Sample(tokens[:max_seq_len], prompt_length))
    return samples, EncodingReport(max_seq_len, truncated, dropped)


def split(samples: Sequence[Sample], validation: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training, validation): a seeded choice of the share `validation`, at least one sample unless it is 0."""
    count = max(1, round(len(samples) * validation)) if validation else 0
    chosen = set(random.Random(f"split {seed}").sample(range(len(samples)), min(count, len(samples))))
    kept = [sample for index, sample in enumerate(samples) if index not in chosen]
    return kept, [samples[index] for index in sorted(chosen)]


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch, a function of its arguments alone, so a resumed run goes on in the same one."""
    order = list(range(count))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return order


def batches(
    samples: Sequence[Sample], max_tokens: int, *, packed: bool = True, pad_id: int = 0
) -> Iterator[Batch]:
    """Batches of at most max_tokens tokens (padding counted) that hold every sample once; a longer one goes alone.

    First fit: each sample goes to the first batch with room for it, so the batches are few and full.
    """
    rows: list[list[Sample]] = []
    for sample in samples:
        length = len(sample.tokens) - 1
        for row in rows:
            lengths = [len(other.tokens) - 1 for other in row] + [length]
            if (sum(lengths) if packed else max(lengths) * len(lengths)) <= max_tokens:
                row.append(sample)
                break
        else:
            rows.append([sample])
    for row in rows:
        yield pack(row) if packed else pad(row, pad_id)


def pack(samples: Sequence[Sample]) -> Batch:
    """The samples one behind the other. No input holds a sample's last token: nothing is predicted from it."""
    inputs = [sample.tokens[:-1] for sample in samples]
    targets = [target for sample in samples for target in _targets(sample)]
    lengths = torch.tensor([0, *map(len, inputs)])
    return Batch(
        tokens=torch.tensor([token for row in inputs for token in row]),
        targets=torch.tensor(targets),
        cu_seqlens=lengths.cumsum(0, dtype=torch.int32),
        max_seqlen=int(lengths.max()),
        num_answer_tokens=sum(target != IGNORE for target in targets),
        num_tokens=len(targets),
    )


def pad(samples: Sequence[Sample], pad_id: int = 0) -> Batch:
    """The samples as rows, padded on the right: causal attention never looks there."""
    lengths = [len(sample.tokens) - 1 for sample in samples]
    tokens = torch.full((len(samples), max(lengths)), pad_id)
    targets = torch.full_like(tokens, IGNORE)
    for row, sample in enumerate(samples):
        tokens[row, : lengths[row]] = torch.tensor(sample.tokens[:-1])
        targets[row, : lengths[row]] = torch.tensor(_targets(sample))
    return Batch(tokens, targets, None, max(lengths), int((targets != IGNORE).sum()), sum(lengths))


def _targets(sample: Sample) -> list[int]:
    """The token after each input token, or IGNORE where that is part of the prompt."""
    return [IGNORE] * (sample.prompt_length - 1) + sample.tokens[sample.prompt_length :]


def _list_objects(text: str, path: Path) -> Iterator[tuple[int, object]]:
    """The elements of a JSON list one by one, so that each is known by its line."""
    decoder, position = json.JSONDecoder(), text.index("[") + 1
    # the line of the position `counted`: lines are counted once, the whole text for each record takes minutes
    line, counted = 1, 0
    first = True
    while True:
        position = _skip_space(text, position)
        if text[position : position + 1] == "]" and not text[position + 1 :].strip():
            return
        if not first:
            if text[position : position + 1] != ",":
                raise UserError(
                    f"{path}, line {_line(text, position)}: not JSON (expected , or the list's closing ])."
                )
            position = _skip_space(text, position + 1)
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _not_json(path, getattr(error, "lineno", _line(text, position)), error) from None
        line, counted = line + text.count("\n", counted, position), position
        yield line, value
        position, first = end, False


def _not_json(path: Path, line: int, error: Exception) -> UserError:
    """What the JSON decoder raised: where, or that a number or the nesting is beyond Python's limits."""
    if isinstance(error, json.JSONDecodeError):
        return UserError(f"{path}, line {line}: not JSON at column {error.colno} ({error.msg}).")
    return UserError(f"{path}, line {line}: JSON that cannot be read ({error}).")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _record(value: object, where: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: a record must be an object with instruction, input and output, got a {type(value).__name__}."
        )
    for field in ("instruction", "output"):
        if field not in value:
            raise UserError(
                f"{where}: the field {field!r} is missing (it has {', '.join(map(repr, value)) or 'none'})."
            )
    input = "" if value.get("input") is None else value["input"]
    record = Record(value["instruction"], value["output"], input)
    for field, entry in record._asdict().items():
        check_text(entry, field, where)
    return record
