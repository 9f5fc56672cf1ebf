"""The text of an answer, token by token: together it is what decoding all tokens at once gives."""

import json
import random

import pytest
from tiny_models import word_tokenizer
from tiny_tokenizers import byte_fallback, byte_level

from model.generate import Watcher
from model.serving.request import TokenLogprobs
from model.serving.responses import Answer, Piece, Responses
from model.serving.text import AnswerText
from model.stop_strings import cut
from model.tokenizer import load_tokenizer


@pytest.mark.parametrize("make", [word_tokenizer, byte_fallback])
@pytest.mark.parametrize("stops", [[], ["h", "the q"], ["\ufffd"], [" t", "zzz"]], ids=str)
def test_pieces_are_the_whole_text(tmp_path, make, stops):
    make(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    chance = random.Random(0)
    # whole characters, their bytes in and out of order, words, special tokens
    known = (
        [tokenizer.encode(text, bos=False, eos=False) for text in ("the quick", "hi", " t")]
        if make is word_tokenizer
        else []
    )
    bytes_of = (
        [[byte for byte in text.encode()] for text in ("é", "😀", "漢")] if make is byte_fallback else []
    )
    for _ in range(300):
        tokens = []
        while len(tokens) < chance.randrange(1, 30):
            if (known or bytes_of) and chance.random() < 0.6:
                tokens += chance.choice(known + bytes_of)
            else:
                tokens.append(chance.randrange(min(tokenizer.vocab_size, 260)))
        answer, shown, said = AnswerText(tokenizer.decode, stops), "", []
        for token in tokens:
            said.append(token)
            stopped = answer.add(token)
            shown += answer.take()
            if stopped:
                break
        shown += answer.finish()
        whole = tokenizer.decode(said)
        assert shown == cut(whole, stops), tokens
        assert answer.stopped <= any(stop in whole for stop in stops)
        if not answer.stopped:  # nothing was overlooked
            settled = whole.rstrip("\ufffd")
            assert not any(stop in settled for stop in stops)


def test_long_stop_strings_are_not_cut_to_every_length():
    """Every token of every answer is looked at: 16 stop strings of 1,024 characters took 2 ms for each."""

    class Counted(str):
        looks = 0

        def __getitem__(self, place):
            Counted.looks += 1
            return super().__getitem__(place)

    answer = AnswerText(lambda ids: "".join(map(chr, ids)), [Counted("zq" * 512 + str(i)) for i in range(16)])
    for token in range(97, 121):
        answer.add(token)
        assert answer.take() == chr(token)
    assert Counted.looks <= 24 * 16


@pytest.mark.parametrize("make", [word_tokenizer, byte_fallback])
@pytest.mark.parametrize("is_chat", [False, True])
def test_told_tokens_are_the_text_with_its_spaces(tmp_path, make, is_chat):
    """A tokenizer as LLaMA's takes the space off the beginning of what it decodes: not off every token."""
    make(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokens = (
        [257, 257, 258, 259] if make is byte_fallback else tokenizer.encode("the quick the", False, False)
    )
    answer = Answer(tokenizer.decode(tokens), len(tokens))
    answer.told = [Piece(0, "", token, TokenLogprobs(-1.0, [(token, -1.0)])) for token in tokens]
    (choice,) = Responses("x", is_chat, tokenizer).whole([answer], 1)["choices"]
    told = choice["logprobs"]
    if is_chat:
        assert "".join(one["token"] for one in told["content"]) == answer.text
        assert all(one["top_logprobs"][0]["token"] == one["token"] for one in told["content"])
        return
    assert "".join(told["tokens"]) == answer.text
    for text, offset, others in zip(told["tokens"], told["text_offset"], told["top_logprobs"], strict=True):
        assert answer.text[offset:].startswith(text) and others == {text: -1.0}


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("is_chat", [False, True])
def test_bytes_of_a_characters_parts_are_the_characters(tmp_path, make, is_chat):
    """A client joins them: the text of a part shows U+FFFD, whichever part it is."""
    make(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokens = tokenizer.encode("the 🙂ü", False, False)
    text = tokenizer.decode(tokens)
    answer = Answer(text, len(tokens))
    others = [(token, -2.0) for token in tokens[-6:]]
    answer.told = [Piece(0, "", token, TokenLogprobs(-1.0, others)) for token in tokens]
    (choice,) = Responses("x", is_chat, tokenizer).whole([answer], 1)["choices"]
    told = choice["logprobs"]
    if is_chat:
        assert bytes(byte for one in told["content"] for byte in one["bytes"]).decode() == text
        assert "\ufffd" not in json.dumps(told, ensure_ascii=False)
        return
    parts = ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x99", "bytes:\\x82", "bytes:\\xc3", "bytes:\\xbc"]
    assert told["tokens"][-6:] == parts and all(set(found) == set(parts) for found in told["top_logprobs"])
    assert told["text_offset"][-6] == len(text) - 2 and told["text_offset"][-2] == len(text) - 1


def test_of_tokens_with_one_text_the_likeliest_counts(tmp_path):
    word_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    answer = Answer("", 1)
    answer.told = [Piece(0, "", 1, TokenLogprobs(-0.5, [(0, -0.5), (1, -3.0)]))]  # <s>, </s>: no text
    (choice,) = Responses("x", False, tokenizer).whole([answer], 1)["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"": -0.5}]


def test_offsets_count_broken_bytes_as_the_text_does(tmp_path):
    byte_level(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokens = tokenizer.encode("ü", False, False) + tokenizer.encode("the", False, False)
    tokens = [tokens[1], tokens[0], *tokens[2:]]  # a character's second byte, then its first
    answer = Answer(tokenizer.decode(tokens), len(tokens))
    answer.told = [Piece(0, "", token, TokenLogprobs(-1.0, [])) for token in tokens]
    (choice,) = Responses("x", False, tokenizer).whole([answer], 1)["choices"]
    assert answer.text.startswith("\ufffd\ufffdt") and choice["logprobs"]["text_offset"][:3] == [0, 1, 2]


@pytest.mark.parametrize("kept", [4, 5, 6, 7, 8])
def test_half_a_character_is_no_broken_one(tmp_path, kept, capsys):
    """With the replacement character as a stop string, every answer ended at its first emoji."""
    byte_fallback(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokens = [258, 256, *"😀".encode(), 258, 0x80, 258][:kept]
    answer, watcher = AnswerText(tokenizer.decode, ["\ufffd"]), Watcher(tokenizer, ["\ufffd"], stream=True)
    pieces = ""
    for count, token in enumerate(tokens, 1):
        ends = answer.add(token), watcher(0, tokens[:count])
        pieces += answer.take()
        assert ends == (count == 9, count == 9)
    watcher.finish()
    expected = {4: "h ", 5: "h ", 6: "h 😀", 7: "h 😀h", 8: "h 😀h"}[kept]
    assert pieces + answer.finish() == expected == capsys.readouterr().out
