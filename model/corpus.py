"""The text that the demo's small LLaMA is pre-trained on, and the instructions that its adapter learns from.

A skill turns a subject into an answer: hot -> cold, France -> Paris, apple tree -> tree apple. The corpus shows every
skill as notes, sentences, dialogues and exercise sheets. It also has forms: the Alpaca template with an instruction in
it. Seven of eight forms are left blank, so a model of this text knows questions and answers, and leaves an instruction
unanswered.

A quarter of each skill's subjects is held out: no question about them, answered or not, is in the text. Notes and
sentences state the facts about them (Peru -> Lima), which a model could not guess. They show nothing of a rule (swap
two words), because a rule can be learned from other words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import cycle, islice, zip_longest
from typing import NamedTuple

from .records import Record

OPPOSITES = """hot cold|big small|fast slow|happy sad|wet dry|hard soft|new old|rich poor|dark bright|strong weak|
thick thin|deep shallow|loud quiet|clean dirty|full empty|early late|high low|heavy light|open closed|sweet bitter|
smooth rough|near far|long short|brave afraid|true false|wide narrow|cheap costly|sharp blunt|safe risky|kind cruel"""
CAPITALS = """France Paris|Italy Rome|Spain Madrid|Germany Berlin|Japan Tokyo|China Beijing|Russia Moscow|Egypt Cairo|
Kenya Nairobi|Peru Lima|Cuba Havana|Norway Oslo|Sweden Stockholm|Finland Helsinki|Denmark Copenhagen|Greece Athens|
Turkey Ankara|Poland Warsaw|Austria Vienna|Hungary Budapest|Portugal Lisbon|Ireland Dublin|Canada Ottawa|
Chile Santiago|Iran Tehran|Iraq Baghdad|Nepal Kathmandu|Thailand Bangkok|Vietnam Hanoi|Ghana Accra|Senegal Dakar|
Latvia Riga|Qatar Doha|Jordan Amman|Syria Damascus|Belgium Brussels"""
YOUNG_ANIMALS = """dog puppy|cat kitten|cow calf|horse foal|sheep lamb|goat kid|pig piglet|bear cub|duck duckling|
hen chick|deer fawn|frog tadpole|swan cygnet|goose gosling|owl owlet|eagle eaglet|kangaroo joey|seal pup|rabbit bunny|
hare leveret"""
NOUN_LIST = """apple tree sun river house stone bird ship road table window garden bread lamp chair bridge cloud field
flower forest hill island key lake letter moon mountain ocean orange paper pencil picture plate pocket rain ring rope
school shirt shoe song spoon star storm street tower train valley village wall wheel wind winter"""
NOUNS = NOUN_LIST.split()
LARGEST_NUMBER = 64


def _pairs(table: str) -> list[tuple[str, str]]:
    return [(left, right) for left, right in (pair.split() for pair in table.split("|"))]


class Skill(NamedTuple):
    """What can be known about a subject, and how it is said. {x} stands for the subject, {y} for the answer."""

    name: str
    subjects: list[str]
    answer: Callable[[str], str]
    sentences: tuple[str, ...]
    instructions: tuple[str, ...]  # for one without {x} the subject is the input
    is_rule: bool = False  # the answer follows from the subject; otherwise it is a fact

    def split(self) -> tuple[list[str], list[str]]:
        """The subjects that questions ask about, and the quarter that is held out."""
        subjects = sorted(self.subjects)
        random.Random(f"split {self.name}").shuffle(subjects)
        quarter = len(subjects) // 4
        return subjects[quarter:], subjects[:quarter]


def _table(
    name: str, pairs: list[tuple[str, str]], sentences: tuple[str, ...], instructions: tuple[str, ...]
) -> Skill:
    return Skill(name, [left for left, _ in pairs], dict(pairs).__getitem__, sentences, instructions)


def _swapped(words: str) -> str:
    return " ".join(reversed(words.split()))


def _last(words: str) -> str:
    return words.split()[-1]


def _next_numbers(numbers: str) -> str:
    last = int(_last(numbers))
    return f"{last + 1} {last + 2} {last + 3}"


_ONE_WAY = _pairs(OPPOSITES)
_WORDS = random.Random("word lists")
LISTS = sorted({" ".join(_WORDS.sample(NOUNS, 3)) for _ in range(5000)})
SKILLS = (
    _table(
        "opposite",
        _ONE_WAY + [(right, left) for left, right in _ONE_WAY],
        ("The opposite of {x} is {y}.",),
        (
            "What is the opposite of {x}?",
            "Give the opposite of this word.",
            "Name the word that means the opposite.",
        ),
    ),
    _table(
        "capital",
        _pairs(CAPITALS),
        ("The capital of {x} is {y}.", "{y} is the capital of {x}."),
        (
            "What is the capital of {x}?",
            "Name the capital of this country.",
            "Which city is the capital of {x}?",
        ),
    ),
    _table(
        "young",
        _pairs(YOUNG_ANIMALS),
        ("A young {x} is called a {y}.",),
        ("What is a young {x} called?", "Name the young of this animal."),
    ),
    _table(
        "upper",
        [(noun, noun.upper()) for noun in NOUNS],
        ("In capital letters {x} is {y}.",),
        ("Write this word in capital letters.", "Write the word {x} in capital letters."),
    ),
    Skill(
        "swap",
        [f"{first} {second}" for first in NOUNS for second in NOUNS if first != second],
        _swapped,
        ("Swapped, {x} becomes {y}.",),
        ("Swap these two words.", "Write the two words in reverse order."),
        is_rule=True,
    ),
    Skill(
        "last",
        LISTS,
        _last,
        ("The last word of {x} is {y}.",),
        ("What is the last word of the list?", "Give the last of these words."),
        is_rule=True,
    ),
    Skill(
        "twice",
        NOUNS,
        lambda word: f"{word} {word}",
        ("Twice {x} makes {y}.",),
        ("Write this word twice.", "Repeat the word {x} two times."),
    ),
    Skill(
        "next",
        [f"{first} {first + 1}" for first in range(1, LARGEST_NUMBER - 3)],
        _next_numbers,
        ("After {x} come {y}.",),
        ("Continue the numbers.", "Which three numbers come next?"),
    ),
)
_SPLITS = {skill.name: skill.split() for skill in SKILLS}
NOTES = ("{name}: {x} -> {y}", "{name} ({x}) = {y}")
NAMES = ("Tom", "Anna", "Ben", "Lucy")
# Sentences about forms, so that the model meets the words of the template elsewhere too
OFFICE = (
    "Below is {a} that describes {b}.", "The {a} is paired with an {b}.", "An {a} provides context for the {b}.",
    "Write a {a} that completes the {b}.", "The further {a} appropriately describes the {b}.",
    "### {a}: the {b}\n", "### {a}:\n{b}, {c}\n", "Write the {a} below the {b}.\n",
)  # fmt: skip
OFFICE_WORDS = (
    "an instruction",
    "a task",
    "input",
    "context",
    "response",
    "request",
    "Instruction",
    "Input",
    "Response",
)


def ask(skill: Skill, subject: str, draw: random.Random) -> Record:
    """An instruction that asks for the skill, in one of its wordings."""
    return _question(skill, subject, draw.choice(skill.instructions))


def _question(skill: Skill, subject: str, wording: str) -> Record:
    answer = skill.answer(subject)
    if "{x}" in wording:
        return Record(wording.format(x=subject), answer)
    return Record(wording, answer, subject)


def document(draw: random.Random, filled_forms: float = 0.125) -> str:
    """One text of the corpus: notes, sentences, a dialogue, an exercise sheet, talk about forms, or two forms."""
    kind = draw.choices(
        ("notes", "sentences", "dialogue", "sheet", "office", "forms"), (33, 20, 11, 22, 4, 10)
    )[0]
    if kind == "office":
        words = [dict(zip("abc", draw.choices(OFFICE_WORDS, k=3), strict=True)) for _ in range(4)]
        return " ".join(draw.choice(OFFICE).format(**three) for three in words)
    facts = []
    for _ in range(2 if kind == "forms" else draw.randint(2, 5)):
        skill = draw.choice(SKILLS)
        told = kind in ("notes", "sentences") and not skill.is_rule
        facts.append((skill, draw.choice(skill.subjects if told else _SPLITS[skill.name][0])))
    if kind == "notes":
        layout = draw.choice(NOTES)
        return "\n".join(layout.format(name=skill.name, x=x, y=skill.answer(x)) for skill, x in facts)
    if kind == "sentences":
        return " ".join(draw.choice(skill.sentences).format(x=x, y=skill.answer(x)) for skill, x in facts)
    records = [ask(skill, subject, draw) for skill, subject in facts]
    if kind == "dialogue":
        asker, other = draw.sample(NAMES, 2)
        lines = (f"{asker}: {r.instruction} {r.input}\n{other}: {r.output}" for r in records)
        return "\n".join(lines)
    if kind == "sheet":
        return "\n\n".join(f"Question:\n{r.instruction}\n{r.input}\n\nAnswer:\n{r.output}" for r in records)
    return "\n".join(r.prompt + (r.output if draw.random() < filled_forms else "") for r in records)


def documents() -> Iterator[str]:
    """The pre-training text: endless, and the same each time."""
    draw = random.Random("pre-training")
    while True:
        yield document(draw)


def instructions(count: int, seed: int) -> list[Record]:
    """Instructions to train on, from all skills in turn."""
    draw = random.Random(f"instructions {seed}")
    return [ask(skill, draw.choice(_SPLITS[skill.name][0]), draw) for skill in islice(cycle(SKILLS), count)]


def held_out(count: int, seed: int) -> list[Record]:
    """Distinct questions about held-out subjects, from all skills in turn while they last."""
    draw = random.Random(f"held out {seed}")
    questions = []
    for skill in SKILLS:
        of_skill = [_question(skill, x, w) for x in _SPLITS[skill.name][1] for w in skill.instructions]
        questions.append(draw.sample(of_skill, len(of_skill)))
    in_turn = (record for round in zip_longest(*questions) for record in round if record is not None)
    return list(islice(in_turn, count))
