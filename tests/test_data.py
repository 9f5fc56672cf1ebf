"""Instruction data: what a file may hold, what becomes of it in tokens, and how samples share a batch."""

from __future__ import annotations

import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.data import (
    Record,
    Sample,
    batches,
    encode,
    epoch_order,
    format_prompt,
    pack,
    pad,
    read_records,
    split,
)
from model.errors import UserError
from model.loss import IGNORE

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}


class CharacterTokenizer:
    """One id per character; `merges` become one token each, as a subword tokenizer's would."""

    eos_id = 2

    def __init__(self, merges: tuple[str, ...] = ()):
        self.merges = {text: 60000 + index for index, text in enumerate(merges)}

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        ids = [1]
        while text:
            merge = next((merge for merge in self.merges if text.startswith(merge)), None)
            ids.append(self.merges[merge] if merge else ord(text[0]) + 3)
            text = text[len(merge or " ") :]
        return ids + [2] * eos


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_official_templates():
    assert format_prompt("Say hi.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay hi.\n\n### Response:"
    )
    assert format_prompt("Add {these}.", "{1} 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd {these}.\n\n### Input:\n{1} 2\n\n### Response:"
    )


def test_reads_json_and_jsonl_alike(tmp_path):
    rows = [GOOD, {"instruction": "Say hé.", "output": "hé\nho", "input": None, "id": 7}]
    expected = [Record("Add.", "3", "1 2"), Record("Say hé.", "hé\nho")]
    lines = "\n\n".join(json.dumps(row) for row in rows) + "\n"
    assert read_records(write(tmp_path / "a.json", json.dumps(rows, indent=1))) == expected
    assert read_records(write(tmp_path / "a.jsonl", lines)) == expected
    assert read_records(write(tmp_path / "b.json", "\ufeff" + json.dumps(rows))) == expected


BAD_FILES = {
    "not JSON": ('{"instruction": "a", "output": "b"}\n{"instruction": ', "line 2: not JSON at column"),
    "a list cut short": (json.dumps([GOOD])[:-1], "line 1: not JSON"),
    "a list with a bad element": ('[\n{"instruction": "a", "output": "b"},\n{oops}\n]', "line 3: not JSON"),
    "a list without commas": ('[{"instruction": "a", "output": "b"}\n{}]', "line 2: not JSON"),
    "text after the list": (json.dumps([GOOD]) + "\nmore", "line 1: not JSON"),
    "no object": ("[1]", "line 1: a record must be an object with instruction, input and output, got a int"),
    "no output": ('\n{"instruction": "a", "input": "b"}', "line 2: the field 'output' is missing"),
    "empty output": (json.dumps([GOOD, GOOD | {"output": " "}], indent=0), "line 7: the output is empty"),
    "empty instruction": (json.dumps(GOOD | {"instruction": ""}), "line 1: the instruction is empty"),
    "a number": (json.dumps(GOOD | {"output": 3}), "line 1: the field 'output' must be a string, got a int"),
    "a number as input": (json.dumps(GOOD | {"input": 1}), "line 1: the field 'input' must be a string"),
    "half a character": (json.dumps(GOOD | {"output": "\ud800"}), "line 1: the field 'output' holds \\ud800, half"),
    "nested": ("\n" + '{"a":' * 100_000, "line 2: JSON that cannot be read"),
    "nested in a list": ("[" * 100_000, "line 1: JSON that cannot be read"),
    "a long number": (f'{{"a": {"1" * 5000}}}', "line 1: JSON that cannot be read"),
    "nothing": ("\n\n", "holds no records"),
    "an empty list": ("[ ]", "holds no records"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_named(tmp_path, kind):
    content, message = BAD_FILES[kind]
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(UserError) as error:
        read_records(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_all_empty_answers_are_counted_at_once(tmp_path):
    rows = [GOOD, GOOD | {"output": ""}, GOOD, GOOD | {"output": "\n"}, GOOD | {"output": ""}]
    path = write(tmp_path / "bad.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(
        UserError, match="line 2: the output is empty, and that of 2 other records: leave such"
    ):
        read_records(path)


def test_a_long_list_is_read_in_one_sweep(tmp_path):
    """Alpaca's 52,002 records took 172 s where the lines before a record were counted for each anew, now 0.3 s."""
    rows = [GOOD | {"output": "3" * 1000}] * 10_000
    path = write(tmp_path / "long.json", json.dumps(rows, indent=1))
    began = time.process_time()
    assert len(read_records(path)) == 10_000
    assert time.process_time() - began < 3


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json: No such file"):
        read_records(tmp_path / "gone.json")
    (tmp_path / "latin.json").write_bytes(b'\n{"instruction": "\xe9"}')
    with pytest.raises(UserError, match=r"latin\.json, line 2: not UTF-8 text \(byte 0xe9\)"):
        read_records(tmp_path / "latin.json")


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
