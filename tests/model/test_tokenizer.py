"""Tokenizers: the ids are AutoTokenizer's, whatever file names the special tokens, and a broken file is named."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from pathlib import Path

import pytest
import transformers
from tiny_models import word_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from model.errors import UserError
from model.tokenizer import load_tokenizer

TEXT = "the quick brown fox"


def llama_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json as LLaMA 2's: no pre-tokenizer, a byte for what the vocabulary lacks."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁theqickbrownfx.",
        "▁t",
        "he",
        "▁the",
    ]
    vocabulary = {piece: id for id, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    return tokenizer


def template(single: str, tokenizer: Tokenizer) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=single, special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    )


def flags(special: bool) -> dict[str, bool]:
    return {"special": special, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}


NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
CONFIGS = {
    "none": None,
    "silent": {},
    "names": NAMES,
    "objects": {"bos_token": {"__type": "AddedToken", "content": "<s>"} | flags(True), "eos_token": "</s>"},
    "no bos": NAMES | {"add_bos_token": False},
    "bos and eos": NAMES | {"add_bos_token": True, "add_eos_token": True},
    "nulls": {"bos_token": None, "eos_token": None, "add_bos_token": None},
    "an added token": NAMES | {"added_tokens_decoder": {"5000": {"content": "<tool>"} | flags(False)}},
    "an added <pad>": NAMES | {"added_tokens_decoder": {"5000": {"content": "<pad>"} | flags(True)}},
    "spaces beside it": NAMES
    | {
        "added_tokens_decoder": {
            "5000": {"content": "<tool>"} | flags(False) | {"lstrip": True},
            "5001": {"content": "fox"} | flags(False) | {"single_word": True},
        }
    },
    "no such tokens": NAMES | {"eos_token": "<end>", "pad_token": "<pad>", "extra_special_tokens": ["<a>"]},
    "prefix space": NAMES | {"add_prefix_space": False, "legacy": True},
}
BESIDE = {
    "none": {},
    "swapped": {
        "special_tokens_map.json": {"bos_token": "</s>", "eos_token": {"content": "<s>"} | flags(True)}
    },
    "added": {"added_tokens.json": {"<tool>": 5000}, "special_tokens_map.json": {"bos_token": None}},
}
TEXTS = (TEXT, " the  fox", "the fox é😀\n\nx", "", "a <tool> fox.", "foxes  <tool>  foxtail")


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("make", [word_tokenizer, llama_tokenizer])
def test_the_ids_are_those_of_autotokenizer(tmp_path, make, kind, beside):
    """For every post-processor and every configuration."""
    for name, config, single in (
        (name, config, single)
        for (name, config), single in itertools.product(
            CONFIGS.items(), (None, "<s> $A", "<s> $A </s>", "$A")
        )
        if name in ("names", "nulls") or single in (None, "<s> $A")
    ):
        directory = tmp_path / f"{name}, {single}".replace("/", "")
        directory.mkdir()
        tokenizer = make(directory, 300) if make is word_tokenizer else make(directory)
        if single:
            tokenizer.post_processor = template(single, tokenizer)
            tokenizer.save(str(directory / "tokenizer.json"))
        files = dict(BESIDE[beside]) | {"config.json": {"model_type": "llama"}}
        if config is not None:
            files["tokenizer_config.json"] = config | ({"tokenizer_class": kind} if kind else {})
        for file, content in files.items():
            (directory / file).write_text(json.dumps(content))
        theirs = transformers.AutoTokenizer.from_pretrained(directory, split_special_tokens=True)
        ours = load_tokenizer(directory)
        for text in TEXTS:
            ids = theirs(text).input_ids
            assert ours.encode(text) == ids, (directory.name, text)
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        named = files.get("tokenizer_config.json", {}) | files.get("special_tokens_map.json", {})
        if "eos_token" in named:
            assert ours.eos_id == theirs.eos_token_id
        if "bos_token" in named:
            assert ours.bos_id == theirs.bos_token_id


@pytest.mark.parametrize("single", [None, "<s> $A </s>", "$A"])
def test_the_ids_of_code_llama(tmp_path, single):
    """transformers' class begins a text with BOS, whatever the tokenizer.json says."""
    tokenizer = llama_tokenizer(tmp_path)
    if single:
        tokenizer.post_processor = template(single, tokenizer)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name in ("silent", "names", "no bos", "nulls", "an added token", "prefix space"):
        config = CONFIGS[name] | {"tokenizer_class": "CodeLlamaTokenizer"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
        ours = load_tokenizer(tmp_path)
        for text in TEXTS:
            ids = theirs(text).input_ids
            assert ours.encode(text) == ids, (name, text)
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_prompt_has_no_end_and_an_answer_has_one(tmp_path):
    """Whatever the files put around a text; None is what they say."""
    tokenizer = word_tokenizer(tmp_path, 300)
    inner = tokenizer.encode(TEXT).ids
    ids = {True: {None: [0], True: [0], False: []}, False: {None: [], True: [0], False: []}}
    ends = {True: {None: [1], True: [1], False: []}, False: {None: [], True: [1], False: []}}
    for has_bos, has_eos in itertools.product((True, False), repeat=2):
        tokenizer.post_processor = template(f"{'<s> ' * has_bos}$A{' </s>' * has_eos}", tokenizer)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        loaded = load_tokenizer(tmp_path)
        for bos, eos in itertools.product((None, True, False), repeat=2):
            assert loaded.encode(TEXT, bos=bos, eos=eos) == ids[has_bos][bos] + inner + ends[has_eos][eos]
    assert loaded.decode(loaded.encode(TEXT, eos=True)) == TEXT


def test_truncation_and_padding_of_the_file_are_left_alone(tmp_path):
    tokenizer = word_tokenizer(tmp_path, 300)
    expected = tokenizer.encode(TEXT).ids
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(TEXT, bos=False) == expected


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", '{"bos_token": {"a": 1}}', "must name the bos_token by a string"),
        (
            "tokenizer_config.json",
            r'{"eos_token": "\ud800"}',
            "tokenizer_config.json is not valid JSON: it holds half",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": [1]}',
            "must name the added_tokens_decoder by an object",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "no id with a text: 'x'"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"%s": {"content": "a"}}}' % ("9" * 5000),
            "no id with a text: '999",
        ),
        ("special_tokens_map.json", "{", "special_tokens_map.json is not valid JSON"),
        ("added_tokens.json", '{"<a>": "b"}', "no id with a text: 'b'"),
    ],
)
def test_broken_files_beside_a_tokenizer_are_named(tmp_path, file, content, message):
    word_tokenizer(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=300, minloglevel=2,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.mark.parametrize(
    ("config", "before", "after"),
    [
        (None, [1], []),
        (NAMES, [1], []),
        (NAMES | {"add_bos_token": False}, [], []),
        (NAMES | {"add_bos_token": None, "add_eos_token": True}, [], [2]),
        ({"bos_token": None, "add_eos_token": True}, [], [2]),
        ({"bos_token": "</s>"}, [2], []),
    ],
)
def test_sentencepiece(tmp_path, sentencepiece_file, config, before, after):
    """The pieces are sentencepiece's; the tokens around them those of tokenizer_config.json, where there is one."""
    import sentencepiece

    shutil.copy(sentencepiece_file, tmp_path)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    expected = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file)).encode(TEXT)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(TEXT) == before + expected + after
    assert tokenizer.decode(tokenizer.encode(TEXT, eos=True)) == TEXT
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (300, 2)


