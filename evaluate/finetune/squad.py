"""The command squad: answers as spans of a paragraph, exact match and F1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from ..question import Quoted
from ..scorers import squad
from ..shared import UserError
from .checkpoint import call, load_model, load_tokenizer
from .command import Defaults, command, digest_of, finish, parser_of, plan_of, run_of
from .protocol import Task
from .squad_files import LAYOUT, Question, files_of, read_splits, truths_of

METHODS = ("head", "bias", "one-softmax", "random-gates", "lora", "zero-init")
_EVALUATED_AT_ONCE, _BEST = 32, 20
_SOURCE = "arXiv 2303.16199v3, RoBERTa-large"
QUOTED = {
    False: (
        Quoted("full fine-tuning", _SOURCE, {"EM": 88.9, "F1": 94.6}),
        Quoted("P-tuning v2", _SOURCE, {"EM": 88.5, "F1": 94.4}),
        Quoted("zero-init attention", _SOURCE, {"EM": 88.8, "F1": 94.6}),
    ),
    True: (
        Quoted("full fine-tuning", _SOURCE, {"EM": 86.5, "F1": 89.4}),
        Quoted("P-tuning v2", _SOURCE, {"EM": 82.1, "F1": 85.5}),
        Quoted("zero-init attention", _SOURCE, {"EM": 83.9, "F1": 87.2}),
    ),
}


class Answering(Task):
    """A model with a start and an end score for each token.

    Long paragraphs are cut into windows that overlap by `stride` tokens; a window without the answer points at its
    first token. The answer of a question is the best span over all its windows; of SQuAD 2.0, none where the first
    token scores higher.
    """

    score = "F1"
    figures = ("EM", "F1")

    def __init__(self, base: Path, folder: Path, max_length: int, stride: int, longest_answer: int):
        self.base, self.max_length, self.stride, self.longest_answer = (
            base,
            max_length,
            stride,
            longest_answer,
        )
        self.splits = read_splits(folder)
        self.with_unanswerable = any(
            not question.answers for questions in self.splits for question in questions
        )
        self.title = "SQuAD 2.0" if self.with_unanswerable else "SQuAD 1.1"
        self.tokenizer = load_tokenizer(base)
        self.tokenizer.padding_side = "right"
        self.examples = [
            (window, _place(window, question))
            for question in self.splits.train
            for window in self._windows(question)
        ]

    def make(self, seed: int) -> Any:
        return load_model(transformers.AutoModelForQuestionAnswering, self.base)

    def count(self, refit: bool) -> int:
        return len(self.examples)

    def loss(self, model: Any, rows: Tensor, refit: bool) -> Tensor:
        chosen = [self.examples[row] for row in rows.tolist()]
        found = call(model, self._batch([window for window, _ in chosen]))
        starts, ends = torch.tensor([place for _, place in chosen], device=found.start_logits.device).unbind(
            1
        )
        return (F.cross_entropy(found.start_logits, starts) + F.cross_entropy(found.end_logits, ends)) / 2

    def validate(self, model: Any) -> float:
        return self._scores(model, self.splits.validation).f1

    def test(self, model: Any) -> dict[str, float]:
        found = self._scores(model, self.splits.test)
        return {"EM": found.exact, "F1": found.f1}

    def _scores(self, model: Any, questions: Sequence[Question]) -> squad.Score:
        return squad.score(self.predict(model, questions), truths_of(questions))

    def predict(self, model: Any, questions: Sequence[Question]) -> dict[str, str]:
        """id -> text of every question."""
        windows = [(question, window) for question in questions for window in self._windows(question)]
        windows.sort(key=lambda pair: len(pair[1].ids))
        best: dict[str, tuple[float, str]] = {question.id: (float("-inf"), "") for question in questions}
        none: dict[str, float] = {question.id: float("inf") for question in questions}
        for first in range(0, len(windows), _EVALUATED_AT_ONCE):
            chosen = windows[first : first + _EVALUATED_AT_ONCE]
            found = call(model, self._batch([window for _, window in chosen]))
            for (question, window), starts, ends in zip(
                chosen, found.start_logits.cpu(), found.end_logits.cpu(), strict=True
            ):
                none[question.id] = min(none[question.id], float(starts[0] + ends[0]))
                best[question.id] = max(best[question.id], self._best_span(question, window, starts, ends))
        if not self.with_unanswerable:
            return {key: text for key, (_, text) in best.items()}
        return {key: "" if none[key] > score else text for key, (score, text) in best.items()}

    def _best_span(self, question: Question, window: Any, starts: Tensor, ends: Tensor) -> tuple[float, str]:
        places = [place for place, sequence in enumerate(window.sequence_ids) if sequence == 1]
        first, last = places[0], places[-1] + 1
        best_starts = (first + starts[first:last].argsort(descending=True)[:_BEST]).tolist()
        best_ends = (first + ends[first:last].argsort(descending=True)[:_BEST]).tolist()
        spans = [
            (float(starts[start] + ends[end]), start, end)
            for start in best_starts
            for end in best_ends
            if start <= end < start + self.longest_answer
        ]
        if not spans:
            return float("-inf"), ""
        score, start, end = max(spans)
        return score, question.context[window.offsets[start][0] : window.offsets[end][1]]

    def _windows(self, question: Question) -> list[Any]:
        encoded = self.tokenizer(
            question.text.strip(), question.context, truncation="only_second", max_length=self.max_length,
            stride=self.stride, return_overflowing_tokens=True, return_token_type_ids=True,
        )  # fmt: skip
        windows = [window for window in encoded.encodings if 1 in window.sequence_ids]
        if not windows:
            raise UserError(f"question {question.id} leaves no room for its paragraph: raise --max-length.")
        return windows

    def _batch(self, windows: Sequence[Any]) -> dict[str, Tensor]:
        longest = max(len(window.ids) for window in windows)
        pad = self.tokenizer.pad_token_id or 0
        lengths = [longest - len(window.ids) for window in windows]
        inputs = {
            "input_ids": torch.tensor([w.ids + [pad] * n for w, n in zip(windows, lengths, strict=True)]),
            "attention_mask": torch.tensor(
                [[1] * len(w.ids) + [0] * n for w, n in zip(windows, lengths, strict=True)]
            ),
        }
        if "token_type_ids" in self.tokenizer.model_input_names:
            kinds = [w.type_ids + [0] * n for w, n in zip(windows, lengths, strict=True)]
            inputs["token_type_ids"] = torch.tensor(kinds)
        return inputs


def _place(window: Any, question: Question) -> tuple[int, int]:
    """The first and last token of the first answer; (0, 0) where the window does not hold it."""
    if not question.answers:
        return 0, 0
    text, begin = question.answers[0]
    end = begin + len(text)
    inside = [
        place
        for place, (sequence, (a, b)) in enumerate(zip(window.sequence_ids, window.offsets, strict=True))
        if sequence == 1 and a < end and b > begin
    ]
    if not inside or window.offsets[inside[0]][0] > begin or window.offsets[inside[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]


@command
def main(arguments: list[str]) -> None:
    """`python -m evaluate squad`."""
    parser = parser_of(
        "squad", "Questions about a paragraph, exact match and F1", LAYOUT, Defaults(METHODS, 1000, 16)
    )
    parser.add_argument("--max-length", type=int, default=384, help="tokens of a window (default: 384)")
    parser.add_argument("--stride", type=int, default=128, help="tokens that windows share (default: 128)")
    parser.add_argument("--longest-answer", type=int, default=30, help="in tokens (default: 30)")
    options = parser.parse_args(arguments)
    plan = plan_of(options)
    if (
        options.max_length < 32
        or not 0 <= options.stride < options.max_length // 2
        or options.longest_answer < 1
    ):
        raise UserError(
            "--max-length must be at least 32, --stride less than half of it, and --longest-answer at least 1, got "
            f"{options.max_length}, {options.stride} and {options.longest_answer}."
        )
    more = {name: getattr(options, name) for name in ("max_length", "stride", "longest_answer")}
    run = run_of("squad", options, plan, digest_of(files_of(options.data).values()), more)
    task = Answering(options.base, options.data, options.max_length, options.stride, options.longest_answer)
    finish(task, plan, options, run, QUOTED[task.with_unanswerable])
