"""Asks a model every question of a benchmark that has no answer yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from .answers import ANSWERS, AnswerFile, digest
from .question import Answerer, Item, PartlyAnswered
from .shared import held, interruptible, make_directory, messages, progress, refuse_unwritable


class Interrupted(Exception):
    """The user ended the run; the answers so far are kept."""


def batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Items in batches of at most `size`, with those about the same pictures one after the other.

    A picture's questions are split among batches only where they are more than `size`.
    """
    groups: dict[tuple[str, ...], list[Item]] = {}
    for item in items:
        key = tuple(picture.key for picture in item.pictures)
        groups.setdefault(key, []).append(item)
    batch: list[Item] = []
    for group in groups.values():
        pieces = [group[first : first + size] for first in range(0, len(group), size)]
        if not group[0].pictures:
            pieces = [[item] for item in group]  # nothing to share: fill every batch
        for piece in pieces:
            if len(batch) + len(piece) > size:
                yield batch
                batch = []
            batch = [*batch, *piece]
    if batch:
        yield batch


def ask(
    items: Sequence[Item],
    out: Path,
    run: Mapping[str, Any],
    load: Callable[[], Answerer],
    batch_size: int,
    file: str = ANSWERS,
) -> dict[str, str]:
    """The answer of every item, in the file of the run's folder; what is there already is not asked again.

    Args:
        run: what the run is, beside its questions. load: makes the model, and is called only if a question is left.

    Raises:
        Interrupted: at the first Ctrl-C, after the batch that was asked. UserError: the folder is another run's.
    """
    refuse_unwritable(out)
    make_directory(out)
    with held(out), closing(AnswerFile(out / file, {**run, "questions": digest(items)})) as answers:
        left = [item for item in items if item.id not in answers.answers]
        if not left:
            return {item.id: answers.answers[item.id] for item in items}
        model = load()
        model.check(left)
        done = len(items) - len(left)
        with interruptible() as stop, progress(messages(), len(items), done) as show:
            for batch in batches(left, batch_size):
                try:
                    given = model.answer(batch)
                except PartlyAnswered as stopped:
                    answers.add(stopped.answers)
                    raise
                answers.add({item.id: text for item, text in zip(batch, given, strict=True)})
                done += len(batch)
                show(done, "questions")
                if stop.is_set() and done < len(items):
                    raise Interrupted(f"{done} of {len(items)} questions are answered")
        return {item.id: answers.answers[item.id] for item in items}
