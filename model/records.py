"""Instruction records and prompts from files: JSON, JSONL, or a prompt a line.

    records = read_records("alpaca.json")
    prompts = read_prompts("questions.txt")

What a file holds is used, or said. A field that would change what the model is asked or how much a record counts
("system", "history", "weight", ...) is refused by name; every other field that is not used is named in one note. A
record without an answer is left out, and counted in one warning.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .errors import UserError, note, warn

_Kept = TypeVar("_Kept")

# The templates of Stanford Alpaca, which the official LLaMA-Adapter is trained and asked with too.
TEMPLATE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
TEMPLATE_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

# A field with one of these words in its name is a part of the conversation, data of another kind, or how much a record
# counts, for other trainers. The template has no place for it, and to train without it would be to train on something
# else: system_prompt, chat_history, tool_calls, image_path, sampleWeight, ...
_CHANGES_THE_MEANING = frozenset((
    "system", "history", "message", "messages", "conversation", "conversations", "dialog", "dialogue", "turns",
    "context", "prompt", "tool", "tools", "function", "functions", "image", "images", "video", "videos", "audio",
    "audios", "chosen", "rejected", "kto", "weight", "mask", "shot", "shots", "demonstrations", "persona", "documents",
    "passages", "knowledge",
))  # fmt: skip
# Unless the name says that the field is about such data: image_id, num_turns, prompt_tokens
_COUNTS = frozenset(("num", "n", "number", "has", "is"))
_LABELS = frozenset((
    "id", "ids", "idx", "index", "key", "hash", "source", "sources", "type", "types", "category", "count", "num",
    "number", "length", "len", "tokens", "language", "lang", "size", "width", "height", "date", "time", "score",
    "model", "version", "license",
))  # fmt: skip
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_NEEDS_AN_ENCODER = ("image", "images", "conversations")  # what `model.vision.records` reads
_TEXTS = ("instruction", "output", "input")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_SHOWN_LINES = 5


class Record(NamedTuple):
    """One record of an Alpaca-style file."""

    instruction: str
    output: str
    input: str = ""
    images: tuple[str, ...] = ()  # the files that it is about; `model.vision.records` reads them

    @property
    def prompt(self) -> str:
        """The template, filled: what the model is given."""
        return format_prompt(self.instruction, self.input)


def format_prompt(instruction: str, input: str = "") -> str:
    """The Alpaca prompt for an instruction, with or without an input."""
    if input:
        return TEMPLATE_WITH_INPUT.format(instruction=instruction, input=input)
    return TEMPLATE_WITHOUT_INPUT.format(instruction=instruction)


def read_records(path: str | Path, strict: bool = False) -> list[Record]:
    """The records of a JSON file, in order.

    The file is a list of objects, one object after the other (JSONL, or pretty-printed), or one object with such a
    list in it ({"data": [...]}). Each object has the strings `instruction` and `output` and, if wanted, `input`; null
    is the empty string. Records whose instruction or output is empty are left out, with a warning that counts them;
    strict: they are an error that names all their lines.

    Raises UserError naming the file, the line and what is wrong there.
    """
    path = Path(path)
    unused: Counter[str] = Counter()
    values = json_values(read_text(path), path)
    read = ((line, to_record(value, f"{path}, line {line}", unused)) for line, value in values)
    records = with_texts(path, ((line, record, record) for line, record in read), strict)
    say_unused(path, unused)
    return records


def with_texts(path: Path, found: Iterable[tuple[int, Record, _Kept]], strict: bool) -> list[_Kept]:
    """The third of each (line, record, what to keep) whose record has an instruction and an output.

    Counts the others in a warning, or refuses them if strict. UserError where none is left.
    """
    return list(LeftOut(path, strict).of(found))


class LeftOut:
    """The records of a file that have nothing to learn: counted, and said when the file ends."""

    def __init__(self, path: Path, strict: bool):
        self.path, self.strict = path, strict
        self.lines: dict[str, list[int]] = {"instruction": [], "output": []}

    def of(self, found: Iterable[tuple[int, Record | None, _Kept]]) -> Iterator[_Kept]:
        """What to keep of each (line, record, what to keep) whose record has an instruction and an output. A record of
        None is a conversation without an answer. UserError at the end if nothing was kept, or if strict.
        """
        kept = False
        for line, record, wanted in found:
            missing = "output" if record is None else _missing(record)
            if missing:
                self.lines[missing].append(line)
            else:
                kept = True
                yield wanted
        for name, lines in self.lines.items():
            _say_left_out(self.path, name, lines, self.strict)
        if not kept:
            raise UserError(f"{self.path} holds no records{' with an answer' * any(self.lines.values())}.")


def _missing(record: Record) -> str | None:
    """The field whose text is empty."""
    return next((name for name in ("instruction", "output") if not getattr(record, name).strip()), None)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, in order: one a line, as it is; blank lines are left out.

    A file named .json, .jsonl or .ndjson holds strings, objects with `prompt`, or objects with `instruction` and, if
    wanted, `input`, which are put into the Alpaca template; an `output` beside them is not looked at.
    """
    path = Path(path)
    text = read_text(path)
    if path.suffix.lower() in JSON_SUFFIXES:
        unused: Counter[str] = Counter()
        values = json_values(text, path)
        prompts = [_prompt(value, f"{path}, line {line}", unused) for line, value in values]
        say_unused(path, unused)
    else:
        prompts = [line for line in text.split("\n") if line.strip()]
        objects = sum(map(_is_json_object, prompts))
        if 2 * objects > len(prompts):  # one line may be cut short, or a comment
            which = "every line" if objects == len(prompts) else "most lines"
            are = "is a JSON object" if objects == len(prompts) else "are JSON objects"
            raise UserError(f"{which} of {path} {are}: name it .jsonl, so that it is read as JSON.")
        if len(prompts) > 1 and _is_json(text):
            raise UserError(f"{path} as a whole is JSON: name it .json, so that it is read as JSON.")
    if not prompts:
        raise UserError(f"{path} holds no prompts.")
    return prompts


