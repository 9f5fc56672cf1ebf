"""The benchmark commands: ask, resume, score, and one sentence for what is wrong."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
from benchmark_folders import FOLDERS, PIXEL, right_answer, scienceqa, vicuna
from evaluate_program import run
from full_disk import files_of_at_most
from tiny_runs import make_base, make_folder

from evaluate import benchmark_command, models
from evaluate.asking import batches
from evaluate.benchmarks import all_benchmarks
from evaluate.lines import LineFile
from evaluate.question import Item, Picture
from model.adapter import LlamaAdapter
from model.adapter_files import save_adapter
from model.config import AdapterConfig
from model.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny base with an adapter, and ScienceQA's questions without an image."""
    folder = make_folder(tmp_path_factory.mktemp("evaluate"))
    base = make_base()
    adapter = LlamaAdapter(base.config, AdapterConfig(prompt_length=3, num_layers=2))
    adapter.gates.data.fill_(0.5)
    save_adapter(folder / "adapter.safetensors", adapter, base.config)
    scienceqa(folder / "scienceqa", images=False)
    return folder


def command(place, out, *more):
    return [
        "scienceqa", "--base", place / "base", "--adapter", place / "adapter.safetensors", "--data",
        place / "scienceqa", "--out", out, "--max-new-tokens", 6, "--batch-size", 2, "--device", "cpu", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(*command(place, out)) == 0
    return out


class Knowing:
    """Answers everything right, and remembers what it was asked."""

    identity: dict = {}

    def __init__(self, name):
        self.name, self.asked = name, []

    def check(self, items):
        assert not self.asked, "before the first question"

    def answer(self, items):
        self.asked.append([item.id for item in items])
        return [right_answer(self.name, item) for item in items]


def with_model(monkeypatch, model):
    monkeypatch.setattr(models, "load", lambda *_: model)
    monkeypatch.setattr(models, "identity", lambda *_: {"name": "stub"})


def test_a_model_answers_and_its_row_stands_beside_the_quoted_ones(whole, place, capsys):
    answers = [json.loads(line) for line in (whole / "answers.jsonl").read_text().splitlines()]
    assert answers[0]["run"]["benchmark"] == "scienceqa" and [a["id"] for a in answers[1:]] == list("01234")
    result = json.loads((whole / "result.json").read_text())
    rows = result["tables"][0]["rows"]
    assert rows[0][0] == "measured" and rows[2][:2] == ["LLaMA-Adapter (quoted)", 84.37]
    assert run(*command(place, whole)) == 0  # everything is answered
    shown = capsys.readouterr().out
    assert "LLaMA-Adapter (quoted)" in shown and "85.19" in shown and "not measured here" in shown


def test_the_wording_of_question_and_answer(place, whole, tmp_path, monkeypatch, capsys):
    """A model that was trained with another prompt, and says something before its answer."""
    prompts = []
    monkeypatch.setattr(
        models,
        "generate",
        lambda model, asked, *_, **__: prompts.extend(asked) or [said] * len(asked),
    )
    tokenizer = models.load_tokenizer(place / "base")
    said = tokenizer.encode("a b, not c, b", bos=False, eos=False)
    expected = tokenizer.decode(said).rpartition(",")[2].strip()
    assert expected and "," in tokenizer.decode(said)
    out = tmp_path / "out"
    wording = ("--template", "Question: {question} {x} Answer:", "--answer-after", ",")
    assert run(*command(place, out, *wording)) == 0
    header, *answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert {entry["answer"] for entry in answers} == {expected}
    assert header["run"]["template"] == wording[1] and header["run"]["answer_after"] == ","
    question = all_benchmarks()["scienceqa"].read(place / "scienceqa")[0].question
    assert tokenizer.encode(f"Question: {question} {{x}} Answer:", eos=False) in prompts
    assert run(*command(place, whole, *wording)) == 2, "the answers of another prompt"
    assert run(*command(place, out, "--template", "no place")) == 2
    assert "--template needs {question} where the question stands, got 'no place'" in capsys.readouterr().err
    assert run(*command(place, out, "--answer-after", "")) == 2


def test_a_killed_run_goes_on_and_asks_nothing_twice(place, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    lines = (whole / "answers.jsonl").read_text().splitlines(keepends=True)
    (out / "answers.jsonl").write_text("".join(lines[:3]) + lines[3][:9])  # killed within the third answer
    (out / ".result.json.0a1b2c3d.part").write_text("{")
    asked = []
    answer = models.LlamaAnswerer.answer
    monkeypatch.setattr(
        models.LlamaAnswerer,
        "answer",
        lambda self, items: (asked.extend(i.id for i in items), answer(self, items))[1],
    )
    assert run(*command(place, out)) == 0
    assert asked == ["2", "3", "4"]
    for name in ("answers.jsonl", "result.json"):
        assert (out / name).read_text() == (whole / name).read_text()
    assert len(list(out.iterdir())) == 2
    monkeypatch.setattr(models, "load", None)  # with nothing to ask, no model is loaded
    assert run(*command(place, out)) == 0


def test_ctrl_c_keeps_what_is_answered(place, whole, tmp_path, monkeypatch, capsys):
    answer = models.LlamaAnswerer.answer

    def interrupted(self, items):
        signal.raise_signal(signal.SIGINT)
        return answer(self, items)

    with monkeypatch.context() as patched:
        patched.setattr(models.LlamaAnswerer, "answer", interrupted)
        assert run(*command(place, tmp_path / "out")) == 130
    assert "2 of 5 questions are answered; the same command goes on from there" in capsys.readouterr().err
    assert not (tmp_path / "out" / "result.json").exists()
    assert run(*command(place, tmp_path / "out")) == 0
    assert (tmp_path / "out" / "result.json").read_text() == (whole / "result.json").read_text()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_model_that_knows_everything_gets_every_point(name, tmp_path, monkeypatch, capsys):
    FOLDERS[name](tmp_path / "data")
    model = Knowing(name)
    with_model(monkeypatch, model)
    assert (
        run(name, "--base", "b", "--data", tmp_path / "data", "--out", tmp_path / "out", "--batch-size", 3)
        == 0
    )
    *_, summary = json.loads((tmp_path / "out" / "result.json").read_text())["tables"]
    best = {"mme": 1400, "lvlm-ehub": 1.0}.get(name, 100)
    figures = [value for row in summary["rows"] for value in row[1:] if "(quoted)" not in row[0]]
    assert best in figures or name == "mme", figures
    if name == "mme":
        assert summary["rows"][0][1:] == [2000, 800, 2800]
    read = all_benchmarks()[name].read(tmp_path / "data")
    assert sorted(key for batch in model.asked for key in batch) == sorted(item.id for item in read)
    assert len({item.id for item in read}) == len(read), "ids are unique"
    assert all(picture.read() for item in read for picture in item.pictures)
    # scoring those answers again needs no model
    capsys.readouterr()
    words = [name, "--data", tmp_path / "data", "--answers", tmp_path / "out"]
    assert run(*words, "--out", tmp_path / "again") == 0
    found = json.loads((tmp_path / "again" / "result.json").read_text())
    assert found["tables"] == json.loads((tmp_path / "out" / "result.json").read_text())["tables"]
    (tmp_path / "again" / "result.json").write_text("{}")
    assert run(*words, "--out", tmp_path / "again") == 2, "figures of other answers are not overwritten"
    assert summary["title"] in capsys.readouterr().out


def test_open_questions_are_asked_and_not_scored(tmp_path, monkeypatch):
    vicuna(tmp_path / "data")
    with_model(
        monkeypatch,
        SimpleNamespace(check=len, answer=lambda items: [f"{item.id} and more" for item in items]),
    )
    assert run("vicuna", "--base", "b", "--data", tmp_path / "data", "--out", tmp_path / "out") == 0
    (table,) = json.loads((tmp_path / "out" / "result.json").read_text())["tables"]
    assert table["rows"] == [["all", 2, 3.0, 0], ["math", 1, 3.0, 0], ["x", 1, 3.0, 0]]


def test_batches_keep_an_image_together():
    def item(key, *pictures):
        return Item(key, "?", tuple(Picture(name) for name in pictures))

    items = [
        item("1", "a"),
        item("2", "b"),
        item("3", "a"),
        item("4"),
        item("5"),
        item("6", "b"),
        item("7", "b"),
    ]
    assert [[i.id for i in batch] for batch in batches(items, 3)] == [["1", "3"], ["2", "6", "7"], ["4", "5"]]
    assert [[i.id for i in batch] for batch in batches(items, 2)] == [
        ["1", "3"],
        ["2", "6"],
        ["7", "4"],
        ["5"],
    ]


def edited(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGE = {
    "mme: a task is missing": ("mme", lambda d: (d / "existence.txt").unlink(), "no questions"),
    "mme: two columns": ("mme", lambda d: edited(d / "position.txt", "\tNo", ""), "3 columns"),
    "mme: a truth": ("mme", lambda d: edited(d / "position.txt", "\tNo", "\tperhaps"), "Yes or No"),
    "mme: only one question": ("mme", lambda d: edited(d / "position.txt", "\tNo", "\tYes"), "two questions"),
    "pope: a file is missing": ("pope", lambda d: (d / "coco_pope_popular.json").unlink(), "coco_pope_popular"),
    "pope: duplicate": (
        "pope", lambda d: edited(d / "coco_pope_random.json", '"question_id": 1', '"question_id": 0'), "there twice",
    ),
    "pope: field": ("pope", lambda d: edited(d / "coco_pope_random.json", '"text"', '"words"'), "'text' is missing"),
    "pope: label": ("pope", lambda d: edited(d / "coco_pope_random.json", '"yes"', '"YES"'), "yes or no"),
    "pope: type": ("pope", lambda d: edited(d / "coco_pope_random.json", '"image": "0', '"image": 0, "x": "'), "str"),
    "pope: image": ("pope", lambda d: (d / "val2014" / "1.jpg").unlink(), "there is no image"),
    "mmbench: column": ("mmbench", lambda d: edited(d / "mmbench_dev.tsv", "l2-category", "category"), "no column"),
    "mmbench: cells": ("mmbench", lambda d: edited(d / "mmbench_dev.tsv", "\tred", "\tred\tpink"), "11 cells for 10"),
    "mmbench: answer": ("mmbench", lambda d: edited(d / "mmbench_dev.tsv", "\tB\tcoarse", "\tD\tcoarse"), "'D'"),
    "mmbench: index": ("mmbench", lambda d: edited(d / "mmbench_dev.tsv", "\n2\t", "\n1\t"), "'1' is there twice"),
    "cvqa: column": ("cvqa", lambda d: edited(d / "C-VQA-Real_questions.csv", "new query", "newer"), "no column"),
    "cvqa: empty": ("cvqa", lambda d: (d / "C-VQA-Real_questions.csv").write_text(""), "has no column"),
    "scienceqa: split": ("scienceqa", lambda d: edited(d / "pid_splits.json", '"4"', '"9"'), "no problem 9"),
    "scienceqa: twice": ("scienceqa", lambda d: edited(d / "pid_splits.json", '"4"', '"3"'), "there twice"),
    "scienceqa: answer": ("scienceqa", lambda d: edited(d / "problems.json", '"answer": 2', '"answer": 3'), "answer 3"),
    "scienceqa: not JSON": ("scienceqa", lambda d: (d / "problems.json").write_text("{"), "is not JSON"),
    "lvlm-ehub: name": ("lvlm-ehub", lambda d: (d / "GQA").rename(d / "GQA2"), "no data set 'GQA2'"),
    "vqa: no answers": ("vqa", lambda d: edited(d / "v2_annotations.json", 'question_id": 1', 'question_id": 9'), "1"),
    "vqa: two files": (
        "vqa", lambda d: shutil.copy(d / "v2_questions.json", d / "x_questions.json"), "holds 2 files",
    ),
    "vqa: answers twice": (
        "vqa", lambda d: edited(d / "v2_annotations.json", '"question_id": 1', '"question_id": 0'), "0 is there twice",
    ),
    "vqa: a question twice": (
        "vqa", lambda d: edited(d / "v2_questions.json", '"question_id": 1', '"question_id": 0'), "'0' is there twice",
    ),
    "scienceqa: a problem twice": (
        "scienceqa", lambda d: edited(d / "problems.json", '"1": {', '"0": {'), "the name '0' is there twice",
    ),
    "scienceqa: choices": (
        "scienceqa", lambda d: edited(d / "problems.json", '["one", "two", "three"]', json.dumps(["x"] * 11)),
        "at most 10 texts",
    ),
    "scienceqa: a choice": ("scienceqa", lambda d: edited(d / "problems.json", '"two"', "2"), "at most 10 texts"),
    "scienceqa: half a character": (
        "scienceqa", lambda d: edited(d / "problems.json", "Which is 3", "Which is \\ud800"), "half of a character",
    ),
    "pope: half a character": (
        "pope", lambda d: edited(d / "coco_pope_random.json", "Is there a", "Is \\ud83d a"), "half of a character",
    ),
    "easy-vqa: a row": ("easy-vqa", lambda d: edited(d / "questions.json", '"no", 0', '"no", "0"'), "image number]"),
    "mmbench: one index in two forms": (
        "mmbench", lambda d: edited(d / "mmbench_dev.tsv", "\n2\t", "\n01\t"), "must be a number, got '01'",
    ),
    "mmbench: a long index": (
        "mmbench", lambda d: edited(d / "mmbench_dev.tsv", "\n2\t", "\n" + "2" * 5000 + "\t"), "must be a number",
    ),
    "mmbench: some rotations": (
        "mmbench", lambda d: edited(d / "mmbench_dev.tsv", "\n2\t", "\n1000002\t"), "CircularEval",
    ),
    "cvqa: a column twice": (
        "cvqa", lambda d: (d / "C-VQA-Real_questions.csv").write_text(
            "img_path,query,query,answer,new query,new answer,type\na.jpg,one,two,2,x,1,direct\n"
        ), "the column 'query' twice",
    ),
    "scienceqa: 13 choices": (
        "scienceqa", lambda d: edited(
            d / "problems.json", '["one", "two", "three"], "answer": 0', json.dumps(["a"] * 13) + ', "answer": 12'
        ), "at most 10 texts",
    ),
    "scienceqa: a grade": (
        "scienceqa", lambda d: edited(d / "problems.json", '"grade4"', '"grade' + "9" * 5000 + '"'), "grade1 to",
    ),
    "no folder": ("vqa", lambda d: shutil.rmtree(d), "there is no"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_data_are_one_sentence_and_write_nothing(case, tmp_path, monkeypatch, capsys):
    name, damage, said = DAMAGE[case]
    FOLDERS[name](tmp_path / "data")
    damage(tmp_path / "data")
    with_model(monkeypatch, Knowing(name))
    assert run(name, "--base", "b", "--data", tmp_path / "data", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert (
        not any((tmp_path / "out").glob("?*.json*")) or not (tmp_path / "out" / "answers.jsonl").read_text()
    )


def test_what_cannot_run_is_said_and_nothing_is_overwritten(place, whole, tmp_path, capsys):
    before = (whole / "answers.jsonl").read_bytes()
    other = tmp_path / "other.safetensors"
    other.write_bytes((place / "adapter.safetensors").read_bytes() + b" ")
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "answers.jsonl").write_text("my notes\n")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "answers.jsonl").write_bytes(before.replace(b'{"id": "1"', b'{"id": "0"'))
    scienceqa(tmp_path / "seen")
    for words, said in [
        (command(place, whole, "--dtype", "bfloat16"), "another run: its dtype is"),
        ([*command(place, whole)[:4], other, *command(place, whole)[5:]], "another run: its model is"),
        (command(place, strange), "not JSON"),
        (command(place, tmp_path / "damaged"), "the id '0' is there twice"),
        (command(place, place / "data.jsonl"), "is a file"),
        (command(place, tmp_path / "new", "--batch-size", 0), "given twice"),
        (["scienceqa", "--batch-size", 0, "--base", "x", "--data", "x", "--out", "x"], "must be at least 1"),
        (["scienceqa", "--base", "x"], "--data is missing"),
        (["scienceqa", "--answers", whole], "--data is missing"),
        (["scienceqa", "--answers", place, "--data", place / "scienceqa"], "a folder without answers.jsonl"),
        (
            [*command(place, tmp_path / "new")[:10], 400, *command(place, tmp_path / "new")[11:]],
            "5 of 5 questions are longer than the 112 tokens that the model has for them, the first is 0",
        ),
        (["hellaswag"], "no command 'hellaswag'"),
        (
            [*command(place, tmp_path / "new")[:6], tmp_path / "seen", *command(place, tmp_path / "new")[7:]],
            "no visual part",
        ),
    ]:
        assert run(*words) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert (whole / "answers.jsonl").read_bytes() == before
    assert (strange / "answers.jsonl").read_text() == "my notes\n"


def test_answers_about_other_images_are_of_another_run(tmp_path, monkeypatch, capsys):
    for name, change in (
        ("mmbench", lambda d: edited(d / "mmbench_dev.tsv", PIXEL, PIXEL.lower())),
        ("vqa", lambda d: (d / "val2014" / "COCO_val2014_000000000007.jpg").write_bytes(b"another image")),
    ):
        with_model(monkeypatch, Knowing(name))
        FOLDERS[name](tmp_path / name)
        words = [name, "--base", "b", "--data", tmp_path / name, "--out", tmp_path / f"{name}-out"]
        assert run(*words) == 0 == run(*words)
        change(tmp_path / name)
        assert run(*words) == 2
        assert "another run: its questions is" in capsys.readouterr().err


def test_help_lists_the_commands(capsys):
    assert run("--help") == 0 and run() == 2
    shown = capsys.readouterr()
    for name in FOLDERS:
        assert f"    {name} " in shown.out and f"    {name} " in shown.err
    assert run("mme", "--help") == 0
    assert "TASK.txt" in capsys.readouterr().out


def test_progress_says_the_time_left(place, tmp_path, monkeypatch, capsys):
    import model.progress

    monkeypatch.setattr(model.progress, "EVERY", 0.0)
    assert run(*command(place, tmp_path / "out")) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("questions 2/5, 0:00:0") and lines[0].endswith(" left"), lines
    assert benchmark_command.INTERRUPTED == 130


def test_figures_of_something_else_are_not_replaced(tmp_path, monkeypatch, capsys):
    with_model(monkeypatch, Knowing("easy-vqa"))
    FOLDERS["easy-vqa"](tmp_path / "data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_text("mine")
    assert run("easy-vqa", "--base", "b", "--data", tmp_path / "data", "--out", tmp_path / "out") == 2
    assert "holds a result.json and no answers.jsonl" in capsys.readouterr().err
    assert (tmp_path / "out" / "result.json").read_text() == "mine"


def test_a_pipe_in_the_place_of_the_answers_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "answers.jsonl")
    with pytest.raises(UserError, match="it is no file"):
        LineFile(tmp_path / "answers.jsonl", {})


def test_answers_to_another_benchmark_or_to_other_questions(tmp_path, monkeypatch, capsys):
    """The ids of both are 0, 1, 2, ...: the answers of one were scored as the other's."""
    with_model(monkeypatch, Knowing("easy-vqa"))
    FOLDERS["easy-vqa"](tmp_path / "data")
    answers = tmp_path / "out" / "answers.jsonl"
    assert run("easy-vqa", "--base", "b", "--data", tmp_path / "data", "--out", tmp_path / "out") == 0
    words = ["easy-vqa", "--data", tmp_path / "data", "--answers", answers]
    assert run(*words) == 0 and capsys.readouterr().err.count("warning") == 0
    edited(tmp_path / "data" / "questions.json", "is it red?", "is it blue?")
    assert run(*words) == 0 and "answers other questions than those of" in capsys.readouterr().err
    edited(answers, '"benchmark": "easy-vqa"', '"benchmark": "vqa"')
    assert run(*words) == 2 and "has answers to 'vqa', not to easy-vqa" in capsys.readouterr().err


def test_no_escape_sequence_of_a_file_reaches_the_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "identity", lambda *_: {"name": "stub"})
    monkeypatch.setattr(
        models,
        "load",
        lambda *_: SimpleNamespace(check=lambda _: None, answer=lambda items: ["a"] * len(items)),
    )
    vicuna(tmp_path / "data")
    edited(tmp_path / "data" / "question.jsonl", '"math"', '"\\u001b[31mmath\\u202e"')
    assert run("vicuna", "--base", "b", "--data", tmp_path / "data", "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and "\\x1b[31mmath\\u202e" in out


def test_a_full_disk_costs_the_answers_of_a_batch(tmp_path):
    """No half of a line stays, and closing the file has nothing left to say."""
    path, run = tmp_path / "answers.jsonl", {"benchmark": "mme"}
    file = LineFile(path, run)
    file.add([{"id": "0", "answer": "a"}])
    before = path.read_bytes()
    with files_of_at_most(len(before) + 10):
        with pytest.raises(UserError, match="cannot write .*answers.jsonl: File too large"):
            file.add([{"id": "1", "answer": "b"}])
        file.close()
    assert path.read_bytes() == before
    assert [entry["id"] for _, entry in LineFile(path, run).entries] == ["0"]


@pytest.mark.parametrize("length", [1, 5, 6, 20])
def test_a_header_that_was_cut_short_is_written_again(tmp_path, length):
    path, run = tmp_path / "answers.jsonl", {"benchmark": "mme"}
    path.write_text(json.dumps({"run": run})[:length])
    LineFile(path, run).add([{"id": "0", "answer": "a"}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"run": run},
        {"id": "0", "answer": "a"},
    ]
