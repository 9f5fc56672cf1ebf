"""The fine-tuning commands on tiny models: the protocol, the readers, and one sentence for what is wrong."""

import gzip
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_finetuning as tiny
import torch
import transformers
from evaluate_program import run
from PIL import Image
from tiny_transformers import FIVE

from evaluate.finetune import protocol
from evaluate.finetune.base_to_novel import BaseToNovel
from evaluate.finetune.image_sets import Images, read_set
from evaluate.finetune.instruct import Instructions
from evaluate.finetune.squad import Answering
from evaluate.finetune.tagging import Tagging
from evaluate.finetune.token_files import Sentence, read_splits
from evaluate.finetune.vtab import Classification
from evaluate.shared import UserError

ENCODER = "BERT" if FIVE else "Llama"
QUICK = ("--steps", 2, "--batch-size", 4, "--num-layers", 2, "--prompt-length", 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the models and data of every command."""
    folder = tmp_path_factory.mktemp("finetune")
    for name in {ENCODER, "ViT", "CLIP", "Llama"}:
        tiny.write_model(folder / name, name)
    tiny.write_ner(folder / "ner")
    tiny.write_srl(folder / "srl")
    tiny.write_squad(folder / "squad")
    tiny.write_squad(folder / "squad2", unanswerable=True)
    tiny.write_folders(folder / "images" / "folders")
    tiny.write_lists(folder / "images" / "lists")
    tiny.write_idx(folder / "images" / "idx")
    tiny.write_zhou(folder / "zhou")
    tiny.write_records(folder / "records.jsonl")
    return folder


COMMANDS = {  # name -> base, data, further options, columns of the test
    "ner": (ENCODER, "ner", ("--methods", "head,zero-init"), ["test F1"]),
    "srl": (ENCODER, "srl", ("--methods", "head"), ["test-brown F1", "test-wsj F1"]),
    "squad": (ENCODER, "squad", ("--methods", "zero-init", "--max-length", 64, "--stride", 8), ["EM", "F1"]),
    "vtab": ("ViT", "images", ("--methods", "lora-2", "--image-size", 12), ["test accuracy"]),
    "base-to-novel": (
        "CLIP", "images/folders", ("--methods", "frozen,one-softmax", "--image-size", 12),
        ["base", "novel", "harmonic mean"],
    ),
    "zhou": ("CLIP", "zhou", ("--methods", "frozen", "--image-size", 12), ["base", "novel", "harmonic mean"]),
    "instruct": ("Llama", "records.jsonl", ("--methods", "zero-init,lora-2"), ["loss", "perplexity"]),
}  # fmt: skip


def command(place, name, out, *more):
    base, data, options, _ = COMMANDS[name]
    name = "base-to-novel" if name == "zhou" else name
    return [name, "--base", place / base, "--data", place / data, "--out", out, *QUICK, *options, *more]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_chooses_on_validation_and_tests_once_a_seed(name, place, tmp_path, monkeypatch, capsys):
    rates = ("--learning-rates", "zero-init=0.1,0.01", "--seeds", "1,2")
    rates = rates if "zero-init" in str(COMMANDS[name][2]) else rates[2:]
    assert run(*command(place, name, tmp_path / "out", *rates)) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    header, *entries = map(json.loads, (tmp_path / "out" / "ledger.jsonl").read_text().splitlines())
    assert header["run"]["command"] in (name, "base-to-novel") and header == {"run": result["run"]}
    for column in COMMANDS[name][3]:
        assert column in result["tables"][0]["columns"]
    for task in {entry["task"] for entry in entries}:
        for method in {entry["method"] for entry in entries}:
            own = [entry for entry in entries if (entry["task"], entry["method"]) == (task, method)]
            tried = [entry for entry in own if entry["kind"] == "validation"]
            tests = [entry for entry in own if entry["kind"] == "test"]
            assert {entry["seed"] for entry in tried} == {1} and [entry["seed"] for entry in tests] == [1, 2]
            (score,) = tried[0]["figures"]
            best = max(tried, key=lambda entry: entry["figures"][score])
            assert {entry["learning_rate"] for entry in tests} == {best["learning_rate"]}
    # the same command again trains nothing
    monkeypatch.setattr(protocol, "_train", None)
    assert run(*command(place, name, tmp_path / "out", *rates)) == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    # other steps are another run
    assert (
        run(
            *command(place, name, tmp_path / "out", *rates)[:8],
            3,
            *command(place, name, tmp_path, *rates)[9:],
        )
        == 2
    )
    assert "another run: its steps is 2" in capsys.readouterr().err


def test_a_killed_comparison_goes_on_to_the_same_figures(place, tmp_path, monkeypatch):
    words = command(place, "ner", tmp_path / "whole", "--seeds", "0,1")
    assert run(*words) == 0
    lines = (tmp_path / "whole" / "ledger.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ledger.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    trained, train = [], protocol._train
    monkeypatch.setattr(protocol, "_train", lambda *a: trained.append(a[2:]) or train(*a))
    assert run(*command(place, "ner", tmp_path / "out", "--seeds", "0,1")) == 0
    assert len(trained) == len(lines) - 4
    found = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    for entry, line in zip(found[1:], lines[1:], strict=True):
        assert entry | {"seconds": 0} == json.loads(line) | {"seconds": 0}


def test_tags_go_to_first_tokens_and_words_beyond_the_length_are_o(place):
    task = Tagging(place / ENCODER, place / "ner", False, max_length=8)
    ids, _, places = task._encode(Sentence(("ab", "xa", "b", "xx"), ("O", "B-PER", "O", "B-PER")))
    assert places == {
        1: task.tags.index("O"),
        3: task.tags.index("B-PER"),
        5: task.tags.index("O"),
        6: task.tags.index("B-PER"),
    }
    assert len(ids) == 8

    def model(input_ids, **_):  # says B-PER everywhere
        logits = torch.zeros(*input_ids.shape, len(task.tags))
        logits[..., task.tags.index("B-PER")] = 1
        return SimpleNamespace(logits=logits)

    sentences = [Sentence(("abcdefghi", "a"), ("O", "O")), Sentence(("a",), ("O",))]
    assert task.predict(model, sentences) == [["B-PER", "O"], ["B-PER"]]
    roles = Tagging(place / ENCODER, place / "srl", True, max_length=32)
    encoded = roles._tokens(roles.splits.train[0])
    assert [roles.tokenizer.decode([i]) for i in encoded.ids] == [
        "[CLS]",
        "a",
        "b",
        "c",
        "[SEP]",
        "b",
        "[SEP]",
    ]
    assert set(roles._encode(roles.splits.train[0])[2]) == {1, 2, 3}, (
        "the predicate behind the sentence has no tag"
    )


@pytest.mark.parametrize("data", ["squad", "squad2"])
def test_squad_finds_the_answers_that_a_model_points_at(place, data):
    task = Answering(place / ENCODER, place / data, max_length=48, stride=16, longest_answer=30)
    questions = task.splits.test
    assert any(len(task._windows(question)) > 1 for question in questions), (
        "the paragraphs are cut into windows"
    )
    truth = {}
    for question in questions:
        for window in task._windows(question):
            from evaluate.finetune.squad import _place

            truth[tuple(window.ids)] = _place(window, question)

    def model(input_ids, attention_mask, **_):
        starts, ends = torch.full((2, *input_ids.shape), -9.0)
        for row, (ids, length) in enumerate(
            zip(input_ids.tolist(), attention_mask.sum(1).tolist(), strict=True)
        ):
            first, last = truth[tuple(ids[:length])]
            starts[row, first], ends[row, last] = 5.0, 5.0
            starts[row, 0] = ends[row, 0] = max(0.0, float(starts[row, 0]))
        return SimpleNamespace(start_logits=starts, end_logits=ends)

    found = task.predict(model, questions)
    assert found == {q.id: q.answers[0][0] if q.answers else "" for q in questions}
    assert task.test(model) == {"EM": 100, "F1": 100}


def test_four_kinds_of_image_folders(place):
    folders, lists, idx = (read_set(place / "images" / name) for name in ("folders", "lists", "idx"))
    assert folders.classes == ["blue", "green", "red", "white"] and len(folders.train) == 24
    assert folders.train.labels.tolist() == lists.train.labels.tolist()
    assert torch.equal(folders.test.pixels(4, 6), lists.test.pixels(4, 6))
    assert folders.test.pixels(4, 6)[1].min() > 150, "green: channels are red, green, blue"
    assert idx.train.pixels(3, 8).shape == (3, 8, 8) and int(idx.train.pixels(3, 8).min()) == 180
    zhou = read_set(place / "zhou")
    assert zhou.classes == folders.classes and (len(zhou.train), len(zhou.validation), len(zhou.test)) == (
        20,
        4,
        12,
    )
    assert torch.equal(zhou.test.pixels(4, 6), folders.test.pixels(4, 6))
    assert len(idx.test) == 8 and folders.fingerprint() != lists.fingerprint()


@pytest.mark.parametrize("kind", ["transparent", "upright", "grey", "eps"])
def test_images_are_read_by_the_rule_of_images(kind, tmp_path):
    """What is transparent is white, photographs are turned upright, and no format runs programs."""
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    path, expected = tmp_path / "image.png", pixels
    if kind == "transparent":
        image = Image.fromarray(pixels).convert("RGBA")
        image.putalpha(0)
        image.save(path)
        expected = np.full_like(pixels, 255)
    elif kind == "upright":
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        Image.fromarray(pixels).save(path, exif=exif)
        expected = np.rot90(pixels, -1)
    elif kind == "grey":  # 16 bits; Pillow's own conversion makes what is above 255 white
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(path)
        expected = np.repeat(pixels[..., :1], 3, 2)
    else:
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
        with pytest.raises(UserError, match="no image in a known format"):
            Images([path], [0]).pixels(0, 4)
        return
    assert np.array_equal(Images([path], [0]).pixels(0, 4).permute(1, 2, 0), expected)


def test_vtab_trains_again_on_all_images(place):
    task = Classification(place / "ViT", read_set(place / "images" / "folders"), 12, None)
    assert (task.count(False), task.count(True), len(task.validation)) == (19, 24, 5)
    model = task.make(0)
    rows = torch.arange(24)
    whole = task.loss(model, rows, True)
    parts = torch.stack([task.loss(model, rows[row : row + 1], True) for row in range(24)])
    torch.testing.assert_close(whole, parts.mean())
    few = Classification(place / "ViT", read_set(place / "images" / "folders"), 12, 7)
    assert len(few.test_data) == 7


class Elsewhere:
    """A model on the meta device, whose tensors have no values but refuse those of another device."""

    device = torch.device("meta")
    config = SimpleNamespace(image_size=12)

    def forward(self, **inputs):
        assert {x.device.type for x in inputs.values() if isinstance(x, torch.Tensor)} == {"meta"}
        rows = inputs["pixel_values" if "pixel_values" in inputs else "input_ids"].shape[0]
        tokens = inputs["input_ids"].shape[1] if "input_ids" in inputs else 1
        classes = torch.zeros(rows, tokens, 96, device="meta")
        spans = torch.zeros(rows, tokens, device="meta")
        logits = classes[:, 0] if "pixel_values" in inputs else classes
        return SimpleNamespace(logits=logits, logits_per_image=logits, start_logits=spans, end_logits=spans)

    __call__ = forward


@pytest.mark.parametrize("name", ["ner", "squad", "vtab", "base-to-novel", "instruct"])
def test_inputs_and_targets_follow_the_model_to_its_device(name, place):
    base, data = place / COMMANDS[name][0], place / COMMANDS[name][1]
    task = {
        "ner": lambda: Tagging(base, data, False, 32), "squad": lambda: Answering(base, data, 64, 8, 30),
        "vtab": lambda: Classification(base, read_set(place / "images" / "idx"), 12, None),
        "base-to-novel": lambda: BaseToNovel(base, read_set(data), "a {}", 2, 12),
        "instruct": lambda: Instructions(base, data, 200),
    }[name]()  # fmt: skip
    assert task.loss(Elsewhere(), torch.tensor([0, 1, 2]), False).device.type == "meta"


def test_the_loss_of_instructions_is_that_of_transformers(place):
    task = Instructions(place / "Llama", place / "records.jsonl", 200)
    model = task.make(0)
    rows = torch.tensor([0, 3])
    losses = []
    for ids, begin in (task.parts["train"][row] for row in rows):
        labels = torch.tensor([[-100] * begin + ids[begin:]])
        losses.append((model(input_ids=torch.tensor([ids]), labels=labels).loss, len(ids) - begin))
    expected = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    torch.testing.assert_close(task.loss(model, rows, False), expected, rtol=1e-5, atol=1e-6)
    assert {name: len(part) for name, part in task.parts.items()} == {"train": 16, "valid": 2, "test": 2}


def rewritten(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def split(folder):
    return folder / "split_zhou_Colours.json"


DAMAGE = {
    "ner: no dev": ("ner", lambda d: (d / "toy_dev.conll").unlink(), "holds 0 files dev"),
    "ner: a word alone": ("ner", lambda d: rewritten(d / "toy_dev.conll", "\tO", ""), "expected a word and a tag"),
    "ner: a tag": ("ner", lambda d: rewritten(d / "toy_test.conll", "\tO", "\tPER"), "got 'PER'"),
    "ner: empty": ("ner", lambda d: (d / "toy_train.conll").write_text("\n\n"), "holds no sentences"),
    "srl: one tag less": ("srl", lambda d: rewritten(d / "dev.txt", " B-A1", ""), "got 3 words and 2 tags"),
    "srl: index": ("srl", lambda d: rewritten(d / "dev.txt", "1 a", "3 a"), "must be 0 to 2, got '3'"),
    "squad: no test": ("squad", lambda d: (d / "dev-v1.1.json").unlink(), "holds 0 files for test"),
    "squad: duplicate": ("squad", lambda d: rewritten(d / "dev-v1.1.json", '"70/1"', '"70/0"'), "there twice"),
    "squad: place": (
        "squad", lambda d: rewritten(d / "train-v1.1.json", 'answer_start": 5', 'answer_start": 6'), "not at character",
    ),
    "squad: an empty answer": (
        "squad", lambda d: rewritten(d / "train-v1.1.json", '"text": "', '"text": "", "x": "'), "'' is not at",
    ),
    "squad: a place before the text": (
        "squad", lambda d: rewritten(d / "train-v1.1.json", 'answer_start": 5', 'answer_start": -5'), "at character -5",
    ),
    "squad: a word for false": (
        "squad", lambda d: rewritten(d / "train-v1.1.json", '"question"', '"is_impossible": "false", "question"'),
        "is_impossible must be true or false, got 'false'",
    ),
    "vtab: a long label": ("vtab", lambda d: rewritten(d / "lists/test.txt", " 3", " " + "3" * 5000), "a label up to"),
    "vtab: a large label": ("vtab", lambda d: rewritten(d / "lists/test.txt", " 3", " 300000000"), "a label up to"),
    "vtab: no images": (
        "vtab", lambda d: (d / "idx/t10k-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(bytes([0, 0, 8, 3]) + bytes(12))
        ), "holds no numbers: its shape is 0 x 0 x 0",
    ),
    "zhou: a large label": ("zhou", lambda d: rewritten(split(d), '0, "blue"', "1" + "0" * 20 + ', "blue"'), "one"),
    "squad: field": ("squad", lambda d: rewritten(d / "train-v1.1.json", '"context"', '"t"'), "'context' is missing"),
    "vtab: an empty class": ("vtab", lambda d: [p.unlink() for p in (d / "folders/train/red").iterdir()], "no images"),
    "vtab: a class of the test": ("vtab", lambda d: (d / "folders/train/red").rename(d / "red"), "'red'"),
    "vtab: no test": ("vtab", lambda d: shutil.rmtree(d / "folders/test"), "there is no"),
    "vtab: no image": ("vtab", lambda d: (d / "folders/train/red/0.png").write_bytes(b"x"), "no image in a known"),
    "vtab: a list": ("vtab", lambda d: rewritten(d / "lists/test.txt", " 0", ""), "expected `PATH LABEL`"),
    "vtab: a listed file": ("vtab", lambda d: rewritten(d / "lists/test.txt", "blue/0", "blue/9"), "there is no"),
    "vtab: a label": ("vtab", lambda d: rewritten(d / "lists/test.txt", " 3", " 7"), "the label 7"),
    "vtab: cut": (
        "vtab", lambda d: (d / "idx/t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0" * 20)), "no idx file",
    ),
    "vtab: no gzip": ("vtab", lambda d: (d / "idx/t10k-images-idx3-ubyte.gz").write_bytes(b"x"), "cannot be unpacked"),
    "zhou: a row": ("zhou", lambda d: rewritten(split(d), ', 0, "blue"', ', "0", "blue"'), "one name a"),
    "zhou: names": ("zhou", lambda d: rewritten(split(d), '0, "blue"', '1, "blue"'), "one name a label"),
    "zhou: a file": ("zhou", lambda d: (d / "jpg/train/red/0.png").unlink(), "there is no train/red/0.png"),
    "zhou: a part": ("zhou", lambda d: rewritten(split(d), '"test"', '"probe"'), "'test' is missing"),
    "vtab: two names": (
        "vtab", lambda d: [(d / "folders").rename(d / "cifar"), (d / "lists").rename(d / "cifar100")], "two names",
    ),
    "instruct: few": ("instruct", lambda d: d.write_text(d.read_text().split("\n")[0]), "at least 10"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_data_are_one_sentence(case, place, tmp_path, capsys):
    name, damage, said = DAMAGE[case]
    base, data, options, _ = COMMANDS[name]
    name = "base-to-novel" if name == "zhou" else name
    copy = shutil.copytree if (place / data).is_dir() else shutil.copy
    copy(place / data, tmp_path / "data")
    damage(tmp_path / "data")
    words = [
        name,
        "--base",
        place / base,
        "--data",
        tmp_path / "data",
        "--out",
        tmp_path / "out",
        *QUICK,
        *options,
    ]
    assert run(*words) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("models ")]
    assert len(error) == 1 and error[0].startswith("error: ") and said in error[0], error


@pytest.mark.parametrize(
    "name, more, said",
    [
        ("ner", ("--seeds", "1,1"), "--seeds names one of 1, 1 twice"),
        ("ner", ("--seeds", "a"), "--seeds takes numbers"),
        ("ner", ("--learning-rates", "zero-init"), "must be METHOD=RATE"),
        ("ner", ("--learning-rates", "vpt=1"), "names 'vpt'"),
        ("ner", ("--learning-rates", "head=-1"), "must be above 0"),
        ("ner", ("--max-length", "2"), "--max-length must be at least 8"),
        ("ner", ("--head-learning-rate", "nan"), "--head-learning-rate must be above 0"),
        ("base-to-novel", ("--template", "a photo"), "--template must hold {} once"),
        ("base-to-novel", ("--shots", "0"), "--shots and --image-size"),
        ("vtab", ("--test-images", "0"), "--test-images must be at least 1"),
        ("ner", ("--device", "tpu9"), "--device tpu9: "),
        ("ner", ("--device", "meta"), "--device meta: "),
    ],
)
def test_options_that_cannot_be_are_one_sentence(name, more, said, place, tmp_path, capsys):
    assert run(*command(place, name, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert not (tmp_path / "out").exists()


def test_a_base_that_cannot_be_loaded_is_one_sentence(place, tmp_path, capsys):
    shutil.copytree(place / ENCODER, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    (tmp_path / "bare" / "tokenizer_config.json").unlink()
    for base, said in (
        (place, "there is no config.json"),
        (tmp_path / "bare", "has no tokenizer"),
    ):
        words = ["ner", "--base", base, "--data", place / "ner", "--out", tmp_path / "out", *QUICK]
        assert run(*words) == 2
        assert said in capsys.readouterr().err
    words = command(place, "ner", tmp_path / "out")
    assert run(*[place / "ViT" if word == place / ENCODER else word for word in words]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    words = command(place, "vtab", tmp_path / "out")
    assert run(*[place / "Llama" if word == place / "ViT" else word for word in words]) == 2
    assert "cannot be loaded as AutoModelForImageClassification" in capsys.readouterr().err


def test_columns_of_conll_files(tmp_path):
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.txt").write_text(
            "-DOCSTART- -X- O O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n\n\n. . O O"
        )
    found = read_splits(tmp_path)
    assert found.train == [Sentence(("EU", "rejects"), ("B-ORG", "O")), Sentence((".",), ("O",))]
    assert list(found.tests) == ["test"] and transformers.__version__ and np.__version__