def read_text(path: Path) -> str:
    """The text of a UTF-8 file: lines end in \\n, however they end in the file, and byte order marks are left out.

    Raises UserError naming the line that is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        also = ", as in UTF-16: save it as UTF-8" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        byte = error.object[error.start]
        raise UserError(f"{path}, line {line}: not UTF-8 text (byte 0x{byte:02x}{also}).") from None
    if "\0" in text:
        raise UserError(
            f"{path}, line {_line(text, text.index(chr(0)))}: a zero byte, as in UTF-16 or a binary file: save it as "
            "UTF-8 text."
        )
    return text.replace("\n\ufeff", "\n")  # of a file that others were appended to


def check_text(value: object, name: str, where: str) -> str:
    """The value if it is a string that a tokenizer takes; UserError if not."""
    if not isinstance(value, str):
        raise UserError(f"{where}: the field {name!r} must be a string, got a {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start].encode("unicode_escape").decode()
        raise UserError(f"{where}: the field {name!r} holds {half}, half a character.") from None
    return value


def json_values(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of each value of a JSON list, of values one after the other, or of the one list in an object."""
    start = _skip_space(text, 0)
    if text[start : start + 1] == "[":
        return _list_values(text, start, path)
    found = _wrapped_list(text, start, path)
    return _stream_values(text, path) if found is None else _list_values(text, found, path, closing=False)


