"""Tokenizers: both files, the special tokens, and what is said when one is missing or wrong."""

import json

import pytest
from tiny_models import word_tokenizer

from model.errors import UserError
from model.tokenizer import load_tokenizer

TEXT = "the quick brown fox"


def test_tokenizer_json(tmp_path):
    expected = word_tokenizer(tmp_path, 300).encode(TEXT).ids
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.encode(TEXT) == [0, *expected]
    assert tokenizer.encode(TEXT, bos=False, eos=True) == [*expected, 1]
    assert tokenizer.decode(tokenizer.encode(TEXT, eos=True)) == TEXT
    assert tokenizer.vocab_size <= 300


def test_truncation_and_padding_of_the_file_are_left_alone(tmp_path):
    tokenizer = word_tokenizer(tmp_path, 300)
    expected = tokenizer.encode(TEXT).ids
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(TEXT, bos=False) == expected


def test_tokenizer_config_names_the_special_tokens(tmp_path):
    word_tokenizer(tmp_path)
    config = {"bos_token": {"content": "</s>"}, "eos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 0)
    (tmp_path / "tokenizer_config.json").write_text("{")
    for content, message in (
        ("[]", "must hold a JSON object"),
        ('{"bos_token": {"a": 1}}', "name the bos_token"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json is not valid JSON"):
        load_tokenizer(tmp_path)


def test_sentencepiece(tmp_path):
    import sentencepiece

    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=31, minloglevel=2
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (31, 1, 2)
    ids = tokenizer.encode(TEXT, eos=True)
    assert ids[0] == 1 and ids[-1] == 2 and tokenizer.decode(ids) == TEXT


def test_vocabulary_must_fit(tmp_path):
    word_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    size = tokenizer.vocab_size
    assert (
        tokenizer.check_vocabulary(size) is tokenizer and tokenizer.check_vocabulary(size + 64) is tokenizer
    )
    for vocab_size in (size - 1, 32000):
        with pytest.raises(
            UserError, match=f"has ids below {size} and the model a vocabulary of {vocab_size}"
        ):
            tokenizer.check_vocabulary(vocab_size)


def test_a_vocabulary_with_a_gap_must_fit_by_its_highest_id(tmp_path):
    tokenizer = word_tokenizer(tmp_path)
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"]["unheard-of"] = 100_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="has ids below 100001 and the model a vocabulary of 200"):
        load_tokenizer(tmp_path).check_vocabulary(200)


def test_special_tokens_in_a_text_are_text(tmp_path):
    tokenizer = word_tokenizer(tmp_path, 300)
    eos_id = tokenizer.token_to_id("</s>")
    assert eos_id in tokenizer.encode("fox</s>dog").ids
    loaded = load_tokenizer(tmp_path)
    ids = loaded.encode("fox</s>dog", bos=False, eos=True)
    assert ids.index(eos_id) == len(ids) - 1
    assert loaded.decode(ids) == "fox</s>dog"


def test_missing_and_broken(tmp_path):
    with pytest.raises(UserError, match="neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(UserError, match="not a sentencepiece model; LLaMA 3's"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a readable tokenizer.json"):
        load_tokenizer(tmp_path)