def test_an_added_token_beside_a_sentencepiece_model(tmp_path, sentencepiece_file):
    shutil.copy(sentencepiece_file, tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 300, "<tool>": 301}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<pad>", "eos_token": "<pad>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.own_size, tokenizer.eos_id) == (302, 300, 300)
    assert tokenizer.encode("fox", eos=True)[-1] == 300 and tokenizer.decode([300]) == ""
    with pytest.raises(
        UserError, match="holds the added token '<tool>', which .* does not have: write a tokenizer"
    ):
        tokenizer.encode("a <tool>")


def test_ids_that_the_tokenizer_does_not_have_are_left_out(tmp_path, sentencepiece_file):
    """An embedding has more rows than its tokenizer has ids, and a model may name any of them."""
    shutil.copy(sentencepiece_file, tmp_path)
    tokenizer = load_tokenizer(tmp_path).check_vocabulary(320)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode([319, *ids, 300, -1]) == TEXT
    word_tokenizer(tmp_path, 300)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([319, -1, *tokenizer.encode(TEXT), tokenizer.vocab_size, 10**9, 1 << 40]) == TEXT


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_an_answer_cut_inside_a_character_keeps_the_whole_ones(tmp_path, sentencepiece_file, kind):
    if kind == "tokenizer.json":
        llama_tokenizer(tmp_path)
    else:
        shutil.copy(sentencepiece_file, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = "he 😀é日"
    ids = tokenizer.encode(text, bos=False)
    whole = len(tokenizer.encode("he ", bos=False))
    for count in range(whole, len(ids) + 1):
        content = text.encode()[: len("he ") + count - whole]
        assert tokenizer.decode(ids[:count]) == content.decode(errors="replace")
    assert tokenizer.decode(ids) == text


def test_vocabulary_must_fit(tmp_path):
    word_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    size = tokenizer.vocab_size
    for rows in (size, size + 64):
        assert tokenizer.check_vocabulary(rows).encode(TEXT) == tokenizer.encode(TEXT)
    for rows in (size - 1, 32000):
        with pytest.raises(UserError, match=f"has ids below {size} and the model a vocabulary of {rows}"):
            tokenizer.check_vocabulary(rows)


def test_an_added_token_may_lie_beyond_the_model(tmp_path, capsys):
    """32,001 tokens with an added <pad> on 32,000 rows: a warning, and only a text that holds the token is refused."""
    tokenizer = word_tokenizer(tmp_path, 300)
    rows = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    load_tokenizer(tmp_path).check_vocabulary(rows + 1)
    assert capsys.readouterr().err == ""
    loaded = load_tokenizer(tmp_path).check_vocabulary(rows)
    assert f"ids up to {rows} and the model a vocabulary of {rows}: a text that" in capsys.readouterr().err
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT).ids
    with pytest.raises(
        UserError, match=rf"holds the token '<tool>' \(id {rows}\), and the model's vocabulary ends"
    ):
        loaded.encode("a <tool>")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<tool>"}')
    with pytest.raises(
        UserError, match=f"puts id {rows} around a text and the model has a vocabulary of {rows}"
    ):
        load_tokenizer(tmp_path).check_vocabulary(rows)


