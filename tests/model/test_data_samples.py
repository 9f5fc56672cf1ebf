"""Instruction data: what becomes of records in tokens, and how samples share a batch."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.data import (
    Record,
    Sample,
    batches,
    encode,
    epoch_order,
    pack,
    pad,
    split,
)
from model.loss import IGNORE


class CharacterTokenizer:
    """One id per character; `merges` become one token each, as a subword tokenizer's would."""

    eos_id = 2

    def __init__(self, merges: tuple[str, ...] = ()):
        self.merges = {text: 60000 + index for index, text in enumerate(merges)}

    def encode(self, text: str, eos: bool = False, limit: int | None = None) -> list[int]:
        ids = [1]
        while text:
            merge = next((merge for merge in self.merges if text.startswith(merge)), None)
            ids.append(self.merges[merge] if merge else ord(text[0]) + 3)
            text = text[len(merge or " ") :]
        return (ids + [2] * eos)[:limit]


def test_a_sample_is_bos_prompt_answer_eos():
    tokenizer, record = CharacterTokenizer(), Record("Say.", "hi")
    (sample,), report = encode([record], tokenizer, 512)
    assert sample.tokens == [1, *(ord(c) + 3 for c in record.prompt + "hi"), 2]
    assert sample.tokens[sample.prompt_length :] == [ord("h") + 3, ord("i") + 3, 2]
    assert "fits" in str(report)


def test_an_answer_merged_with_the_prompts_end_is_learned_whole():
    tokenizer = CharacterTokenizer(merges=(":h",))
    (sample,), _ = encode([Record("Say.", "hi")], tokenizer, 512)
    assert sample.tokens[sample.prompt_length :] == [60000, ord("i") + 3, 2]


def test_long_samples_are_cut_and_counted():
    records = [Record("Say.", "a" * 100), Record("Say.", "b"), Record("Say it." * 40, "c")]
    fits = len(records[1].prompt) + 3
    samples, report = encode(records, CharacterTokenizer(), fits + 10)
    assert (report.truncated, report.dropped) == (1, 1)
    assert "1 answers are cut" in str(report) and "1 samples are left out" in str(report)
    assert [len(sample.tokens) for sample in samples] == [fits + 10, fits]
    assert samples[0].tokens[-1] == ord("a") + 3  # cut, so it does not claim to end


def test_an_answer_of_no_tokens_is_left_out():
    """A sample without a target would make the step's mean loss 0 / 0."""

    class Deaf(CharacterTokenizer):
        def encode(self, text, eos=False, limit=None):
            return super().encode(text.replace("x", ""), limit=limit)

    samples, report = encode([Record("Say.", "x"), Record("Say.", "a")], Deaf(), 512)
    assert len(samples) == 1 and report.untold == 1 and "1 because their answer has no tokens" in str(report)


def test_the_end_of_a_long_record_is_not_encoded():
    lengths = []

    class Counting(CharacterTokenizer):
        def encode(self, text, eos=False, limit=None):
            lengths.append(limit)
            return super().encode(text[: limit + 1], eos, limit)

    (sample,), report = encode([Record("Say.", "a" * 10**7)], Counting(), 200)
    assert (len(sample.tokens), report.truncated, set(lengths)) == (200, 1, {201})


SAMPLES = [Sample(list(range(10 * i + 3, 10 * i + 6 + i)), 1 + i % 3) for i in range(8)]


def expected_pairs(sample):
    """(input, target) at each position, straight from the definition."""
    return [
        (sample.tokens[i], sample.tokens[i + 1] if i + 1 >= sample.prompt_length else IGNORE)
        for i in range(len(sample.tokens) - 1)
    ]


def pairs(batch):
    """The batch's (input, target) rows, without padding."""
    if batch.cu_seqlens is None:
        return [
            list(zip(*(t.tolist() for t in row), strict=True))
            for row in zip(batch.tokens, batch.targets, strict=True)
        ]
    ends = batch.cu_seqlens.tolist()
    whole = list(zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True))
    return [whole[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def test_packing_keeps_every_pair():
    batch = pack(SAMPLES)
    assert pairs(batch) == [expected_pairs(sample) for sample in SAMPLES]
    assert batch.cu_seqlens.dtype == torch.int32 and batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
    assert batch.num_tokens == len(batch.tokens)
    assert batch.num_answer_tokens == int((batch.targets != IGNORE).sum())


def test_padding_keeps_every_pair_and_ignores_the_rest():
    batch, pad_id = pad(SAMPLES, pad_id=99), 99
    for row, sample in zip(pairs(batch), SAMPLES, strict=True):
        real = expected_pairs(sample)
        assert row[: len(real)] == real
        assert all(pair == (pad_id, IGNORE) for pair in row[len(real) :])
    packed = pack(SAMPLES)
    assert (batch.num_tokens, batch.num_answer_tokens) == (packed.num_tokens, packed.num_answer_tokens)


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    max_tokens=st.integers(1, 80),
    packed=st.booleans(),
)
def test_batches_hold_every_sample_once_within_the_budget(lengths, max_tokens, packed):
    samples = [Sample([7 * i + j for j in range(n)], 1) for i, n in enumerate(lengths)]
    made = list(batches(samples, max_tokens, packed=packed))
    assert all(batch.tokens.numel() <= max_tokens or len(pairs(batch)) == 1 for batch in made)
    found = sorted(tuple(p for p in row if p[1] != IGNORE) for batch in made for row in pairs(batch))
    assert found == sorted(tuple(expected_pairs(sample)) for sample in samples)


def test_first_fit_goes_back_to_fill_a_batch():
    samples = [Sample(list(range(n + 1)), 1) for n in (6, 9, 4)]
    assert [batch.num_tokens for batch in batches(samples, max_tokens=10)] == [10, 9]


def test_order_is_a_seeded_permutation_of_its_own_for_each_epoch():
    assert sorted(epoch_order(50, 3, 1)) == list(range(50))
    assert epoch_order(50, 3, 1) == epoch_order(50, 3, 1)
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_split_is_seeded_and_disjoint():
    training, validation = split(SAMPLES, 0.25, seed=0)
    assert len(validation) == 2 and sorted(training + validation) == sorted(SAMPLES)
    assert split(SAMPLES, 0.25, seed=0) == (training, validation)
    assert split(SAMPLES, 0.0, seed=0) == (SAMPLES, [])
    assert len(split(SAMPLES, 0.001, seed=0)[1]) == 1
