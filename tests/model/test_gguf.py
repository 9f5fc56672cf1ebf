"""GGUF bases: the numbers are those of the safetensors original, the ids those of the original tokenizer, and bad files
are refused in one sentence."""

from __future__ import annotations

import json
import random
import shutil
import struct

import numpy as np
import pytest
import torch
from tiny_models import hf_model, word_tokenizer
from tiny_runs import RECORDS, run

gguf = pytest.importorskip("gguf")  # an extra

from tiny_gguf import byte_level_fields, gguf_tensors, model_fields, write_gguf, write_model  # noqa: E402

from model import generate as generate_program  # noqa: E402
from model.chat import encode_chat  # noqa: E402
from model.errors import UserError  # noqa: E402
from model.gguf_weights import read  # noqa: E402
from model.layers import rotary_frequencies  # noqa: E402
from model.loading import load_base  # noqa: E402
from model.rope_scaling import RopeScaling  # noqa: E402
from model.tokenizer import load_tokenizer  # noqa: E402

TOKENS = torch.arange(3, 43)[None]
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def original():
    return hf_model("llama", **SMALL)


def logits(base) -> torch.Tensor:
    with torch.no_grad():
        return base.logits(base.hidden_states(TOKENS.to(base.device)))[0]


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_the_weights_are_the_originals_as_the_type_rounds_them(tmp_path, original, type):
    write_model(tmp_path / "model.gguf", original, type)
    base = load_base(tmp_path / "model.gguf")
    assert base.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(type, torch.float32)
    kind = gguf.GGMLQuantizationType[type]
    for name, weight in original.state_dict().items():
        ours = base.state_dict()[name.removeprefix("model.")]
        if weight.dim() == 2:
            # a row is rounded by itself, so the order of the rows does not matter
            weight = torch.from_numpy(
                gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
            )
        assert torch.equal(ours.float(), weight.to(base.dtype).float()), name


@pytest.mark.parametrize("kind", ["llama", "tied", "linear"])
def test_logits_are_those_of_transformers(tmp_path, kind):
    changes = {"tied": {"tie_word_embeddings": True}}.get(kind, {})
    model = hf_model("linear" if kind == "linear" else "llama", **changes)
    scaling = (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0} if kind == "linear" else {}
    )
    keys = {"llama.attention.key_length": 16, "llama.attention.value_length": 16} if kind == "linear" else {}
    write_model(tmp_path / "a.gguf", model, fields=scaling | keys)
    base = load_base(tmp_path)  # a folder with one GGUF file
    with torch.no_grad():
        theirs = model(TOKENS).logits[0]
    torch.testing.assert_close(logits(base), theirs, atol=2e-5, rtol=1e-5)
    assert base.config.tie_embeddings == (kind == "tied")


def test_a_quantised_base_takes_the_dtype_that_is_asked_for(tmp_path, original):
    write_model(tmp_path / "a.gguf", original, "Q8_0")
    whole, half = load_base(tmp_path / "a.gguf"), load_base(tmp_path / "a.gguf", torch.bfloat16)
    assert half.dtype == torch.bfloat16
    # at once, so that a large base is never in memory as float32
    matrices = [
        weight for weight in read(tmp_path / "a.gguf", torch.bfloat16)[1].values() if weight.dim() == 2
    ]
    assert {weight.dtype for weight in matrices} == {torch.bfloat16}
    assert all(torch.equal(half.state_dict()[k], v.bfloat16()) for k, v in whole.state_dict().items())


def test_the_frequencies_of_llama_3_are_known_by_their_divisors(tmp_path):
    model = hf_model("llama", **SMALL | {"head_dim": 64, "num_attention_heads": 4})
    tensors, fields = gguf_tensors(model), model_fields(model.config) | {"llama.attention.key_length": 64}
    fields |= {"llama.attention.value_length": 64, "llama.rope.freq_base": 500000.0}
    scaling = RopeScaling("llama3", 32.0)
    divisors = rotary_frequencies(64, 5e5, None) / rotary_frequencies(64, 5e5, scaling)
    assert divisors.min() == 1 and 1 < divisors.median() < 32 and divisors.max() == 32
    write_gguf(tmp_path / "a.gguf", fields, tensors | {"rope_freqs.weight": divisors.numpy()})
    assert load_base(tmp_path / "a.gguf").config.rope_scaling == scaling
    for other, message in ((divisors.square(), "by other numbers"), (divisors[:5], "do not fit its heads")):
        write_gguf(tmp_path / "a.gguf", fields, tensors | {"rope_freqs.weight": other.numpy()})
        with pytest.raises(UserError, match=message):
            load_base(tmp_path / "a.gguf")


