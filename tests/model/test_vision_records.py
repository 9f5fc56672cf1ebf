"""Records about images: the shapes that data sets have, and what is refused in them."""

import json

import pytest

from model.errors import UserError
from model.records import Record, read_records
from model.vision.records import CAPTION, read_image_prompts, read_image_records


def turns(*texts):
    return [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(texts)]


@pytest.fixture
def file(tmp_path):
    def write(*values, name="data.json"):
        path = tmp_path / name
        path.write_text(json.dumps(list(values), indent=1))
        return path

    return write


def records(path, **options):
    return [record for record, _ in read_image_records(path, **options)]


def test_every_shape(file, tmp_path):
    path = file(
        {"id": "1", "image": "a.jpg", "conversations": turns("<image>\nWhat is it?", "A cat.", "Colour?", "Grey.")},
        {"image": "sub/b.jpg", "question": "How many?", "answer": "2"},
        {"image": "b.jpg", "question": "Which?", "answers": [{"answer": "a"}, {"answer": "b"}, {"answer": "b"}]},
        {"image": "c.jpg", "caption": "A dog."},
        {"image": ["a.jpg", "b.jpg"], "instruction": "Compare <image> and <image>.", "output": "Both."},
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {"conversations": turns("Hello", "Hi.")},
        {"image": "", "question": "Why?", "answer": "So."},
    )  # fmt: skip
    a, b, c = (str(tmp_path / f"{name}.jpg") for name in "abc")
    assert records(path) == [
        Record("What is it?", "A cat.", "", (a,)),
        Record("Colour?", "Grey.", "", (a,)),
        Record("How many?", "2", "", (str(tmp_path / "sub/b.jpg"),)),
        Record("Which?", "b", "", (b,)),
        Record(CAPTION, "A dog.", "", (c,)),
        Record("Compare  and .", "Both.", "", (a, b)),
        Record("Add.", "2", "1 1"),
        Record("Hello", "Hi."),
        Record("Why?", "So."),
    ]
    assert records(path, folder="else")[3].images == ("else/b.jpg",)


def test_the_line_is_that_of_the_record(file):
    path = file({"instruction": "a", "output": "b"}, {"image": "a.jpg", "caption": "c"})
    assert read_image_records(path)[1].where == f"{path}, line 6"


def test_one_conversation_a_line(tmp_path):
    """A single line is an object with a list in it, and still a record."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"image": "a.jpg", "conversations": turns("Q", "A")}))
    assert records(path) == [Record("Q", "A", "", (str(tmp_path / "a.jpg"),))]
    path.write_text(json.dumps({"data": [{"image": "a.jpg", "conversations": turns("Q", "A")}]}))
    assert len(records(path)) == 1


def test_empty_texts_are_left_out_and_counted(file, capsys):
    path = file(
        {"image": "a.jpg", "question": "Q", "answer": ""},
        {"image": "a.jpg", "conversations": turns("<image>", "A", "B", "C")},
    )
    assert [record.output for record in records(path)] == ["C"]
    assert "1 record has an empty output" in (said := capsys.readouterr().err) and "empty instruction" in said
    with pytest.raises(UserError, match="empty"):
        read_image_records(path, strict=True)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"instruction": "What is <image>?", "output": "x"}, "names no image"),
        ({"conversations": turns("<image>\nWhat?", "x")}, "names no image"),
        ({"image": "a", "conversations": turns("<image><image>", "x")}, "2 <image> tags and names 1 image"),
        ({"image": ["a", "b"], "question": "<image> Q", "answer": "x"}, "1 <image> tag and names 2 images"),
        ({"caption": "x"}, "names no image"),
        ({"image": "a", "question": "Q"}, "neither an answer"),
        ({"image": "a", "question": "Q", "answers": []}, "neither an answer"),
        ({"image": "a", "question": "Q", "answer": 3}, "must be a string, got a int"),
        ({"image": 3, "caption": "x"}, "'image' must be a string"),
        ({"image": ["a", 3], "caption": "x"}, "'image' must be a string"),
        ({"image": "a\0", "caption": "x"}, "names no file"),
        ({"image": "a", "images": ["b"], "caption": "x"}, "both an image and images"),
        ({"image": "a", "conversations": turns("Q")}, "turns"),
        ({"image": "a", "conversations": turns("Q", "A")[::-1]}, "turns"),
        ({"image": "a", "conversations": "Q"}, "list of objects"),
        ({"image": "a", "conversations": [{"from": "system", "value": "S"}, *turns("Q", "A")]}, "turns"),
        ({"image": "a", "system": "S", "question": "Q", "answer": "x"}, "'system' changes"),
        ({"image": "a"}, "conversations, a question, a caption or an instruction"),
        ([1], "must be an object"),
    ],
)
def test_refused(file, value, said):
    path = file(value)
    with pytest.raises(UserError, match=said) as error:
        read_image_records(path)
    assert f"{path}, line 2" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["image", "conversations"])
def test_text_training_says_what_images_need(file, field):
    value = {"image": "a.jpg", "instruction": "Q", "output": "A"}
    if field == "conversations":
        value = {"image": "a.jpg", "conversations": turns("Q", "A")}
    with pytest.raises(UserError, match="need --encoder"):
        read_records(file(value))


def test_prompts(file, tmp_path):
    path = file(
        "Hello",
        {"image": "a.jpg", "question": "<image>\nWhat?", "answer": "x"},
        {"image": "a.jpg", "instruction": "Q", "input": "I"},
        {"prompt": "P", "images": ["a.jpg", "b.jpg"]},
    )
    texts, images = read_image_prompts(path)
    a, b = (str(tmp_path / name) for name in ("a.jpg", "b.jpg"))
    assert images == [(), (a,), (a,), (a, b)]
    assert texts[0] == "Hello" and "### Instruction:\nWhat?\n" in texts[1] and "### Input:\nI\n" in texts[2]
    assert texts[3] == "P"
    plain = tmp_path / "a.txt"
    plain.write_text("one\ntwo\n")
    assert read_image_prompts(plain) == (["one", "two"], [(), ()])
    for value, said in (
        ({"image": "a"}, "expected an object"),
        (3, "string or an object"),
        ({"prompt": "<image>"}, "names no"),
    ):
        with pytest.raises(UserError, match=said):
            read_image_prompts(file(value, name="bad.json"))