def _list_values(text: str, position: int, path: Path, closing: bool = True) -> Iterator[tuple[int, Any]]:
    """The elements of the list that begins at `position`. closing: nothing stands behind it."""
    # lines are counted once: the whole text for each record takes minutes
    line, counted = text.count("\n", 0, position) + 1, position
    position += 1
    first = True
    while True:
        position = _skip_space(text, position)
        if text[position : position + 1] == "]" and not (closing and text[position + 1 :].strip()):
            return
        if not first:
            if text[position : position + 1] != ",":
                where = f"{path}, line {_line(text, position)}"
                raise UserError(f"{where}: not JSON (expected , or the list's closing ]).")
            position = _skip_space(text, position + 1)
        value, end = _decode(text, position, path)
        line, counted = line + text.count("\n", counted, position), position
        yield line, value
        position, first = end, False


def _stream_values(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Values one after the other, with space or line ends between them."""
    line, counted, position = 1, 0, _skip_space(text, 0)
    while position < len(text):
        line, counted = line + text.count("\n", counted, position), position
        value, position = _decode(text, position, path)
        yield line, value
        position = _skip_space(text, position)


def _wrapped_list(text: str, start: int, path: Path) -> int | None:
    """Where the list of records begins in a text that is one object with such a list; None if it is something else."""
    try:
        whole, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):  # whoever reads the values says what is wrong
        return None
    if not isinstance(whole, dict) or is_record(whole) or _skip_space(text, end) < len(text):
        return None
    lists = {name: value for name, value in whole.items() if isinstance(value, list)}
    filled = [
        name for name, value in lists.items() if value and all(isinstance(item, dict) for item in value)
    ]
    names = filled or [name for name, value in lists.items() if not value]
    if len(names) > 1:
        raise UserError(
            f"{path} is one object with {len(names)} lists of records, {' and '.join(map(repr, names))}: pass a file "
            "that holds one of them."
        )
    if not names:
        return None
    rest = {name: value for name, value in whole.items() if name != names[0]}
    check_fields(rest, (), str(path), unused := Counter())
    say_unused(path, unused)
    position = start + 1
    for name in whole:  # in the file's order
        position = _DECODER.raw_decode(text, text.index('"', position))[1]
        position = _skip_space(text, text.index(":", position) + 1)
        if name == names[0]:
            return position
        position = _DECODER.raw_decode(text, position)[1]
    raise AssertionError("a field that was read is not in the text")


def is_record(value: dict[str, Any]) -> bool:
    """Whether an object is a record, whatever lists it has: it is asked something, or it is a conversation."""
    speaks = any(
        isinstance(turn, dict) and turn.keys() & {"from", "role"}
        for name in ("conversations", "messages")
        if isinstance(value.get(name), list)
        for turn in value[name]
    )
    return speaks or not value.keys().isdisjoint(("instruction", "question", "caption"))


def _decode(text: str, position: int, path: Path) -> tuple[Any, int]:
    """The value at a position and where it ends."""
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        line, column, reason = error.lineno, error.colno, error.msg
        end, length = text.find("\n", position), len(text.rstrip())
        if 0 <= end < error.pos and text[end + 1 : end + 2] == "{":
            # JSONL, and the line before that object is broken
            found = _error_of(text[position:end])
            line, column, reason = _line(text, position), found.colno, found.msg
        elif error.pos >= length:
            line, column = _line(text, length), length - text.rfind("\n", 0, length)
            reason = "the file ends here"
        raise UserError(f"{path}, line {line}: not JSON at column {column} ({reason}).") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # a field twice; a number or a nesting beyond Python's limits
        raise UserError(
            f"{path}, line {_line(text, position)}: JSON that cannot be read ({error})."
        ) from None


def _error_of(line: str) -> json.JSONDecodeError:
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error
    raise AssertionError("a line that is JSON was not read as such")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its fields. json keeps the last of two fields of one name and drops the first without a word."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        for name, value in pairs:
            if fields[name] != value:
                raise ValueError(f"the field {name!r} stands twice, with different values")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def to_record(value: object, where: str, unused: Counter[str]) -> Record:
    """The Alpaca record of one object; UserError for anything else."""
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: a record must be an object with instruction, input and output, got a {type(value).__name__}."
        )
    for name in ("instruction", "output"):
        if name not in value:
            advice = (
                "" if value.keys().isdisjoint(_NEEDS_AN_ENCODER) else "; records with images need --encoder"
            )
            raise UserError(
                f"{where}: the field {name!r} is missing (it has {', '.join(map(repr, value)) or 'none'}){advice}."
            )
    check_fields(value, _TEXTS, where, unused)
    texts = {name: "" if value.get(name) is None else value[name] for name in _TEXTS}
    return Record(**{name: check_text(text, name, where) for name, text in texts.items()})


def _prompt(value: object, where: str, unused: Counter[str]) -> str:
    if isinstance(value, str):
        return check_text(value, "prompt", where)
    if isinstance(value, dict) and "prompt" in value:
        check_fields(value, ("prompt",), where, unused, ("instruction", "input"))
        return check_text(value["prompt"], "prompt", where)
    if isinstance(value, dict) and "instruction" in value:
        check_fields(value, _TEXTS, where, unused)
        input = "" if value.get("input") is None else value["input"]
        instruction = check_text(value["instruction"], "instruction", where)
        return format_prompt(instruction, check_text(input, "input", where))
    raise UserError(
        f'{where}: expected a string, or an object with "prompt" or "instruction", got {str(value)[:60]}.'
    )


def check_fields(
    value: dict[str, Any], used: tuple[str, ...], where: str, unused: Counter[str], also: tuple[str, ...] = ()
) -> None:
    """Counts the fields that are not used. Raises UserError for one that changes what the record means."""
    for name, content in value.items():
        if name in used or content in (None, [], {}) or (isinstance(content, str) and not content.strip()):
            continue
        plain = name.strip().lower()
        if plain in used or plain.removesuffix("s") in used:
            raise UserError(f"{where}: the field {name!r} is not used: is {plain.removesuffix('s')!r} meant?")
        if changes_the_meaning(name) or plain in also:
            raise UserError(
                f"{where}: the field {name!r} changes what a record means, and it is not used: {_advice(plain)}, or "
                "take the field out of the file."
            )
        unused[name] += 1


def changes_the_meaning(field: str) -> bool:
    """Whether a field of this name is one without which a record means something else."""
    words = [word.lower() for word in _WORD.findall(field)]
    if len(words) > 1 and (words[0] in _COUNTS or words[-1] in _LABELS):
        return False
    return not _CHANGES_THE_MEANING.isdisjoint(words)


def _advice(field: str) -> str:
    if field in _NEEDS_AN_ENCODER:
        return "records with images need --encoder"
    return "put its text into the instruction or the input"


def _say_left_out(path: Path, name: str, lines: list[int], strict: bool) -> None:
    if not lines:
        return
    records = "1 record has" if len(lines) == 1 else f"{len(lines)} records have"
    if strict:
        where = ", ".join(map(str, lines))
        raise UserError(f"{path}: {records} an empty {name}, at {_plural('line', lines)} {where}.")
    where = ", ".join(map(str, lines[:_SHOWN_LINES]))
    more = f" and {len(lines) - _SHOWN_LINES} more" if len(lines) > _SHOWN_LINES else ""
    left = "is" if len(lines) == 1 else "are"
    warn(f"{path}: {records} an empty {name} and {left} left out, at {_plural('line', lines)} {where}{more}.")


def say_unused(path: Path, unused: Counter[str]) -> None:
    if unused:
        names = ", ".join(f"{name!r} (in {count})" for name, count in unused.items())
        note(f"{path}: these fields of records are not used: {names}.")


def _plural(word: str, items: list[int]) -> str:
    return word if len(items) == 1 else f"{word}s"


def _is_json_object(line: str) -> bool:
    return line.lstrip().startswith("{") and _is_json(line)


def _is_json(text: str) -> bool:
    """Whether a text is one JSON list or object, or begins with one that has lines of its own."""
    start = _skip_space(text, 0)
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list | dict) and (not text[end:].strip() or "\n" in text[start:end])