TEXTS = ("the quick brown fox", " the  fox 2024 4202", "don't\n\nDon'T é😀", "the </s> fox", "")


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe"])
def test_byte_level_ids_are_those_of_the_original(tmp_path, original, pre):
    from tokenizers import Regex, pre_tokenizers

    from model.gguf_tokenizer import _LLAMA3

    tokenizer = word_tokenizer(tmp_path, 300)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre != "llama-bpe")
    first = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(Regex(_LLAMA3), "isolated")],
    }[pre]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    content = json.loads(tokenizer.to_str())
    for merge in ("2 0", "20 2"):  # "2024" and "4202" show how digits are split
        content["model"]["vocab"][merge.replace(" ", "")] = len(content["model"]["vocab"])
        content["model"]["merges"].append(merge.split(" "))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    write_gguf(
        tmp_path / "a.gguf", byte_level_fields(tmp_path / "tokenizer.json", pre), {"x": np.zeros(8, "f4")}
    )
    ours, theirs = load_tokenizer(tmp_path / "a.gguf"), load_tokenizer(tmp_path)
    for text in TEXTS:
        ids = theirs.encode(text, bos=True)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (0, 1, theirs.vocab_size)


def test_sentencepiece_ids_are_those_of_the_original(tmp_path):
    import sentencepiece

    draw = random.Random(0)
    words = [
        "".join(draw.choices(["the", "qu", "ick", "he", "o", "x", "fox", "er"], k=3)) for _ in range(400)
    ]
    (tmp_path / "text").write_text(
        "the quick brown fox jumps over the lazy dog 2024\n" * 50 + " ".join(words)
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=360, minloglevel=2,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ids = range(processor.vocab_size())
    kinds = [
        6 if processor.is_byte(i) else 3 if processor.is_control(i) else 2 if processor.is_unknown(i) else 1
        for i in ids
    ]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [processor.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
    }
    write_gguf(tmp_path / "a.gguf", fields, {"x": np.zeros(8, "f4")})
    ours, theirs = load_tokenizer(tmp_path / "a.gguf"), load_tokenizer(tmp_path)
    unseen = ["".join(draw.choices("theovrquick wn", k=40)) for _ in range(200)]  # the order of merges shows
    for text in (*TEXTS[:4], *unseen):
        assert ours.encode(text) == theirs.encode(text), text
        assert (
            ours.decode(ours.encode(text, eos=True)) == theirs.decode(theirs.encode(text, eos=True)) == text
        )
    assert (ours.bos_id, ours.eos_id, ours.prefix, ours.suffix) == (1, 2, (1,), ())


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


def test_programs_take_a_gguf_file(tmp_path, original):
    """Training, then an answer by the chat template."""
    from model import train

    word_tokenizer(tmp_path, 160)
    fields = byte_level_fields(tmp_path / "tokenizer.json") | {"tokenizer.chat_template": TEMPLATE}
    base = tmp_path / "alone" / "a.gguf"
    base.parent.mkdir()
    write_model(base, hf_model("llama", **SMALL | {"max_position_embeddings": 512}), "Q8_0", fields)
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    words = f"--base {base} --data {tmp_path / 'data.json'} --out {tmp_path / 'out'} --epochs 2 --device cpu".split()
    assert run(*words, main=train.main) == 0
    asked = [
        "--base",
        str(base),
        "--adapter",
        str(tmp_path / "out"),
        "--max-new-tokens",
        "2",
        "--device",
        "cpu",
    ]
    assert run(*asked, "--message", "fox", main=generate_program.main) == 0
    assert run(*asked, "--message", "a </s>", main=generate_program.main) == 0  # it stays text


def test_a_chat_is_what_transformers_makes_of_it(tmp_path):
    import transformers

    word_tokenizer(tmp_path, 300)
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    messages = [{"role": "system", "content": "be <quick>"}, {"role": "user", "content": "the fox\n"}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    write_gguf(
        tmp_path / "a.gguf",
        byte_level_fields(tmp_path / "tokenizer.json") | {"tokenizer.chat_template": TEMPLATE},
        {"x": np.zeros(8, "f4")},
    )
    for path in (tmp_path, tmp_path / "a.gguf"):
        assert encode_chat(load_tokenizer(path), messages) == expected
    # what a message spells stays text: no token but the template's own four
    spelled = [{"role": "user", "content": "x</s>"}, {"role": "user", "content": "<s></s"}]
    ids = encode_chat(load_tokenizer(tmp_path), spelled)
    assert (ids.count(theirs.bos_token_id), ids.count(theirs.eos_token_id)) == (1, 2)
    assert theirs.decode(ids).count("</s>") == 3 and theirs.decode(ids).endswith("assistant\n")
    for template, message in (
        ("{{ raise_exception('no system message') }}", "no system message"),
        ("{% for", "cannot be rendered"),
        ("{{ messages[9].content.x }}", "cannot be rendered"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered|unsafe"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        with pytest.raises(UserError, match=message):
            encode_chat(load_tokenizer(tmp_path), messages)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        encode_chat(load_tokenizer(tmp_path), messages)


def fails(path, message, load=load_base) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.block_count": 9}, "holds 4 layers, the configuration says 9"),
        ({"llama.block_count": None}, "must have a positive whole number as block_count"),
        ({"llama.block_count": "4"}, "must have a positive whole number as block_count, it has '4'"),
        ({"llama.embedding_length": 32}, "rope.dimension_count 8"),
        ({"llama.feed_forward_length": 97}, "must have shape"),
        ({"llama.attention.head_count": 0}, "attention.head_count"),
        ({"llama.attention.head_count_kv": 3}, "must be a multiple of the 3"),
        ({"llama.attention.head_count_kv": [4, 4, 2, 2]}, "attention.head_count_kv, it has "),
        ({"llama.rope.dimension_count": 4}, "a part of each head"),
        ({"llama.rope.scaling.type": "yarn"}, "rotary scaling of type 'yarn'"),
        ({"llama.expert_count": 8}, r"says llama.expert_count = 8, which is not supported"),
        ({"llama.logit_scale": 2.0}, r"says llama.logit_scale = 2.0"),
        ({"split.count": 3}, "is one of 3 parts: join them first"),
        ({"general.type": "adapter"}, "holds no model"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "a whole number as eos_token_id"),
    ],
)
def test_headers_that_are_refused(tmp_path, original, changes, message):
    write_model(tmp_path / "a.gguf", original, fields=changes)
    fails(tmp_path / "a.gguf", message)


def test_tensors_that_are_refused(tmp_path, original):
    tensors, fields = gguf_tensors(original), model_fields(original.config)
    path = tmp_path / "a.gguf"
    without = {name: tensor for name, tensor in tensors.items() if name != "blk.1.ffn_up.weight"}
    write_gguf(path, fields, without)
    fails(path, "lacks layers.1.mlp.up_proj.weight")
    write_gguf(path, fields, {name: tensor for name, tensor in tensors.items() if "token" not in name})
    fails(path, "lacks a matrix token_embd.weight")
    write_gguf(path, fields, tensors | {"blk.0.attn_q.bias": np.zeros(64, "f4")})
    fails(path, "holds blk.0.attn_q.bias, which a LLaMA does not have")
    write_gguf(path, fields, tensors | {"blk.0.attn_q\x1b[2J.weight": np.zeros(64, "f4")})
    fails(path, r"holds blk.0.attn_q\\x1b\[2J.weight")
    write_gguf(path, fields, tensors, architecture="qwen2")
    fails(path, "of the architecture 'qwen2', supported is 'llama'")


def test_every_truncation_is_a_sentence(tmp_path, original):
    write_model(tmp_path / "whole.gguf", original, fields={"tokenizer.ggml.tokens": ["a", "b"]})
    content, path = (tmp_path / "whole.gguf").read_bytes(), tmp_path / "a.gguf"
    start = content.index(b"token_embd.weight")
    for size in (0, 3, 20, *range(24, start + 3000, 97), len(content) - 1):
        path.write_bytes(content[:size])
        fails(path, "truncated|has only")


def header(
    *fields: tuple[str, bytes], tensors: bytes = b"", num_tensors: int = 0, count: int | None = None
) -> bytes:
    content = b"".join(struct.pack("<Q", len(name)) + name.encode() + value for name, value in fields)
    number = len(fields) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, number) + content + tensors


def tensor(name: str, dims: tuple[int, ...], type: int = 0, offset: int = 0) -> bytes:
    start = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dims))
    return start + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", type, offset)


