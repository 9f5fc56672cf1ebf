"""MME (Fu et al., arXiv 2306.13394): two yes-or-no questions an image, one answered by yes and one by no.

A task's score is accuracy + accuracy+, both in percent. accuracy counts questions, accuracy+ counts images whose two
questions are both right. The rules are those of the benchmark's own scoring tool.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = PERCEPTION + COGNITION


class Row(NamedTuple):
    """One question: its task, its image, the truth ("yes" or "no") and a model's answer."""

    task: str
    image: str
    truth: str
    answer: str


class TaskScore(NamedTuple):
    """Of one task. accuracy and accuracy_plus are in percent; unread is the share of answers that no rule reads."""

    accuracy: float
    accuracy_plus: float
    unread: float

    @property
    def score(self) -> float:
        """0 to 200."""
        return self.accuracy + self.accuracy_plus


class Score(NamedTuple):
    """Of all tasks. perception is at most 2000, cognition at most 800; both add up only the tasks that were asked."""

    tasks: dict[str, TaskScore]
    perception: float
    cognition: float


def reading(answer: str) -> str:
    """ "yes", "no" or "other".

    The lower-cased answer is read as "yes" if its first four characters hold "yes", else as "no" if they hold "no".
    Space before the answer is not counted, since the tool's one-line format cannot hold a line break.
    """
    head = answer.strip().lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def score(rows: Iterable[Row]) -> Score:
    """The scores of each task and of the two groups.

    Raises:
        ValueError: an unknown task, a truth other than yes and no, or an image without exactly two questions in a task.
    """
    images: dict[str, dict[str, list[tuple[bool, str]]]] = {}
    for row in rows:
        if row.task not in TASKS:
            raise ValueError(f"MME has no task {row.task!r}; its tasks are {', '.join(TASKS)}")
        truth = row.truth.strip().lower()
        if truth not in ("yes", "no"):
            raise ValueError(f"{row.task}, {row.image}: the truth must be Yes or No, got {row.truth!r}")
        read = reading(row.answer)
        images.setdefault(row.task, {}).setdefault(row.image, []).append((read == truth, read))
    tasks = {}
    for task in (name for name in TASKS if name in images):
        pairs = images[task]
        for image, answers in pairs.items():
            if len(answers) != 2:
                raise ValueError(f"{task}, {image}: MME asks two questions an image, got {len(answers)}")
        right = [is_right for answers in pairs.values() for is_right, _ in answers]
        both = [all(is_right for is_right, _ in answers) for answers in pairs.values()]
        other = [read == "other" for answers in pairs.values() for _, read in answers]
        tasks[task] = TaskScore(
            100 * sum(right) / len(right), 100 * sum(both) / len(both), sum(other) / len(other)
        )
    perception, cognition = (
        sum(tasks[task].score for task in group if task in tasks) for group in (PERCEPTION, COGNITION)
    )
    return Score(tasks, perception, cognition)
