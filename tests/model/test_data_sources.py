"""Records and conversations from JSON, JSONL, Parquet and saved data sets."""

from __future__ import annotations

import builtins
import json

import pytest
from tiny_chat import CONVERSATIONS, messages, turns

from model.data.messages import Conversation, Message
from model.data.sources import check_source, read_source
from model.errors import UserError
from model.records import Record, json_values

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}
ROWS = [GOOD, messages("Hi.", "Hello.", "Bye.", "Bye!", system="Be brief."), turns("Hi.", "Hello.")]
READ = [
    Record("Add.", "3", "1 2"),
    (Message("system", "Be brief."), Message("user", "Hi."), Message("assistant", "Hello."),
     Message("user", "Bye."), Message("assistant", "Bye!")),
    (Message("user", "Hi."), Message("assistant", "Hello.")),
]  # fmt: skip


def write(path, rows):
    """The rows in the format that the name tells."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def plain(records):
    return [record if isinstance(record, Record) else record.messages for record in records]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet", "a"])
def test_every_format_gives_the_same_records(tmp_path, name):
    if name in ("a.parquet", "a"):
        pytest.importorskip("datasets")
    rows = ROWS
    if name in ("a.parquet", "a"):  # a table has one set of columns
        empty = dict.fromkeys(name for row in ROWS for name in row)
        rows = [empty | row for row in ROWS]
    path = write(tmp_path / name, rows)
    check_source(path)
    assert plain(read_source(path)) == READ


def test_a_folder_of_parquet_files_and_one_of_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, row in enumerate([GOOD, GOOD | {"output": "4"}]):
        write(shards / f"{number}.parquet", [row])
    assert [record.output for record in read_source(shards)] == ["3", "4"]
    for names, message in (
        (("train", "test"), None),
        (("left", "right"), "holds the splits left, right: name the folder"),
    ):
        folder = tmp_path / names[0]
        datasets.DatasetDict({name: datasets.Dataset.from_list([GOOD]) for name in names}).save_to_disk(
            str(folder)
        )
        if message is None:
            assert len(list(read_source(folder))) == 1
        else:
            with pytest.raises(UserError, match=message):
                list(read_source(folder))


def test_jsonl_is_read_a_line_at_a_time(tmp_path, monkeypatch):
    """Data larger than memory: the first records are there before the file has been read to its end."""
    path = write(tmp_path / "a.jsonl", [GOOD] * 50_000)
    lines = []
    real = builtins.open

    class Counting:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __iter__(self):
            for line in self.file:
                lines.append(None)
                yield line

    monkeypatch.setattr(builtins, "open", lambda *a, **k: Counting(real(*a, **k)))
    records = read_source(path)
    next(records)
    assert len(lines) == 1
    records.close()


FORMS = {
    "pretty-printed": "\n".join(json.dumps(row, indent=2) for row in [GOOD, GOOD]),
    "a pretty-printed object behind lines": json.dumps(GOOD) + "\n" + json.dumps(GOOD, indent=1),
    "a list": json.dumps([GOOD, GOOD]),
    "an object with a list": json.dumps({"data": [GOOD, GOOD]}),
    "two objects in one line": json.dumps(GOOD) + " " + json.dumps(GOOD),
    "CR and marks": f"\ufeff{json.dumps(GOOD)}\r\ufeff{json.dumps(GOOD)}\r",
}


@pytest.mark.parametrize("form", FORMS)
def test_jsonl_in_other_forms_is_read_as_json(tmp_path, form):
    path = tmp_path / "a.jsonl"
    path.write_text(FORMS[form], encoding="utf-8", newline="")
    assert [
        (n, v) for n, v in json_values(path.read_text(encoding="utf-8-sig").replace("\n\ufeff", "\n"), path)
    ]
    assert list(read_source(path)) == [Record("Add.", "3", "1 2")] * 2


def talk(**changes):
    return {
        "messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."} | changes]
    }


BAD = {
    "begins with the assistant": (turns("Hi.", "Hello.")["conversations"][::-1], "begins with the assistant"),
    "begins with the assistant after a system message": (
        [{"role": "system", "content": "x"}, {"role": "assistant", "content": "Hello."}], "begins with the assistant"),
    "an unknown role": (talk(role="tool")["messages"], "message 2: the role 'tool' is not known; the roles are system"),
    "a role that is a list": (talk(role=["user"])["messages"], "the role ['user'] is not known"),
    "no content": ([{"role": "user"}], "message 1: a message must have role and content"),
    "a number": (talk(content=3)["messages"], "the field 'content' must be a string"),
    "an image": (talk(content=[{"type": "image_url"}])["messages"], "a part of the content is 'image_url'"),
    "tool calls": (talk(tool_calls=[{"id": 1}])["messages"], "the field 'tool_calls' changes what a record means"),
    "a weight": (talk(weight=0.5)["messages"], "the weight of a message must be 0 or 1, got 0.5"),
    "no object": (["Hi."], "message 1: a message must be an object"),
    "a late system message": (talk()["messages"] + [{"role": "system", "content": "x"}], "must be the first"),
    "a string": ("Hi.", "must be a list of messages, got a str"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_conversations_are_named(tmp_path, kind):
    value, message = BAD[kind]
    path = write(tmp_path / "a.jsonl", [GOOD, {"messages": value}])
    with pytest.raises(UserError) as error:
        list(read_source(path))
    assert f"{path}, line 2" in str(error.value) and message in str(error.value)


def test_conversations_without_an_answer_are_left_out_and_counted(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [messages("Hi."), talk(weight=0), talk(content=" "), GOOD])
    assert plain(read_source(path)) == READ[:1]
    assert "3 records have an empty output and are left out, at lines 1, 2, 3" in capsys.readouterr().err
    with pytest.raises(UserError, match="3 records have an empty output"):
        list(read_source(path, strict=True))


def test_the_last_message_is_an_answer(tmp_path):
    path = write(tmp_path / "a.jsonl", [messages("Hi.", "Hello.", "Thanks.")])
    (found,) = read_source(path)
    assert isinstance(found, Conversation) and [message.role for message in found.messages] == [
        "user",
        "assistant",
    ]


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    import sys

    pytest.importorskip("datasets")
    parquet, saved = write(tmp_path / "a.parquet", [GOOD]), write(tmp_path / "a", [GOOD])
    for path, library in ((parquet, "pyarrow"), (saved, "datasets")):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, library, None)
            patched.setitem(sys.modules, "pyarrow.parquet", None)
            with pytest.raises(
                UserError,
                match=rf"read by {library}, which is not installed: pip install 'zinit-kernels\[data\]'",
            ):
                check_source(path)


def test_other_files_and_folders_are_refused(tmp_path):
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a readable Parquet file"):
        list(read_source(tmp_path / "bad.parquet"))
    with pytest.raises(UserError, match="is a folder, and neither"):
        check_source(tmp_path / "empty")
    with pytest.raises(UserError, match="No such file"):
        check_source(tmp_path / "nothing.json")
    assert len(CONVERSATIONS) == 8
