"""Instruction data: records to token samples, and samples to batches, packed or padded.

    records = read_records("alpaca.json")
    samples, report = encode(records, tokenizer, max_seq_len=512)
    for batch in batches(samples, max_tokens=4096): ...

A sample is the template filled with the instruction, the answer and the end-of-sequence token, after the tokens that
the tokenizer puts before every text (LLaMA's: beginning of sequence). The loss is taken on the answer and on the
end-of-sequence token alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .loss import IGNORE
from .records import Record, format_prompt, read_records
from .tokenizer import Tokenizer

__all__ = [
    "Batch",
    "EncodingReport",
    "Record",
    "Sample",
    "batches",
    "encode",
    "epoch_order",
    "format_prompt",
    "pack",
    "pad",
    "read_records",
    "split",
]


class Sample(NamedTuple):
    """One record in tokens: `tokens[prompt_length:]` is what the model learns to say."""

    tokens: list[int]
    prompt_length: int
    images: tuple[str, ...] = ()  # the files that it is about


class EncodingReport(NamedTuple):
    """What happened to the records because of the context length."""

    max_seq_len: int
    truncated: int  # answers that are cut, and so have no end-of-sequence token
    dropped: int  # records whose prompt fills the context and leaves no answer to learn from
    untold: int = 0  # records whose answer has no tokens

    def __str__(self) -> str:
        untold = f" and {self.untold} because their answer has no tokens" if self.untold else ""
        if not self.truncated and not self.dropped and not self.untold:
            return f"every sample fits the context of {self.max_seq_len} tokens"
        return (
            f"{self.truncated} answers are cut at {self.max_seq_len} tokens and "
            f"{self.dropped} samples are left out because their instruction alone is that long{untold}"
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
    images: tuple[tuple[str, ...], ...]  # of each sample

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        moved = (
            None if tensor is None else tensor.to(device)
            for tensor in (self.tokens, self.targets, self.cu_seqlens)
        )
        return Batch(*moved, *self[3:])


def encode(
    records: Sequence[Record], tokenizer: Tokenizer, max_seq_len: int
) -> tuple[list[Sample], EncodingReport]:
    """Samples of at most max_seq_len tokens. A longer one loses the end of its answer, as in the official script. One
    whose prompt leaves no room for an answer is left out. The report counts both.

    Only the beginning of a long record is encoded, so a record of 10 MB costs no more than one of 10 kB.
    """
    samples, truncated, dropped, untold = [], 0, 0, 0
    limit = max_seq_len + 1  # one more tells whether anything is cut
    for record in records:
        prompt = tokenizer.encode(record.prompt, eos=False, limit=limit)
        tokens = tokenizer.encode(record.prompt + record.output, eos=True, limit=limit)
        # A tokenizer may merge across the border; the answer begins where the two sequences part.
        pairs = enumerate(zip(prompt, tokens, strict=False))
        prompt_length = next((index for index, (ours, whole) in pairs if ours != whole), len(prompt))
        prompt_length = max(prompt_length, 1)  # nothing predicts the first token
        if prompt_length >= max_seq_len:
            dropped += 1
            continue
        if prompt_length >= len(tokens):
            # the tokenizer has no end-of-sequence token, and none for the answer's characters
            untold += 1
            continue
        truncated += len(tokens) > max_seq_len
        samples.append(Sample(tokens[:max_seq_len], prompt_length, record.images))
    return samples, EncodingReport(max_seq_len, truncated, dropped, untold)


def split(samples: Sequence[Sample], validation: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training, validation). The seed chooses the share `validation`, at least one sample unless it is 0."""
    count = max(1, round(len(samples) * validation)) if validation else 0
    chosen = set(random.Random(f"split {seed}").sample(range(len(samples)), min(count, len(samples))))
    kept = [sample for index, sample in enumerate(samples) if index not in chosen]
    return kept, [samples[index] for index in sorted(chosen)]


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of the samples in an epoch. A function of its arguments: a resumed run goes on in it."""
    order = list(range(count))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return order


def batches(
    samples: Sequence[Sample], max_tokens: int, *, packed: bool = True, pad_id: int = 0
) -> Iterator[Batch]:
    """Batches of at most max_tokens tokens, padding included, that hold every sample once. A longer sample is a batch
    of its own.

    Each sample goes into the first batch that has room for it, so the batches are few and full.
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
    """The samples one after the other. A sample's last token is no input, because nothing is predicted from it."""
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
        images=tuple(sample.images for sample in samples),
    )


def pad(samples: Sequence[Sample], pad_id: int = 0) -> Batch:
    """The samples as rows, padded on the right, where causal attention does not look."""
    lengths = [len(sample.tokens) - 1 for sample in samples]
    tokens = torch.full((len(samples), max(lengths)), pad_id)
    targets = torch.full_like(tokens, IGNORE)
    for row, sample in enumerate(samples):
        tokens[row, : lengths[row]] = torch.tensor(sample.tokens[:-1])
        targets[row, : lengths[row]] = torch.tensor(_targets(sample))
    num_answer_tokens, images = int((targets != IGNORE).sum()), tuple(sample.images for sample in samples)
    return Batch(tokens, targets, None, max(lengths), num_answer_tokens, sum(lengths), images)


def _targets(sample: Sample) -> list[int]:
    """The token after each input token, or IGNORE where that is part of the prompt."""
    return [IGNORE] * (sample.prompt_length - 1) + sample.tokens[sample.prompt_length :]