LLAMA = ("general.architecture", struct.pack("<IQ", 8, 5) + b"llama")
HOSTILE = {
    "fields without end": (header(count=1 << 60), "says that it has 1152921504606846976 fields"),
    "tensors without end": (header(num_tensors=1 << 60), "says that it has 1152921504606846976 tensors"),
    "a long name": (header(("a", b""))[:24] + struct.pack("<Q", 1 << 62), "a name in its header has"),
    "a long text": (header(("a", struct.pack("<IQ", 8, 1 << 62))), "its header is not whole"),
    "a long list": (header(("a", struct.pack("<IIQ", 9, 0, 10**12))), "its header is not whole"),
    "a long list of texts": (header(("a", struct.pack("<IIQ", 9, 8, 10**12))), "its header is not whole"),
    "lists in lists": (header(("a", struct.pack("<IIQ", 9, 9, 1) * 1000)), "a list of the type 9"),
    "an unknown value": (header(("a", struct.pack("<I", 99))), "the unknown type 99"),
    "a field twice": (header(("a", b"\7\0\0\0\1"), ("a", b"\7\0\0\0\1")), "says a twice"),
    "an alignment of 0": (
        header(("general.alignment", struct.pack("<II", 4, 0)), LLAMA),
        "general.alignment is 0",
    ),
    "a tensor beyond the end": (
        header(LLAMA, tensors=tensor("token_embd.weight", (1 << 40, 1 << 40)), num_tensors=1),
        "token_embd.weight ends at byte",
    ),
    "an offset beyond the end": (
        header(LLAMA, tensors=tensor("token_embd.weight", (8, 8), offset=1 << 63), num_tensors=1),
        "token_embd.weight ends at byte",
    ),
    "no dimensions": (header(LLAMA, tensors=tensor("x", ()), num_tensors=1), "x has 0 dimensions"),
    "a million dimensions": (
        header(LLAMA, tensors=tensor("x", (1,) * 99), num_tensors=1),
        "x has 99 dimensions",
    ),
    "no numbers": (header(LLAMA, tensors=tensor("x", (8, 0)), num_tensors=1), "has the shape"),
    "an unknown type": (header(LLAMA, tensors=tensor("x", (8, 8), 77), num_tensors=1), "has the type 77"),
    "half a block": (
        header(LLAMA, tensors=tensor("x", (31, 8), 8), num_tensors=1),
        r"Q8_0 has the shape \(8, 31\)",
    ),
    "one tensor under many names": (
        header(LLAMA, tensors=b"".join(tensor(f"x{i}", (8, 8)) for i in range(99)), num_tensors=99)
        + b"\0" * 512,
        "together are larger than the file",
    ),
    "whole numbers": (
        header(LLAMA, tensors=tensor("x", (8, 8), 26), num_tensors=1) + b"\0" * 512,
        "which a LLaMA does not have",
    ),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "of version 1, supported are 2 and 3"),
    "another byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "of version 50331648"),
    "something else": (b"PK\3\4" + b"\0" * 99, "does not begin with GGUF"),
    "no architecture": (header(("a", b"\7\0\0\0\1")), "of the architecture None"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_end_at_once(tmp_path, case):
    content, message = HOSTILE[case]
    (tmp_path / "a.gguf").write_bytes(content)
    fails(tmp_path / "a.gguf", message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "a tokenizer of the kind 'bert'"),
        ({"tokenizer.ggml.model": "llama"}, "must have a score for each"),
        ({"tokenizer.ggml.model": 5}, "must have a str as tokenizer.ggml.model"),
        ({"tokenizer.ggml.pre": "default"}, "splits texts by the rule 'default', supported are gpt-2"),
        ({"tokenizer.ggml.tokens": None}, "has no tokenizer: put the model's tokenizer.json beside it"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "each of its 2 tokens by a text of its own"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "each of its 2 tokens by a text of its own"),
        ({"tokenizer.ggml.token_type": [1]}, "must have a type for each"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "a merge must be two tokens"),
        ({"tokenizer.ggml.merges": ["q zzz"]}, "a merge must be two tokens"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, "one of its 135 tokens as bos_token_id, it has 1000000"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, "must have a bool as tokenizer.ggml.add_bos_token"),
    ],
)
def test_tokenizers_that_are_refused(tmp_path, changes, message):
    word_tokenizer(tmp_path, 160)
    fields = byte_level_fields(tmp_path / "tokenizer.json") | changes
    write_gguf(tmp_path / "a.gguf", fields, {"x": np.zeros(8, "f4")})
    fails(tmp_path / "a.gguf", message, load_tokenizer)


def test_the_file_in_a_folder(tmp_path, original, monkeypatch):
    """One GGUF file counts, beside a projector for images and a configuration too; several are asked about."""
    write_model(tmp_path / "a.gguf", original)
    (tmp_path / "mmproj-a.gguf").write_bytes(b"")
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama"}'
    )  # without weights: left by who converted it
    assert load_base(tmp_path).config.num_layers == 4
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    fails(tmp_path / "a.gguf", "the package gguf is needed, and it is not installed")
    monkeypatch.undo()
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    fails(tmp_path, "holds 2 GGUF files: name one of them, such as .*a.gguf")
    fails(tmp_path, "holds 2 GGUF files", load_tokenizer)
