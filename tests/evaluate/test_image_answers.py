"""Image benchmarks with a multi-modal adapter: each image is encoded once, and its questions see it."""

import base64
import json

import pytest
import torch
from benchmark_folders import FOLDERS, PIXEL
from evaluate_program import run
from tiny_runs import make_base, make_folder

pytest.importorskip("transformers")
from tiny_vision import encoder_folder, picture  # noqa: E402

from evaluate import models  # noqa: E402
from model.config import AdapterConfig  # noqa: E402
from model.vision.adapter import VisualAdapter  # noqa: E402
from model.vision.config import FeatureConfig, VisualConfig  # noqa: E402
from model.vision.encoders import load_encoder  # noqa: E402
from model.vision.files import save_adapter  # noqa: E402


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base/, encoder/, an adapter with a visual part, and the data of mme and mmbench with real pictures."""
    folder = make_folder(tmp_path_factory.mktemp("images"))
    encoder_folder(folder / "encoder", "vit")
    encoder_folder(folder / "other", "vit", seed=1)
    base, features = make_base(), FeatureConfig(layers=(3,), tokens="class")
    visual = VisualConfig("bottleneck", 24, 8, blocks=0, heads=1)
    adapter = VisualAdapter(
        base.config,
        AdapterConfig(prompt_length=3, num_layers=3),
        visual,
        features,
        torch.Generator().manual_seed(0),
    )
    adapter.gates.data.fill_(2.0)
    for parameter in adapter.projection.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    adapter.encoder_fingerprint = load_encoder(folder / "encoder").fingerprint
    save_adapter(folder / "adapter.safetensors", adapter, base.config)
    FOLDERS["mme"](folder / "mme")
    for seed, path in enumerate(sorted((folder / "mme").rglob("*.[jp][pn]g"))):
        picture(path, seed)
    FOLDERS["mmbench"](folder / "mmbench")
    path = folder / "mmbench" / "mmbench_dev.tsv"
    for seed in range(2):
        picture(folder / "a.png", seed)
        real = base64.b64encode((folder / "a.png").read_bytes()).decode()
        path.write_text(path.read_text().replace(PIXEL, real, 1))
    return folder


def command(place, name, out, *more):
    return [
        name, "--base", place / "base", "--adapter", place / "adapter.safetensors", "--encoder", place / "encoder",
        "--data", place / name, "--out", out, "--max-new-tokens", 5, "--batch-size", 3, "--device", "cpu", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("name, images", [("mme", 14), ("mmbench", 2)])
def test_an_image_is_encoded_once(name, images, place, tmp_path, monkeypatch):
    found, load = [], models.load
    monkeypatch.setattr(models, "load", lambda *words: found.append(load(*words)) or found[-1])
    assert run(*command(place, name, tmp_path / "out")) == 0
    assert found[0].adapter.source.counted == images
    assert json.loads((tmp_path / "out" / "result.json").read_text())["tables"]


def test_answers_depend_on_the_image_and_not_on_the_batch(place, tmp_path):
    for size, out in ((1, "one"), (8, "eight")):
        assert run(*command(place, "mme", tmp_path / out)[:-4], "--batch-size", size, "--device", "cpu") == 0
    one, eight = (
        dict(
            (entry["id"], entry["answer"])
            for entry in map(json.loads, (tmp_path / out / "answers.jsonl").open())
            if "id" in entry
        )
        for out in ("one", "eight")
    )
    assert one == eight
    assert len({answer for key, answer in one.items() if key.endswith("/no")}) > 1, (
        "the same question, other images"
    )


def test_what_cannot_be_seen_is_said(place, tmp_path, capsys):
    words = command(place, "mme", tmp_path / "out")

    def with_(option, value):
        at = words.index(option)
        return [*words[: at + 1], value, *words[at + 2 :]]

    without = [word for word in words if word not in ("--encoder", place / "encoder")]
    blind = [word for word in without if word not in ("--adapter", place / "adapter.safetensors")]
    for given, said in (
        (with_("--encoder", place / "other"), "is another encoder"),
        (without, "there is no encoder for them"),
        ([*without, "--feature-cache", tmp_path], "--feature-cache belongs to --encoder"),
        ([*blind, "--encoder", place / "encoder"], "--encoder belongs to --adapter"),
        (blind, "has no visual part"),
    ):
        assert run(*given) == 2, given
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert (
        not (tmp_path / "out" / "answers.jsonl").exists()
        or not (tmp_path / "out" / "answers.jsonl").read_bytes()
    )


def test_two_models_of_one_shape_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_WHOLE", 1000)
    monkeypatch.setattr(models, "_PART", 16)
    for name, size in (("small", 900), ("large", 64_000)):
        seen = set()
        for seed in range(3):
            folder = tmp_path / f"{name}-{seed}"
            folder.mkdir()
            content = torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed))
            (folder / "model.safetensors").write_bytes(bytes(content.tolist()))
            seen.add(models.identity(folder, None)["base"])
            assert models.identity(folder, folder) == models.identity(folder, folder)
        assert len(seen) == 3, "the names and sizes are the same"


def test_weights_in_a_subfolder_tell_models_apart(tmp_path):
    """An index may name shards there. What a download hides beside them says nothing about the model."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "weights").mkdir()
    seen = set()
    for content in (b"1", b"2"):
        (tmp_path / "weights" / "shard.safetensors").write_bytes(content)
        seen.add(models.identity(tmp_path, None)["base"])
    assert len(seen) == 2
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "config.json.metadata").write_text("a time")
    assert models.identity(tmp_path, None)["base"] in seen
