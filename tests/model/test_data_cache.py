"""Tokenised data on disk: made once, equal to what is in memory, and known again only where nothing has changed."""

from __future__ import annotations

import errno
import json
import os
import shutil

import numpy as np
import pytest
from tiny_chat import CHATML, OTHER_ROLES, chat_folder
from tiny_runs import arguments, losses_of, run

from model.data import encoding
from model.data.cache import CachedSamples


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return chat_folder(tmp_path_factory.mktemp("chats"))


def words(chats, output, *more):
    return arguments(chats, output, "--data", str(chats / "chats.jsonl"), *more)


@pytest.fixture
def encoded(monkeypatch):
    """The records that were tokenised."""
    found = []
    real = encoding.Encoder.__call__

    def counting(self, record):
        found.append(record)
        return real(self, record)

    monkeypatch.setattr(encoding.Encoder, "__call__", counting)
    return found


def test_a_run_from_the_cache_is_the_same_run(chats, tmp_path, encoded, capsys):
    cache = str(tmp_path / "cache")
    assert run(*words(chats, tmp_path / "plain")) == 0
    assert len(encoded) == 8
    assert "8 records: every sample fits" in capsys.readouterr().err
    assert run(*words(chats, tmp_path / "first", "--cache", cache)) == 0
    assert len(encoded) == 16
    assert run(*words(chats, tmp_path / "second", "--cache", cache)) == 0
    assert len(encoded) == 16, "the cache was not used"
    assert losses_of(tmp_path / "plain") == losses_of(tmp_path / "first") == losses_of(tmp_path / "second")
    # it is the same data, so a run goes on with or without the cache
    assert run(*words(chats, tmp_path / "plain", "--cache", cache, "--resume")) == 0


def test_what_a_sample_depends_on_makes_another_cache(chats, tmp_path, encoded):
    cache = tmp_path / "cache"
    folder = shutil.copytree(chats, tmp_path / "copy")

    def folders(*more):
        assert run(*words(folder, tmp_path / "out", "--cache", str(cache), *more, "--overwrite")) == 0
        return len(list(cache.iterdir()))

    assert folders() == folders() == 1
    assert folders("--max-seq-len", "100") == 2
    (folder / "template.jinja").write_text(CHATML.replace("\n", " "))
    assert folders("--chat-template", str(folder / "template.jinja")) == 3
    config = json.loads((folder / "base/tokenizer_config.json").read_text())
    (folder / "base/tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "</s>"}))
    assert folders() == 4
    text = (folder / "chats.jsonl").read_text()
    (folder / "chats.jsonl").write_text(text.replace("Say six.", "Say 666."))
    assert folders() == 5


FLIPPED = ("tokens", "answers", "about.json")


@pytest.mark.parametrize("damage", ["shorter", "missing", "no json", *FLIPPED])
def test_a_damaged_cache_is_made_again(chats, tmp_path, encoded, capsys, damage):
    cache = tmp_path / "cache"
    assert run(*words(chats, tmp_path / "out", "--cache", str(cache))) == 0
    (place,) = cache.iterdir()
    if damage == "shorter":
        (place / "tokens").write_bytes((place / "tokens").read_bytes()[:-4])
    elif damage in FLIPPED:  # one bit, in the middle: it was trained on without a word
        content = bytearray((place / damage).read_bytes())
        content[len(content) // 2] ^= 1
        (place / damage).write_bytes(content)
    elif damage == "missing":
        (place / "offsets").unlink()
    else:
        (place / "about.json").write_text("{")
    assert run(*words(chats, tmp_path / "again", "--cache", str(cache))) == 0
    assert "is damaged" in capsys.readouterr().err and len(encoded) == 16
    assert losses_of(tmp_path / "out") == losses_of(tmp_path / "again")


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EACCES, errno.EMFILE])
def test_a_cache_that_cannot_be_opened_stays(chats, tmp_path, monkeypatch, capsys, code):
    """It was called damaged and removed."""
    cache = tmp_path / "cache"
    assert run(*words(chats, tmp_path / "out", "--cache", str(cache))) == 0
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}

    def fail(path, *_):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(np, "memmap", fail)
    capsys.readouterr()
    assert run(*words(chats, tmp_path / "again", "--cache", str(cache))) == 2
    assert capsys.readouterr().err.count(os.strerror(code)) == 1
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before


def test_a_run_that_fails_leaves_no_half_cache(chats, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text((chats / "chats.jsonl").read_text() + "\n{oops")
    cache = tmp_path / "cache"
    assert run(*words(chats, tmp_path / "out", "--cache", str(cache), "--data", str(bad))) == 2
    assert list(cache.iterdir()) == []


def test_samples_are_read_from_the_disk(chats, tmp_path):
    cache = tmp_path / "cache"
    assert run(*words(chats, tmp_path / "out", "--cache", str(cache))) == 0
    (place,) = cache.iterdir()
    samples = CachedSamples(place)
    assert len(samples) == 8 and samples[-1] == samples[7] and samples[2:4] == [samples[2], samples[3]]
    assert samples.lengths.tolist() == [len(sample.tokens) for sample in samples]
    assert len(samples[0].answers) == 2
    with pytest.raises(IndexError):
        samples[8]


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(
    "kind", ["empty part", "assistant first", "role", "template", "weight", "no template"]
)
def test_bad_data_is_one_sentence_and_status_2(chats, tmp_path, capsys, kind, cache):
    user, assistant = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}
    turns, message = {
        "empty part": ([user | {"content": "Hi. " * 300}, assistant], "leaves no sample to train on"),
        "assistant first": ([assistant], "the conversation begins with the assistant"),
        "role": ([user, assistant | {"role": "tool"}], "the role 'tool' is not known"),
        "template": ([user, assistant], "it names the roles bot, human"),
        "weight": ([user, assistant], "a file counts with a weight above 0"),
        "no template": ([user, assistant], "the tokenizer has no chat template"),
    }[kind]
    folder = chat_folder(tmp_path / "plain", None) if kind == "no template" else chats
    (tmp_path / "roles.jinja").write_text(OTHER_ROLES)
    data = tmp_path / "bad.jsonl"
    data.write_text(json.dumps({"messages": turns}))
    more = ["--chat-template", str(tmp_path / "roles.jinja")] if kind == "template" else []
    more += ["--cache", str(tmp_path / "cache")] if cache else []
    named = f"{data}:0" if kind == "weight" else str(data)
    assert run(*words(folder, tmp_path / "out", *more), "--data", named) == 2
    error = capsys.readouterr().err.splitlines()
    assert [line for line in error if line.startswith("error: ")] == error[-1:] and message in error[-1]
    assert not (tmp_path / "out").exists()
