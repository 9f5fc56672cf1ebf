"""Named entities and semantic roles: a tag for every word, micro-F1 of the spans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from ..scorers import spans
from ..shared import UserError
from .checkpoint import call, load_model, load_tokenizer
from .protocol import Task
from .token_files import Sentence, read_splits, tags_of

IGNORED = -100
_EVALUATED_AT_ONCE = 64


class Tagging(Task):
    """A model with a classifier for each token; the tag of a word is that of its first sub-token.

    Args:
        roles: the sentences have predicates, which are shown behind them. max_length: in tokens; words beyond it are
            tagged O.
    """

    score = "F1"

    def __init__(self, base: Path, folder: Path, roles: bool, max_length: int):
        self.base, self.max_length = base, max_length
        self.splits = read_splits(folder, roles)
        self.title = "Semantic roles" if roles else "Named entities"
        self.figures = [
            f"{name} F1" if len(self.splits.tests) > 1 else "test F1" for name in self.splits.tests
        ]
        self.tags = tags_of(self.splits.train)
        self.tokenizer = load_tokenizer(base, add_prefix_space=True)
        self.examples = [self._encode(sentence) for sentence in self.splits.train]

    def make(self, seed: int) -> Any:
        auto = transformers.AutoModelForTokenClassification
        return load_model(auto, self.base, num_labels=len(self.tags))

    def count(self, refit: bool) -> int:
        return len(self.examples)

    def loss(self, model: Any, rows: Tensor, refit: bool) -> Tensor:
        chosen = [self.examples[row] for row in rows.tolist()]
        logits = call(
            model, self._batch([ids for ids, _, _ in chosen], [kinds for _, kinds, _ in chosen])
        ).logits
        labels = torch.full(logits.shape[:2], IGNORED)
        for row, (_, _, places) in enumerate(chosen):
            for place, tag in places.items():
                labels[row, place] = tag
        targets = labels.flatten().to(logits.device)
        return F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED)

    def validate(self, model: Any) -> float:
        return self._f1(model, self.splits.validation)

    def test(self, model: Any) -> dict[str, float]:
        return {
            figure: self._f1(model, sentences)
            for figure, sentences in zip(self.figures, self.splits.tests.values(), strict=True)
        }

    def _f1(self, model: Any, sentences: Sequence[Sentence]) -> float:
        truths = [sentence.tags for sentence in sentences]
        return 100 * spans.score(truths, self.predict(model, sentences)).f1

    def predict(self, model: Any, sentences: Sequence[Sentence]) -> list[list[str]]:
        """A tag for every word of every sentence."""
        found = [["O"] * len(sentence.words) for sentence in sentences]
        order = sorted(range(len(sentences)), key=lambda place: len(sentences[place].words))
        for first in range(0, len(order), _EVALUATED_AT_ONCE):
            chosen = order[first : first + _EVALUATED_AT_ONCE]
            encoded = [self._tokens(sentences[place]) for place in chosen]
            logits = call(model, self._batch([e.ids for e in encoded], [e.type_ids for e in encoded])).logits
            tags = logits.argmax(-1).tolist()
            for row, place in enumerate(chosen):
                for token, word in _first_tokens(encoded[row]):
                    found[place][word] = self.tags[tags[row][token]]
        return found

    def _tokens(self, sentence: Sentence) -> Any:
        words = list(sentence.words)
        second = [] if sentence.predicate is None else [[words[sentence.predicate]]]
        return self.tokenizer(
            words, *second, is_split_into_words=True, truncation="only_first" if second else True,
            max_length=self.max_length, return_token_type_ids=True,
        )[0]  # fmt: skip

    def _encode(self, sentence: Sentence) -> tuple[list[int], list[int], dict[int, int]]:
        """(token ids, type ids, token place -> tag number)."""
        encoded = self._tokens(sentence)
        places = {token: self.tags.index(sentence.tags[word]) for token, word in _first_tokens(encoded)}
        if not places:
            raise UserError(
                f"the sentence {' '.join(sentence.words)[:60]!r} has no token within --max-length."
            )
        return encoded.ids, encoded.type_ids, places

    def _batch(self, ids: Sequence[list[int]], kinds: Sequence[list[int]]) -> dict[str, Tensor]:
        """Right-padded inputs."""
        longest = max(map(len, ids))
        pad = self.tokenizer.pad_token_id or 0
        inputs = {
            "input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in ids]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
        }
        if "token_type_ids" in self.tokenizer.model_input_names:
            inputs["token_type_ids"] = torch.tensor([row + [0] * (longest - len(row)) for row in kinds])
        return inputs


def _first_tokens(encoded: Any) -> list[tuple[int, int]]:
    """(token place, word place) of the first token of every word of the sentence."""
    found, before = [], None
    for place, (word, sequence) in enumerate(zip(encoded.word_ids, encoded.sequence_ids, strict=True)):
        if sequence == 0 and word is not None and word != before:
            found.append((place, word))
        before = word if sequence == 0 else None
    return found
