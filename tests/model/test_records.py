"""Records and prompts from files: what a file holds is used, or said."""

from __future__ import annotations

import json
import time

import pytest

from model.errors import UserError
from model.records import Record, format_prompt, read_prompts, read_records

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_official_templates():
    assert format_prompt("Say hi.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay hi.\n\n### Response:"
    )
    assert format_prompt("Add {these}.", "{1} 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd {these}.\n\n### Input:\n{1} 2\n\n### Response:"
    )


ROWS = [GOOD, {"instruction": "Say hé.", "output": "hé\nho", "input": None}]
RECORDS = [Record("Add.", "3", "1 2"), Record("Say hé.", "hé\nho")]
FORMS = {
    "a list": json.dumps(ROWS),
    "a pretty-printed list": json.dumps(ROWS, indent=1),
    "a marked list": "\ufeff" + json.dumps(ROWS),
    "lines": "\n\n".join(map(json.dumps, ROWS)) + "\n",
    "CRLF lines": "\r\n".join(map(json.dumps, ROWS)) + "\r\n",
    "CR lines": "\r".join(map(json.dumps, ROWS)),
    "two marked files, one behind the other": "".join(f"\ufeff{json.dumps(row)}\n" for row in ROWS),
    "pretty-printed objects, as of jq": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "objects in one line": " ".join(map(json.dumps, ROWS)),
    "an object with a list": json.dumps({"data": ROWS}),
    "a pretty-printed object with a list": "\n" + json.dumps({"version": "1", "data": ROWS, "x": [1]}, indent=2),
    "CRLF in a list": json.dumps(ROWS, indent=1).replace("\n", "\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_a_file(tmp_path, form):
    assert read_records(write(tmp_path / "a.json", FORMS[form])) == RECORDS


BAD_FILES = {
    "not JSON": ('{"instruction": "a", "output": "b"}\n{"instruction": ', "line 2: not JSON at column"),
    "a broken line": ('{"instruction": "a"\n{"instruction": "a", "output": "b"}', "line 1: not JSON at column 20"),
    "a cut pretty-printed object": (json.dumps(GOOD, indent=1)[:-1] + "\n\n", "column 15 (the file ends"),
    "a list cut short": (json.dumps([GOOD])[:-1], "line 1: not JSON"),
    "a list with a bad element": ('[\n{"instruction": "a", "output": "b"},\n{oops}\n]', "line 3: not JSON"),
    "a list without commas": ('[{"instruction": "a", "output": "b"}\n{}]', "line 2: not JSON"),
    "text after the list": (json.dumps([GOOD]) + "\nmore", "line 1: not JSON"),
    "text after an object": (json.dumps({"data": [GOOD]}) + "\nmore", "line 1: the field 'instruction' is missing"),
    "no object": ("[1]", "line 1: a record must be an object with instruction, input and output, got a int"),
    "a number": ("3", "line 1: a record must be an object"),
    "no output": ('\n{"instruction": "a", "input": "b"}', "line 2: the field 'output' is missing"),
    "a number as output": (json.dumps(GOOD | {"output": 3}), "line 1: the field 'output' must be a string, got a int"),
    "a number as input": (json.dumps(GOOD | {"input": 1}), "line 1: the field 'input' must be a string"),
    "half a character": (json.dumps(GOOD | {"output": "\ud800"}), "line 1: the field 'output' holds \\ud800, half"),
    "nested": ("\n" + '{"a":' * 100_000, "line 2: JSON that cannot be read"),
    "nested in a list": ("[" * 100_000, "line 1: JSON that cannot be read"),
    "a long number": (f'{{"a": {"1" * 5000}}}', "line 1: JSON that cannot be read"),
    "a field twice": ('\n{"output": "a", "output": "b"}', "line 2: JSON that cannot be read (the field 'output'"),
    "nothing": ("\n\n", "holds no records."),
    "an empty list": ("[ ]", "holds no records."),
    "an object with an empty list": ('{"data": []}', "holds no records."),
    "two lists": (json.dumps({"train": [GOOD], "test": [GOOD]}), "2 lists of records, 'train' and 'test'"),
    "only empty answers": (json.dumps([GOOD | {"output": " "}]), "holds no records with an answer"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_named(tmp_path, kind):
    content, message = BAD_FILES[kind]
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(UserError) as error:
        read_records(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_a_list_in_an_object_keeps_its_lines(tmp_path):
    path = write(tmp_path / "bad.json", json.dumps({"data": [GOOD, GOOD | {"output": 3}]}, indent=1))
    with pytest.raises(UserError, match="line 8: the field 'output' must be a string"):
        read_records(path)


@pytest.mark.parametrize("field", ["instruction", "output"])
@pytest.mark.parametrize("empty", ["", "\n", None])
def test_records_without_an_answer_are_left_out_and_counted(tmp_path, capsys, field, empty):
    bad = GOOD | {field: empty}
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, [GOOD, bad, GOOD, *[bad] * 7])))
    assert read_records(path) == RECORDS[:1] * 2
    left_out = f"8 records have an empty {field} and are left out, at lines 2, 4, 5, 6, 7 and 3 more."
    assert capsys.readouterr().err == f"warning: {path}: {left_out}\n"
    with pytest.raises(UserError, match=f"8 records have an empty {field}, at lines 2, 4, 5, 6, 7, 8, 9, 10"):
        read_records(path, strict=True)


REFUSED = ["system", "history", "System", "images", "messages", "weight", "context", "kto_tag"]
OF_THE_KIND = [
    "chat_history",
    "image_path",
    "imageURL",
    "tool_calls",
    "sampleWeight",
    "few-shot",
    "SYSTEM_PROMPT",
]


@pytest.mark.parametrize("field", REFUSED + OF_THE_KIND)
def test_fields_that_change_the_meaning_are_refused(tmp_path, field):
    for empty in (None, "", " ", []):
        assert read_records(write(tmp_path / "a.json", json.dumps([GOOD | {field: empty}]))) == RECORDS[:1]
    path = write(tmp_path / "a.json", json.dumps([GOOD, GOOD | {field: [["Hi.", "Hello."]]}]))
    with pytest.raises(UserError, match=f"line 1: the field '{field}' changes what a record means"):
        read_records(path)
    (tmp_path / "a.jsonl").write_text(path.read_text())
    with pytest.raises(UserError, match=f"line 1: the field '{field}' changes what a record means"):
        read_prompts(tmp_path / "a.jsonl")
    path = write(tmp_path / "a.json", json.dumps({field: "You are a poet.", "data": [GOOD]}))
    with pytest.raises(UserError, match=f"a.json: the field '{field}' changes what a record means"):
        read_records(path)


@pytest.mark.parametrize("field", ["Input", "inputs", "INPUT ", "Output"])
def test_a_misspelt_field_is_named(tmp_path, field):
    meant = field.strip().lower().removesuffix("s")
    path = write(tmp_path / "a.json", json.dumps([{"instruction": "a", "output": "b", field: "1 2"}]))
    with pytest.raises(UserError, match=f"the field '{field}' is not used: is '{meant}' meant"):
        read_records(path)


@pytest.mark.parametrize(
    "field", ["image_id", "num_turns", "promptTokens", "weighted", "is_system", "text", "filesystem"]
)
def test_fields_about_such_data_are_not_refused(tmp_path, capsys, field):
    path = write(tmp_path / "a.json", json.dumps([GOOD | {field: 3}]))
    assert read_records(path) == RECORDS[:1]
    assert f"these fields of records are not used: '{field}' (in 1)" in capsys.readouterr().err


def test_other_fields_are_named_once(tmp_path, capsys):
    rows = [GOOD | {"id": 1, "source": "x"}, GOOD | {"id": 2}, GOOD | {"source": None}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_records(path) == RECORDS[:1] * 3
    expected = f"note: {path}: these fields of records are not used: 'id' (in 2), 'source' (in 1).\n"
    assert capsys.readouterr().err == expected


def test_a_long_list_is_read_in_one_sweep(tmp_path):
    """Alpaca's 52,002 records took 172 s where the lines before a record were counted for each anew, now 0.3 s."""
    rows = [GOOD | {"output": "3" * 1000}] * 10_000
    for text in (json.dumps(rows, indent=1), json.dumps({"data": rows}), "\n".join(map(json.dumps, rows))):
        path = write(tmp_path / "long.json", text)
        began = time.process_time()
        assert len(read_records(path)) == 10_000
        assert time.process_time() - began < 3


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json: No such file"):
        read_records(tmp_path / "gone.json")
    (tmp_path / "latin.json").write_bytes(b'\n{"instruction": "\xe9"}')
    with pytest.raises(UserError, match=r"latin\.json, line 2: not UTF-8 text \(byte 0xe9\)"):
        read_records(tmp_path / "latin.json")
    (tmp_path / "wide.json").write_bytes(json.dumps(GOOD).encode("utf-16"))
    with pytest.raises(
        UserError, match=r"line 1: not UTF-8 text \(byte 0xff, as in UTF-16: save it as UTF-8\)"
    ):
        read_records(tmp_path / "wide.json")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompts_are_lines_however_they_end(tmp_path, end):
    prompts = ["Say hello", " indented ", "a\u2028b\x0cc"]
    path = write(tmp_path / "a.txt", "\ufeff" + end.join([*prompts, "", " "]) + end)
    assert read_prompts(path) == prompts


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json", "a.ndjson"])
def test_prompts_from_json(tmp_path, name):
    rows = ["Say hello", {"prompt": "Go on", "instruction": ""}, GOOD, {"instruction": "Say.", "input": None}]
    expected = ["Say hello", "Go on", format_prompt("Add.", "1 2"), format_prompt("Say.")]
    for text in ("\r\n".join(map(json.dumps, rows)), json.dumps(rows, indent=1)):
        assert read_prompts(write(tmp_path / name, text)) == expected


def test_bad_prompts_are_named(tmp_path):
    for name, content, message in (
        ("a.jsonl", '{"prompt": "fox"}\n{"prompt": \n', "a.jsonl, line 2: not JSON at column"),
        (
            "a.jsonl",
            '{"prompt": "a", "instruction": "b"}',
            "the field 'instruction' changes what a record means",
        ),
        ("a.jsonl", '{"prompt": "a", "input": "b"}', "the field 'input' changes what a record means"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "the field 'prompt' stands twice"),
        ("a.jsonl", "3", 'expected a string, or an object with "prompt" or "instruction", got 3'),
        ("a.txt", '{"prompt": "fox"}\n', "every line of .* is a JSON object: name it .jsonl"),
        ("a.txt", json.dumps(["fox", "dog"], indent=1), "as a whole is JSON: name it .json"),
        ("a.txt", json.dumps({"prompt": "fox"}, indent=1), "as a whole is JSON: name it .json"),
        (
            "a.txt",
            '# asked\n{"prompt": "fox"}\n{"prompt": "dog"}',
            "most lines of .* are JSON objects: name it",
        ),
        ("a.txt", '{"prompt": "fox"}\n' * 3 + '{"prompt": "do', "most lines of .* are JSON objects: name it"),
        ("a.txt", (json.dumps({"prompt": "fox"}, indent=1) + "\n") * 2, "as a whole is JSON: name it .json"),
        ("a.txt", "fox\nd\0o\0g\0", "line 2: a zero byte, as in UTF-16"),
        ("a.txt", "\n \n", "holds no prompts"),
    ):
        with pytest.raises(UserError, match=message):
            read_prompts(write(tmp_path / name, content))
