"""Token samples, and how they share a forward pass, packed or padded."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..loss import IGNORE

_Item = TypeVar("_Item")


class Sample(NamedTuple):
    """One record in tokens. What the model learns to say is `tokens[prompt_length:]`, or the tokens in `answers`."""

    tokens: list[int]
    prompt_length: int  # where the first answer begins
    images: tuple[str, ...] = ()  # the files that it is about
    answers: tuple[tuple[int, int], ...] = ()  # (start, end) of each answer; (): one, which goes to the end


class EncodingReport(NamedTuple):
    """What happened to the records because of the context length, and of texts that a chat template cannot take."""

    max_seq_len: int
    truncated: int  # answers that are cut, and so have no end-of-sequence token
    dropped: int  # records whose prompt fills the context and leaves no answer to learn from
    untold: int = 0  # records whose answer has no tokens
    special: int = 0  # conversations that hold the name of a special token

    @property
    def incomplete(self) -> int:
        """Records that are cut or left out."""
        return self.truncated + self.dropped + self.untold + self.special

    def __str__(self) -> str:
        untold = f" and {self.untold} because their answer has no tokens" if self.untold else ""
        if self.special:
            untold += f" and {self.special} because they hold the name of a special token"
        if not self.incomplete:
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


def split(samples: Sequence[_Item], validation: float, seed: int) -> tuple[list[_Item], list[_Item]]:
    """(training, validation). The seed chooses the share `validation`, at least one sample unless it is 0."""
    kept, chosen = split_indices(len(samples), validation, seed)
    return [samples[index] for index in kept], [samples[index] for index in chosen]


def split_indices(count: int, validation: float, seed: int) -> tuple[list[int], list[int]]:
    """The places of the samples to train on and of those to validate on, in order."""
    number = max(1, round(count * validation)) if validation else 0
    chosen = set(random.Random(f"split {seed}").sample(range(count), min(number, count)))
    return [index for index in range(count) if index not in chosen], sorted(chosen)


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
    """
    for row in passes([len(sample.tokens) - 1 for sample in samples], max_tokens, packed):
        chosen = [samples[index] for index in row]
        yield pack(chosen) if packed else pad(chosen, pad_id)


def passes(lengths: Sequence[int], max_tokens: int, packed: bool = True) -> list[list[int]]:
    """Which samples go through the model together. lengths: of each sample, in input tokens.

    Each sample goes into the first pass that has room for it, so the passes are few and full.
    """
    rows: list[list[int]] = []
    used: list[tuple[int, int]] = []  # of each row: the sum and the maximum of its lengths
    for index, length in enumerate(lengths):
        for number, (total, longest) in enumerate(used):
            longest = max(longest, length)
            if (total + length if packed else longest * (len(rows[number]) + 1)) <= max_tokens:
                rows[number].append(index)
                used[number] = (total + length, longest)
                break
        else:
            rows.append([index])
            used.append((length, length))
    return rows


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


def count_answer_tokens(sample: Sample) -> int:
    """How many tokens of a sample the loss is taken on."""
    spans = sample.answers or ((sample.prompt_length, len(sample.tokens)),)
    return sum(end - start for start, end in spans)


def _targets(sample: Sample) -> list[int]:
    """The token after each input token, or IGNORE where that is no part of an answer."""
    if not sample.answers:
        return [IGNORE] * (sample.prompt_length - 1) + sample.tokens[sample.prompt_length :]
    targets = [IGNORE] * (len(sample.tokens) - 1)
    for start, end in sample.answers:
        targets[start - 1 : end - 1] = sample.tokens[start:end]
    return targets
