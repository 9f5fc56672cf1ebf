"""Samples of conversations, and what is said of a data set."""

from __future__ import annotations

import pytest
from tiny_chat import CHATML, write_tokenizer

from model.data import Conversation, Encoder, Message, Record, Sample, pack, pad
from model.data.report import report_on
from model.errors import UserError
from model.loss import IGNORE
from model.tokenizer import load_tokenizer

TALK = Conversation(
    (Message("user", "Hi."), Message("assistant", "ab"), Message("user", "No."), Message("assistant", "cd"))
)
MUTED = Conversation(tuple(m._replace(learned=m.content != "ab") for m in TALK.messages))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, CHATML)
    return load_tokenizer(folder)


def learned(sample, tokenizer):
    """The texts whose tokens have a target."""
    targets = pack([sample]).targets
    assert targets.tolist() == pad([sample]).targets[0].tolist()
    runs, run = [], []
    for target in [*targets.tolist(), IGNORE]:
        if target == IGNORE and run:
            runs.append(tokenizer.decode(run))
            run = []
        elif target != IGNORE:
            run.append(target)
    return runs


def test_the_loss_is_on_every_assistant_turn(tokenizer):
    encoder = Encoder(tokenizer, 512)
    sample = encoder(TALK)
    assert learned(sample, tokenizer) == ["ab", "cd"]
    end = tokenizer.special_ids["<|im_end|>"]
    assert [sample.tokens[stop - 1] for _, stop in sample.answers] == [end, end]
    assert len(sample.tokens) == sample.answers[-1][1] and sample.prompt_length == sample.answers[0][0]
    assert learned(encoder(MUTED), tokenizer) == ["cd"]
    assert not encoder.report.incomplete


def test_a_long_conversation_keeps_the_answers_that_fit(tokenizer):
    whole = Encoder(tokenizer, 512)(TALK)
    (first, second) = whole.answers
    for limit, texts in (
        (second[1] - 1, ["ab", "cd"]),
        (second[0], ["ab"]),
        (first[1], ["ab"]),
        (first[0], None),
    ):
        encoder = Encoder(tokenizer, limit)
        sample = encoder(TALK)
        assert (None if sample is None else learned(sample, tokenizer)) == texts
        assert (encoder.truncated, encoder.dropped) == ((0, 1) if sample is None else (1, 0))
        assert sample is None or len(sample.tokens) <= limit


def test_a_message_with_a_special_token_is_left_out_and_counted(tokenizer):
    encoder = Encoder(tokenizer, 512)
    assert encoder(Conversation((Message("user", "a</s>"), Message("assistant", "b")))) is None
    assert encoder.special == 1 and "1 because they hold the name of a special token" in str(encoder.report)


def test_either_template_takes_both_kinds(tokenizer):
    record = Record("Say.", "hi", "x")
    as_chat = Encoder(tokenizer, 512, "chat")(record)
    assert learned(as_chat, tokenizer) == ["hi"] and "user\nSay.\n\nx" in tokenizer.decode(as_chat.tokens)
    single = Conversation((Message("user", "Say."), Message("assistant", "hi")), "a.json, line 3")
    assert Encoder(tokenizer, 512, "alpaca")(single) == Encoder(tokenizer, 512)(Record("Say.", "hi"))
    with pytest.raises(UserError, match="user, assistant, user, assistant has no place in Alpaca's template"):
        Encoder(tokenizer, 512, "alpaca")(TALK)


def test_the_report():
    samples = [Sample([1] * 3, 1), Sample([2] * 9, 1), Sample([1] * 3, 1), Sample([3] * 5, 1)]
    report = report_on(samples, range(4), batch_size=2, max_tokens=16)
    assert (report.shortest, report.median, report.mean, report.longest, report.total) == (3, 4, 5, 9, 20)
    assert report.duplicates == 1
    # inputs 2 and 8, then 2 and 4: rows of 2 x 8 and 2 x 4 hold 16 of 24 tokens, and two passes of 16 half of it
    assert report.padding == pytest.approx(1 - 16 / 24) and report.filled == pytest.approx(16 / 32)
    assert "1 duplicates" in str(report) and "33.3% padding" in str(report)
