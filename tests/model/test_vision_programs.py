"""Training and generation about images: mixtures, stages, exact resume, one image's many questions, bad input."""

import json
import os
import signal

import pytest
import torch
from tiny_runs import RECORDS, contents, losses_of, make_folder, run
from tiny_vision import encoder_folder, picture

from model import generate, train_loop
from model.loading import load_base
from model.vision.adapter import VisualAdapter
from model.vision.files import load_adapter

IMAGES = ("red.png", "blue.png", "green.png")


def conversation(image, *texts):
    spoken = [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(texts)]
    return {"image": image, "conversations": spoken}


RECORDS_ABOUT_IMAGES = [
    conversation("red.png", "<image>\nWhich?", "red", "Again?", "red"),
    conversation("blue.png", "Which?\n<image>", "blue"),
    {"image": "green.png", "question": "Which?", "answers": [{"answer": "green"}]},
    {"images": ["red.png", "blue.png"], "instruction": "Both?", "output": "red blue"},
    {"image": "green.png", "caption": "green"},
    {"instruction": "Say nothing.", "output": "no"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/, text.jsonl, an encoder and images.json; read by every test and written by none."""
    root = make_folder(tmp_path_factory.mktemp("vision"))
    encoder_folder(root / "encoder", "vit")
    encoder_folder(root / "other", "vit", seed=1)
    encoder_folder(root / "wide", "vit", hidden_size=32)
    (root / "pictures").mkdir()
    for seed, name in enumerate(IMAGES):
        picture(root / "pictures" / name, seed)
    (root / "images.json").write_text(json.dumps(RECORDS_ABOUT_IMAGES))
    return root


def options(folder, output, *more, data=("images.json", "data.jsonl:0.5"), encoder="encoder"):
    told = {
        "--base": folder / "base", "--out": output, "--device": "cpu", "--epochs": 3, "--batch-size": 4,
        "--prompt-length": 3, "--base-lr": 0.5, "--validation": 0.2, "--warmup-epochs": 1,
        "--encoder": folder / encoder, "--images": folder / "pictures", "--visual": "queries",
        "--visual-width": 8, "--visual-blocks": 1, "--visual-heads": 2,
    }  # fmt: skip
    more = [str(word) for word in more]
    replaced = {name for name in more if name.startswith("--")}
    words = [str(word) for name, value in told.items() if name not in replaced for word in (name, value)]
    while "none" in more:  # --option none: without it
        place = more.index("none")
        del more[place - 1 : place + 1]
    return [*words, "--data", *(str(folder / name) for name in data), *more]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "out"
    assert run(*options(folder, output)) == 0
    return output


def test_a_run_on_images_and_text(folder, trained):
    assert set(contents(trained)) == {
        "adapter.safetensors",
        "checkpoint.pt",
        "metrics.jsonl",
        "loss.png",
        "layers.png",
        "config.yaml",
    }
    # of 17 samples 3 are validated, and a half of the text counts in each of the 3 epochs
    assert 6 <= sum(entry[1] is not None for entry in losses_of(trained)) <= 12
    adapter = load_adapter(trained, load_base(folder / "base"))
    assert isinstance(adapter, VisualAdapter) and adapter.gates.abs().min() > 0
    assert adapter.feature_config.layers == (1, 2, 3) and adapter.feature_config.tokens == "all"
    assert adapter.standardise.mean.any() and adapter.encoder_fingerprint


def test_a_resumed_run_is_the_same_run(folder, trained, tmp_path, monkeypatch):
    real, calls = train_loop.batch_loss, []

    def pressing(*args):
        calls.append(None)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(train_loop, "batch_loss", pressing)
        assert run(*options(folder, tmp_path / "out")) == 130
    stopped = losses_of(tmp_path / "out")
    assert 0 < len(stopped) < len(losses_of(trained))
    for change, said in (
        (options(folder, tmp_path / "out", "--resume", data=("images.json", "data.jsonl:n=3")), "mixture"),
        (options(folder, tmp_path / "out", "--resume", "--visual-width", 4), "visual"),
        (options(folder, tmp_path / "out", "--resume", encoder="other"), "visual"),
    ):
        assert run(*change) == 2, said
    assert run(*options(folder, tmp_path / "out", "--resume")) == 0
    assert losses_of(tmp_path / "out") == losses_of(trained)
    ours, whole = ((path / "adapter.safetensors").read_bytes() for path in (tmp_path / "out", trained))
    assert ours == whole


def test_a_changed_picture_is_other_data(folder, tmp_path, capsys):
    for name in IMAGES:
        (tmp_path / name).write_bytes((folder / "pictures" / name).read_bytes())
    told = ("--images", tmp_path, "--epochs", 1)
    assert run(*options(folder, tmp_path / "out", *told)) == 0
    picture(tmp_path / "red.png", 9)
    assert run(*options(folder, tmp_path / "out", *told, "--resume")) == 2
    assert "data = " in capsys.readouterr().err


def test_the_stages(folder, trained, tmp_path, capsys):
    """Stage 2 goes on from stage 1 and leaves the projection as it is."""
    one, two = tmp_path / "one", tmp_path / "two"
    kind = ("--visual", "bottleneck", "--visual-blocks", "none", "--visual-heads", "none")
    assert run(*options(folder, one, *kind, "--stage", 1, "--epochs", 2, data=["images.json"])) == 0
    new = ("--visual", "none", "--visual-width", "none", "--visual-blocks", "none", "--visual-heads", "none")
    assert run(*options(folder, two, *new, "--stage", 2, "--init", one)) == 0
    base = load_base(folder / "base")
    first, second = (load_adapter(path, base).state_dict() for path in (one, two))
    assert all(torch.equal(first[name], second[name]) for name in first if "." in name)
    assert not torch.equal(first["prompts"], second["prompts"])
    capsys.readouterr()
    assert run(*options(folder, tmp_path / "no", *new, "--stage", 2)) == 2
    assert "pass the adapter of stage 1" in capsys.readouterr().err
    text = options(folder, tmp_path / "text", "--epochs", 1, data=["data.jsonl"])
    assert run(*text[: text.index("--encoder")], *text[text.index("--data") :]) == 0
    capsys.readouterr()
    assert run(*options(folder, tmp_path / "no", *new, "--stage", 2, "--init", tmp_path / "text")) == 2
    assert (
        "has none: pass the adapter of stage 1" in capsys.readouterr().err and not (tmp_path / "no").exists()
    )


def test_the_second_run_encodes_nothing(folder, tmp_path, monkeypatch):
    cache = ("--feature-cache", tmp_path / "cache", "--epochs", 1)
    assert run(*options(folder, tmp_path / "one", *cache)) == 0
    monkeypatch.setattr("model.vision.encoders.Encoder.encode", lambda *_: pytest.fail("encoded"))
    assert run(*options(folder, tmp_path / "two", *cache)) == 0
    assert losses_of(tmp_path / "one") == losses_of(tmp_path / "two")


def test_records_with_bad_images(folder, tmp_path, capsys):
    data = [
        *RECORDS_ABOUT_IMAGES,
        {"image": "missing.png", "caption": "x"},
        {"image": "bad.jpg", "caption": "x"},
    ]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, data)))
    for name in IMAGES:
        (tmp_path / name).write_bytes((folder / "pictures" / name).read_bytes())
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    out = tmp_path / "out"
    told = ("--images", tmp_path, "--epochs", 1)
    assert (
        run(
            *options(
                tmp_path,
                out,
                *told,
                "--base",
                folder / "base",
                "--encoder",
                folder / "encoder",
                data=["data.json"],
            )
        )
        == 2
    )
    said = capsys.readouterr().err
    assert "data.json, line 7" in said and "missing.png is missing" in said and not out.exists()
    skip = (*told, "--base", folder / "base", "--encoder", folder / "encoder", "--skip-bad-images")
    assert run(*options(tmp_path, out, *skip, data=["data.json"])) == 0
    assert "2 of 9 records are left out" in capsys.readouterr().err.replace("\n", " ")


def test_a_cache_that_cannot_be_written_is_no_bad_image(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    told = ("--feature-cache", tmp_path / "file", "--skip-bad-images")
    assert run(*options(folder, tmp_path / "out", *told)) == 2
    assert "left out" not in (said := capsys.readouterr().err) and str(tmp_path / "file") in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--encoder", "none"), "--visual belongs to --encoder"),
        (("--format", "official-v1"), "no room for a visual part"),
        (("--image-layers", "1,9"), "hidden states 0 to 3, and layer 9"),
        (("--image-layers", "a"), "whole numbers"),
        (("--visual", "bottleneck"), "--visual-blocks is of --visual queries"),
        (("--visual-heads", "3"), "multiple of the 3 heads"),
        (("--projection-lr", "0"), "projection_lr must be above 0"),
        (("--data", "nowhere.json:0"), "weight above 0"),
    ],
)
def test_options_that_do_not_fit(folder, tmp_path, capsys, more, said):
    assert run(*options(folder, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def ask(capsys, folder, adapter, *more):
    words = [
        "--base",
        folder / "base",
        "--adapter",
        adapter,
        "--temperature",
        0,
        "--max-new-tokens",
        8,
        *more,
    ]
    code = run(*map(str, words), main=generate.main)
    return code, *capsys.readouterr()


def test_eight_questions_on_two_images(folder, trained, tmp_path, capsys):
    questions = [f"{word}?" for word in ("a", "bb", "c", "dd", "e", "ff", "g", "h")]
    images = [IMAGES[i % 2] for i in range(8)]
    asked = [{"image": i, "question": q} for q, i in zip(questions, images, strict=True)]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    told = ("--encoder", folder / "encoder", "--images", folder / "pictures")
    code, together, _ = ask(capsys, folder, trained, *told, "--prompts-file", tmp_path / "asked.json")
    answers = [json.loads(line)["output"] for line in together.splitlines()]
    assert code == 0 and len(answers) == 8
    for question, image, answer in list(zip(questions, images, answers, strict=True))[:3]:
        one = (
            "--encoder",
            folder / "encoder",
            "--image",
            folder / "pictures" / image,
            "--instruction",
            question,
        )
        assert ask(capsys, folder, trained, *one)[:2] == (0, answer + "\n")
    several = [word for name in IMAGES for word in ("--image", folder / "pictures" / name)]
    assert (
        ask(capsys, folder, trained, "--encoder", folder / "encoder", *several, "--instruction", "a?")[0] == 0
    )
    assert ask(capsys, folder, trained, "--instruction", "a?")[0] == 0  # text alone


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--encoder", "other", "--image", "pictures/red.png"), "another encoder"),
        (("--encoder", "wide", "--image", "pictures/red.png"), "width 96"),
        (("--encoder", "pictures", "--image", "pictures/red.png"), "no config.json"),
        (("--encoder", "encoder", "--image", "pictures/none.png"), "is missing"),
        (("--encoder", "encoder", "--image", "images.json"), "no image in a known format"),
        (("--image", "pictures/red.png"), "--image needs --encoder"),
        (("--convert-images",), "--convert-images belongs to --encoder"),
    ],
)
def test_images_that_do_not_fit(folder, trained, capsys, more, said):
    more = [folder / word if (folder / word).exists() or "/" in word else word for word in more]
    code, answered, told = ask(capsys, folder, trained, *more, "--instruction", "a?")
    assert (code, answered) == (2, "") and said in told and told.count("\n") == 1


def test_an_adapter_without_eyes(folder, tmp_path, capsys):
    words = options(folder, tmp_path / "text", "--epochs", 1, data=["data.jsonl"])
    text = [*words[: words.index("--encoder")], *words[words.index("--data") :]]
    assert run(*text) == 0 and len(RECORDS) == 10
    code, _, told = ask(
        capsys, folder, tmp_path / "text", "--encoder", folder / "encoder", "--image", folder / "pictures/red.png",
        "--instruction", "a?",
    )  # fmt: skip
    assert code == 2 and "has no visual part" in told