def test_a_vocabulary_with_a_gap_must_fit_by_its_highest_id(tmp_path):
    tokenizer = word_tokenizer(tmp_path)
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"]["unheard-of"] = 100_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="has ids below 100001 and the model a vocabulary of 200"):
        load_tokenizer(tmp_path).check_vocabulary(200)


def test_a_token_that_no_file_gives_an_id(tmp_path, capsys):
    """It gets the id that AutoTokenizer gives it; without a row in the model it is left out."""
    tokenizer = word_tokenizer(tmp_path, 300)
    rows = tokenizer.get_vocab_size()
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": "<s>", "pad_token": "<p>", "eos_token": "<end>"}'
    )
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_id, loaded.vocab_size, loaded.own_size) == (rows, rows, rows)
    assert loaded.check_vocabulary(rows + 2).encode("fox", eos=True)[-1] == rows
    assert capsys.readouterr().err == ""
    assert loaded.check_vocabulary(rows).eos_id is None
    assert "name the eos_token '<end>', which has no id" in capsys.readouterr().err


def test_special_tokens_in_a_text_are_text(tmp_path):
    tokenizer = word_tokenizer(tmp_path, 300)
    eos_id = tokenizer.token_to_id("</s>")
    assert eos_id in tokenizer.encode("fox</s>dog").ids
    loaded = load_tokenizer(tmp_path)
    ids = loaded.encode("fox</s>dog", bos=False, eos=True)
    assert ids.index(eos_id) == len(ids) - 1
    assert loaded.decode(ids) == "fox</s>dog"


