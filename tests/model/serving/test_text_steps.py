"""After every token the text is that of all tokens, and a token costs as much late in an answer as early."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import word_tokenizer
from tiny_tokenizers import byte_fallback, byte_level, sentencepiece, sentencepiece_that_strips

from model.serving.text import AnswerText
from model.stop_strings import cut, settled_length
from model.tokenizer import load_tokenizer

TEXTS = ("the quick", " the", "  ", " ", "é", "😀", "漢字", "\ufffd", "dog\n", "END", "a\u0301")


MAKERS = (word_tokenizer, byte_level, byte_fallback, sentencepiece, sentencepiece_that_strips)


@cache
def tokenizer_of(make):
    with TemporaryDirectory() as folder:
        make(Path(folder))
        return load_tokenizer(folder)


@cache
def pieces_of(make):
    """Token lists to make answers of: of texts, single bytes, special tokens and unknown ids."""
    tokenizer = tokenizer_of(make)
    bytes_of = dict(tokenizer.byte_ids)
    for id in range(tokenizer.vocab_size):
        known = tokenizer.token_bytes(id)
        if known is not None and len(known) == 1:
            bytes_of[known[0]] = id
    found = [[id] for id in range(tokenizer.vocab_size)] + [[tokenizer.vocab_size + 5]]
    found += [
        [bytes_of[byte]] for byte in (0xF0, 0x9F, 0x98, 0x80, 0xEF, 0xBF, 0xBD, 0xFF) if byte in bytes_of
    ] * 9
    if make is not byte_fallback:  # it has no merges, so that it encodes nothing
        found += [tokenizer.encode(text, bos=False, eos=False) for text in TEXTS] * 9
    found += [
        [bytes_of[byte] for byte in text.encode()] for text in TEXTS if set(text.encode()) <= bytes_of.keys()
    ] * 9
    return found


@pytest.mark.parametrize("make", MAKERS)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_after_every_token_it_is_the_text_of_all(make, data):
    tokenizer = tokenizer_of(make)
    chosen = data.draw(st.lists(st.sampled_from(pieces_of(make)), min_size=1, max_size=25))
    times = data.draw(st.sampled_from([1, 1, 1, 4]))  # also the same tokens again and again
    stops = data.draw(
        st.sampled_from([[], ["END"], ["he q", "g\n"], ["\ufffd"], [" t", "zzz"], ["漢字", "  "]])
    )
    answer, shown, said = AnswerText(tokenizer.decode, stops), "", []
    for token in [token for piece in chosen for token in piece] * times:
        said.append(token)
        stopped = answer.add(token)
        shown += answer.take()
        whole = tokenizer.decode(said)
        assert stopped == any(stop in whole.rstrip("\ufffd") for stop in stops), said
        text = cut(whole, stops)
        assert shown == (text if stopped else text[: max(settled_length(text, stops), len(shown))]), said
        if stopped:
            break
    shown += answer.finish()
    assert shown == cut(tokenizer.decode(said), stops), said


@pytest.mark.parametrize("what", ["the", "😀", "\ufffd", "ÿ", " "])
@pytest.mark.parametrize("make", [byte_level, byte_fallback, sentencepiece])
def test_few_tokens_are_decoded_again(make, what):
    """Words, characters of several tokens, spaces, and bytes that never become a character."""
    tokenizer, counts = tokenizer_of(make), []
    if make is byte_fallback:
        tokens = {"the": [257], " ": [256], "ÿ": [0xFF]}.get(what) or [*what.encode()]
    else:
        tokens = tokenizer.encode(what, bos=False, eos=False)
        tokens = tokens[:1] if what == "ÿ" else tokens  # a first byte, again and again

    def decode(ids):
        counts.append(len(ids))
        return tokenizer.decode(ids)

    answer, shown = AnswerText(decode, ["never"]), ""
    said = ([257 if make is byte_fallback else 290] + tokens * 600)[:601]
    for token in said:
        answer.add(token)
        shown += answer.take()
    assert shown + answer.finish() == tokenizer.decode(said)
    assert max(counts) <= 20 and sum(counts) <= 25 * len(said)
