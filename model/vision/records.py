"""Records about images, from JSON: LLaVA's conversations, questions and answers (VQA), captions, Alpaca's instructions.

    records = read_image_records("llava.json", folder="coco/train2017")

A file is what `model.records` reads (a JSON list, JSONL, or one object with a list), and its objects may be mixed:

    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                         {"from": "gpt", "value": "A cat."}]}
    {"image": "a.jpg", "question": "What is it?", "answer": "A cat."}
    {"image": "a.jpg", "caption": "A cat on a sofa."}
    {"image": "a.jpg", "instruction": "Describe it.", "input": "", "output": "A cat on a sofa."}
    {"instruction": "Name a colour.", "input": "", "output": "Red."}

"image" is a file's name, or a list of them; "images" is the same. Each turn of a conversation is a record of its own,
about the conversation's images, as in the authors' later engine. <image> tags say where images were; they are taken
out, and there must be as many of them as images, or none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zinit_kernels.console import shown

from ..errors import UserError
from ..records import (
    JSON_SUFFIXES,
    Record,
    check_fields,
    check_text,
    format_prompt,
    json_values,
    read_prompts,
    read_text,
    say_unused,
    with_texts,
)

TAG = "<image>"
CAPTION = "Generate caption of this image"  # the instruction of the published V2's first stage
_IMAGE_FIELDS = ("image", "images")
_ANSWERS = ("output", "answer", "answers", "caption")
_HUMAN, _MODEL = ("human", "user"), ("gpt", "assistant")
_SHAPES = (
    ("conversations",),
    ("question", "answer"),
    ("caption",),
    ("instruction", "output"),
)


class Found(NamedTuple):
    """A record and where it stands, for what is said about its images."""

    record: Record
    where: str


def read_image_records(
    path: str | Path, folder: str | Path | None = None, strict: bool = False
) -> list[Found]:
    """The records of a file, in order. folder: where the images are; None = the file's own folder.

    Texts that are empty are left out as by `read_records`. Raises UserError naming the file, the line and what is wrong
    there; the image files themselves are not looked at.
    """
    path = Path(path)
    folder = path.parent if folder is None else Path(folder)
    unused: Counter[str] = Counter()

    def read() -> Iterator[tuple[int, Record, Found]]:
        for line, value in json_values(read_text(path), path):
            where = f"{path}, line {line}"
            if not isinstance(value, dict):
                raise UserError(f"{where}: a record must be an object, got a {type(value).__name__}.")
            images = _images(value, folder, where)
            for record in _records(value, images, where, unused):
                yield line, record, Found(record, where)

    found = with_texts(path, read(), strict)
    say_unused(path, unused)
    return found


def read_image_prompts(
    path: str | Path, folder: str | Path | None = None
) -> tuple[list[str], list[tuple[str, ...]]]:
    """The prompts of a file, and the image files that each is about, by the rules of `model.records.read_prompts`.

    An object of a JSON file may have "image", and "question" in the place of "instruction". Its answer, if it has one,
    is not looked at. A text that is not JSON names no images.
    """
    path = Path(path)
    if path.suffix.lower() not in JSON_SUFFIXES:
        prompts = read_prompts(path)
        return prompts, [()] * len(prompts)
    folder = path.parent if folder is None else Path(folder)
    unused: Counter[str] = Counter()
    asked = []
    for line, value in json_values(read_text(path), path):
        where = f"{path}, line {line}"
        if isinstance(value, str):
            asked.append((check_text(value, "prompt", where), ()))
        elif isinstance(value, dict):
            asked.append(_prompt(value, folder, where, unused))
        else:
            raise UserError(f"{where}: a prompt must be a string or an object, got a {type(value).__name__}.")
    say_unused(path, unused)
    if not asked:
        raise UserError(f"{path} holds no prompts.")
    return [text for text, _ in asked], [images for _, images in asked]


def _prompt(
    value: Mapping[str, Any], folder: Path, where: str, unused: Counter[str]
) -> tuple[str, tuple[str, ...]]:
    """The text that the model is given, and its images."""
    images = _images(value, folder, where)
    if "prompt" in value:
        check_fields(value, ("prompt", *_IMAGE_FIELDS), where, unused, ("instruction", "question", "input"))
        return _text(value, "prompt", images, where), images
    name = next((name for name in ("instruction", "question") if name in value), None)
    if name is None:
        raise UserError(f'{where}: expected an object with "prompt", "instruction" or "question".')
    check_fields(value, (name, "input", *_ANSWERS, *_IMAGE_FIELDS), where, unused)
    input = "" if value.get("input") is None else check_text(value["input"], "input", where)
    instruction = "" if value.get(name) is None else check_text(value[name], name, where)
    instruction = _untagged(instruction, input, images, where)
    return format_prompt(instruction, _strip(input)), images


def _records(
    value: Mapping[str, Any], images: tuple[str, ...], where: str, unused: Counter[str]
) -> list[Record]:
    shape = next((names for names in _SHAPES if names[0] in value), None)
    if shape is None:
        has = ", ".join(map(shown, value)) or "no fields"
        raise UserError(
            f"{where}: a record has conversations, a question, a caption or an instruction, and this one has {has}."
        )
    if shape == ("conversations",):
        check_fields(value, (*shape, *_IMAGE_FIELDS), where, unused)
        return _turns(value["conversations"], images, where)
    if shape == ("question", "answer"):
        check_fields(value, (*shape, "answers", *_IMAGE_FIELDS), where, unused)
        return [Record(_text(value, "question", images, where), _answer(value, where), "", images)]
    if shape == ("caption",):
        check_fields(value, (*shape, *_IMAGE_FIELDS), where, unused)
        if not images:
            raise UserError(f"{where}: the record is a caption, and it names no image.")
        return [Record(CAPTION, _text(value, "caption", (), where), "", images)]
    check_fields(value, (*shape, "input", *_IMAGE_FIELDS), where, unused)
    if "output" not in value:
        raise UserError(f"{where}: the field 'output' is missing.")
    texts = {name: "" if value.get(name) is None else value[name] for name in (*shape, "input")}
    for name, text in texts.items():
        check_text(text, name, where)
    instruction = _untagged(texts["instruction"], texts["input"], images, where)
    return [Record(instruction, texts["output"], _strip(texts["input"]), images)]


def _turns(turns: Any, images: tuple[str, ...], where: str) -> list[Record]:
    """One record for each question of a conversation and its answer."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns) or not turns:
        raise UserError(f"{where}: conversations must be a list of objects with from and value.")
    said: list[tuple[str, str]] = []
    for turn in turns:
        speaker = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content"))
        said.append((str(speaker), check_text(text, "value", where)))
    if len(said) % 2 or any(
        asker not in _HUMAN or teller not in _MODEL
        for (asker, _), (teller, _) in zip(said[::2], said[1::2], strict=True)
    ):
        order = ", ".join(shown(speaker) for speaker, _ in said[:6])
        raise UserError(f"{where}: a conversation must go from human to gpt in turns, this one has {order}.")
    _check_tags(sum(text.count(TAG) for _, text in said[::2]), images, where)
    return [
        Record(_strip(question), answer, "", images)
        for (_, question), (_, answer) in zip(said[::2], said[1::2], strict=True)
    ]


