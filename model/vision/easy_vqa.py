"""easy-VQA (package easy-vqa, MIT): 64 x 64 pictures of one coloured shape, and published questions about them.

    data = read_split(folder, "train")

A picture's colour and shape follow from its questions and answers alone. Half of the yes/no answers are told by the
words of the question, so a balanced choice has as many yes as no for each question text: not looking then gives 50 %.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from zinit_kernels.checkpoints.json_files import parse_json

from ..errors import UserError
from ..records import read_text

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS = ("yes/no", "shape", "colour")
_NEGATIONS = {"no", "not"}


class Question(NamedTuple):
    """One published question."""

    text: str
    answer: str
    image: str  # the file

    @property
    def kind(self) -> str:
        """What the answer is: one of KINDS."""
        if self.answer in ("yes", "no"):
            return "yes/no"
        return "shape" if self.answer in SHAPES else "colour"


def read_split(folder: Path, split: str) -> list[Question]:
    """The questions of data/train or data/test in the package's folder, in order."""
    path = folder / "data" / split / "questions.json"
    questions = []
    for entry in parse_json(read_text(path), path):
        if not isinstance(entry, list) or len(entry) != 3:
            raise UserError(
                f"{path} is not easy-VQA's: an entry is not a question, an answer and an image's number."
            )
        text, answer, image = entry
        questions.append(Question(text, answer, str(folder / "data" / split / "images" / f"{image}.png")))
    return questions


def descriptions(questions: Iterable[Question]) -> dict[str, str]:
    """Of each image, "COLOUR SHAPE", where its questions and their answers tell both."""
    colours: dict[str, str] = {}
    shapes: dict[str, str] = {}
    for question in questions:
        words = set(question.text.strip("?").split())
        if question.kind == "yes/no":
            is_there = (question.answer == "yes") != bool(words & _NEGATIONS)
            told = words if is_there else set()
        else:  # "what color is the rectangle?" tells the shape too
            told = words | {question.answer}
        for names, known in ((COLOURS, colours), (SHAPES, shapes)):
            for name in told.intersection(names):
                known[question.image] = name
    return {image: f"{colours[image]} {shapes[image]}" for image in colours if image in shapes}


def spoken(question: Question, description: str) -> str:
    """What to say before the answer, and the answer: "blue circle, not red, no" to "is there a red shape?".

    Whether the asked thing is there does not depend on how it was asked ("is no red shape present?"). Said first, it
    leaves one step to the answer.
    """
    things = [word for word in question.text.strip("?").split() if word in (*SHAPES, *COLOURS)]
    if question.kind != "yes/no" or len(things) != 1:
        return f"{description}, {question.answer}"
    seen = things[0] if things[0] in description.split() else f"not {things[0]}"
    return f"{description}, {seen}, {question.answer}"


def balanced(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """`count` questions: three quarters yes/no, as often yes as no for each question text, the others as they come."""
    random = Random(f"balanced {seed}")
    by_text: dict[str, dict[str, list[Question]]] = defaultdict(lambda: {"yes": [], "no": []})
    others = []
    for question in questions:
        if question.kind == "yes/no":
            by_text[question.text][question.answer].append(question)
        else:
            others.append(question)
    texts = sorted(text for text, found in by_text.items() if found["yes"] and found["no"])
    chosen = []
    for place in range(count):
        if place % 4 == 3 and others:
            chosen.append(random.choice(others))
        else:
            text, answer = random.choice(texts), random.choice(("yes", "no"))
            chosen.append(random.choice(by_text[text][answer]))
    return chosen


def balanced_test(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """Up to `count` questions without repetition: half of them yes/no, with as many yes as no for each text, and a
    quarter each of shapes and colours.
    """
    random = Random(f"test {seed}")
    shuffled = random.sample(list(questions), len(questions))
    waiting: dict[tuple[str, str], list[Question]] = defaultdict(list)
    pairs: list[tuple[Question, Question]] = []
    for question in shuffled:
        if question.kind == "yes/no":
            other = waiting[question.text, "no" if question.answer == "yes" else "yes"]
            if other:
                pairs.append((question, other.pop()))
            else:
                waiting[question.text, question.answer].append(question)
    chosen = [question for pair in pairs[: count // 4] for question in pair]
    for kind in KINDS[1:]:
        chosen += [question for question in shuffled if question.kind == kind][: count // 4]
    return chosen


def without_looking(questions: Sequence[Question], all_questions: Sequence[Question]) -> dict[str, float]:
    """By kind, the share of `questions` that the most frequent answer to each text, in all_questions, gets right.

    Of yes/no, whose answers are balanced in `questions`, that is 50 %.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in all_questions:
        answers[question.text][question.answer] += 1
    likeliest = {text: counts.most_common(1)[0][0] for text, counts in answers.items()}
    return accuracy(questions, [likeliest[question.text] for question in questions])


def accuracy(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """By kind, the share of exactly right answers."""
    right, asked = Counter(), Counter()
    for question, answer in zip(questions, answers, strict=True):
        asked[question.kind] += 1
        right[question.kind] += answer == question.answer
    return {kind: right[kind] / asked[kind] for kind in KINDS if asked[kind]}