def unigram_tokenizer(path: Path) -> None:
    """Of "abab..." both divisions are equally good, and the end of the text decides which one is taken."""
    pieces = [("<unk>", 0.0), ("a", -2.0), ("b", -2.0), ("ab", -1.0), ("ba", -1.0)]
    Tokenizer(models.Unigram(pieces, unk_id=0)).save(str(path / "tokenizer.json"))


@pytest.mark.parametrize("make", [word_tokenizer, llama_tokenizer, unigram_tokenizer, None])
@pytest.mark.parametrize(
    "text", ["the quick brown fox ", "aaaaaaa", "ab", " ", "é日😀", "the \n\n  fox ", "\t. "]
)
def test_the_beginning_of_a_long_text_is_that_of_its_encoding(tmp_path, sentencepiece_file, make, text):
    if make is None:
        shutil.copy(sentencepiece_file, tmp_path)
    else:
        make(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    long = text * (30_000 // len(text)) + text[:1]
    whole = tokenizer.encode(long, eos=True)
    for limit in (1, 33, 300, len(whole), len(whole) + 5):
        assert tokenizer.encode(long, eos=True, limit=limit) == whole[:limit]


@pytest.mark.parametrize("make", [word_tokenizer, llama_tokenizer, unigram_tokenizer, None])
def test_a_tokenizer_sent_to_another_process_is_the_same(tmp_path, sentencepiece_file, make):
    """DataLoader sends its data set to workers that are spawned."""
    if make is None:
        shutil.copy(sentencepiece_file, tmp_path / "tokenizer.model")
    else:
        make(tmp_path)
    added = {"5000": {"content": "<tool>"} | flags(False), "5001": {"content": "<pad>"} | flags(True)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(NAMES | {"added_tokens_decoder": added}))
    tokenizer = load_tokenizer(tmp_path)
    tokenizer = tokenizer.check_vocabulary(tokenizer.vocab_size)
    sent = pickle.loads(pickle.dumps(tokenizer))
    own = {"_encode": None, "_decode": None, "_encode_template": None, "_bytes_of": None}
    assert vars(sent) | own == vars(tokenizer) | own
    ids = range(tokenizer.vocab_size)
    assert list(map(sent.token_bytes, ids)) == list(map(tokenizer.token_bytes, ids))
    for text in (*TEXTS[:4], "</s> is text <pad> too"):
        assert sent.encode(text) == tokenizer.encode(text)
        assert sent.decode(sent.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_the_end_of_a_long_text_is_not_encoded(tmp_path):
    """10 MB took 2.7 GB and 10 s for the 512 tokens that are kept."""
    word_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    seen = []
    counted = type(tokenizer)(
        tokenizer.vocab_size,
        0,
        1,
        lambda text: seen.append(len(text)) or tokenizer._encode(text),
        tokenizer._decode,
    )
    assert counted.encode(TEXT * 500_000, limit=512) == tokenizer.encode(TEXT * 500, limit=512)
    assert sum(seen) < 20_000


def test_missing_and_broken(tmp_path):
    with pytest.raises(UserError, match="neither tokenizer.json nor tokenizer.model: put the model's"):
        load_tokenizer(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(UserError, match="it has tekken.json, Mistral's own format, which is not read here"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(UserError, match="not a sentencepiece model; LLaMA 3's"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a readable tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_encode_a_text_is_named(tmp_path):
    for vocabulary in ({"fox": 0}, {}):
        Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(UserError, match="the tokenizer of .* cannot encode a text: WordLevel error"):
            load_tokenizer(tmp_path).encode("dog")