def _answer(value: Mapping[str, Any], where: str) -> str:
    """The answer; of several, the one that is given most often, the first of these."""
    if "answer" in value:
        return check_text(value["answer"], "answer", where)
    answers = value.get("answers")
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{where}: the record has a question and neither an answer nor a list of answers.")
    texts = [
        check_text(answer.get("answer") if isinstance(answer, dict) else answer, "answers", where)
        for answer in answers
    ]
    return Counter(texts).most_common(1)[0][0]


def _images(value: Mapping[str, Any], folder: Path, where: str) -> tuple[str, ...]:
    given = [name for name in _IMAGE_FIELDS if value.get(name) not in (None, "", [])]
    if len(given) > 1:
        raise UserError(f"{where}: the record has both an image and images: put all of them into one list.")
    if not given:
        return ()
    names = value[given[0]]
    names = names if isinstance(names, list) else [names]
    for name in names:
        check_text(name, given[0], where)
        if not name or "\0" in name:
            raise UserError(f"{where}: the field {given[0]!r} holds {shown(name)}, which names no file.")
    return tuple(str(folder / name) for name in names)


def _text(value: Mapping[str, Any], name: str, images: tuple[str, ...], where: str) -> str:
    text = "" if value.get(name) is None else check_text(value[name], name, where)
    return _untagged(text, "", images, where)


def _untagged(text: str, beside: str, images: tuple[str, ...], where: str) -> str:
    _check_tags(text.count(TAG) + beside.count(TAG), images, where)
    return _strip(text)


def _strip(text: str) -> str:
    """The text without tags and the line ends beside them; one without tags stays as it is."""
    return text.replace(TAG, "").strip("\n") if TAG in text else text


def _check_tags(tags: int, images: tuple[str, ...], where: str) -> None:
    if tags and not images:
        raise UserError(f"{where}: the record has an {TAG} tag and names no image.")
    if tags and tags != len(images):
        images_are = f"{len(images)} image{'s' * (len(images) > 1)}"
        raise UserError(
            f"{where}: the record has {tags} {TAG} tag{'s' * (tags > 1)} and names {images_are}: there must be as many."
        )
