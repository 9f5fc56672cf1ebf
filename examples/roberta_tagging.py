"""Token tagging with a RoBERTa and zero-init prompts, in about two minutes without downloads.

    python examples/roberta_tagging.py [--quick]

The example makes sentences ("it was the old fox that the dog chased and ..."), trains a small RoBERTa to fill in masked
words, and freezes it. The task: tag who does it and who it is done to, in the active, the passive, and sentences that
put either in front. A linear head learns it alone; then prompts are added, and both go on. Settings are those that do
best on a validation split.
"""

from __future__ import annotations

import copy
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import best, fit, head_group, is_quick, show, trained_numbers
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForTokenClassification

from zinit_kernels.console import run
from zinit_kernels.integrations.transformers import add_zero_init_attention, parameter_groups

ANIMALS = ("dog", "cat", "bird", "horse", "fox", "wolf", "cow", "goat", "mouse", "bear")
VERBS = ("chased", "saw", "liked", "bit", "fed", "followed")
ADJECTIVES, LINKS = ("big", "small", "old", "young"), ("and", "while", "because")
WORDS = ("the", "it", "was", "by", "that", *ANIMALS, *VERBS, *ADJECTIVES, *LINKS)
START, PAD, END, MASK, FIRST_WORD = range(5)
TOKEN = {word: FIRST_WORD + place for place, word in enumerate(WORDS)}
OTHER, DOES, UNDERGOES, PADDING = 0, 1, 2, -100  # tags; the loss skips padding
LENGTH, LAYERS, PROMPTS = 24, 4, 10
Tagged = list[tuple[str, int]]


def plain(words: str) -> Tagged:
    return [(word, OTHER) for word in words.split()]


def phrase(rng: random.Random, noun: str, tag: int) -> Tagged:
    adjective = rng.choice(ADJECTIVES) if rng.random() < 0.4 else ""
    return [*plain(f"the {adjective}"), (noun, tag)]


def clause(rng: random.Random) -> Tagged:
    one, other = rng.sample(ANIMALS, 2)
    does, undergoes, verb = phrase(rng, one, DOES), phrase(rng, other, UNDERGOES), plain(rng.choice(VERBS))
    return rng.choice(
        [
            [*does, *verb, *undergoes],
            [*undergoes, *plain("was"), *verb, *plain("by"), *does],
            [*plain("it was"), *undergoes, *plain("that"), *does, *verb],
            [*plain("it was"), *does, *plain("that"), *verb, *undergoes],
        ]
    )


def sentence(rng: random.Random) -> Tagged:
    if rng.random() < 0.4:
        return clause(rng)
    return [*clause(rng), *plain(rng.choice(LINKS)), *clause(rng)]


class Text(NamedTuple):
    """Right-padded sentences, each [N, LENGTH]."""

    ids: Tensor
    tags: Tensor

    def inputs(self, rows: Tensor | slice = slice(None)) -> dict[str, Tensor]:
        return {"input_ids": self.ids[rows], "attention_mask": (self.ids[rows] != PAD).long()}


def written(count: int, seed: int) -> Text:
    rng = random.Random(seed)
    ids, tags = torch.full((count, LENGTH), PAD), torch.full((count, LENGTH), PADDING)
    for row in range(count):
        words = sentence(rng)
        tokens = [START, *(TOKEN[word] for word, _ in words), END]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        tags[row, 1 : len(tokens) - 1] = torch.tensor([tag for _, tag in words])
    return Text(ids, tags)


def learn_to_fill_in(model: nn.Module, text: Text, steps: int) -> None:
    """Masked language modelling: 15 % of the words are hidden."""
    draw = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        rows = torch.randint(len(text.ids), (64,), generator=draw)
        inputs, words = text.inputs(rows), text.ids[rows]
        hidden = (torch.rand(words.shape, generator=draw) < 0.15) & (words >= FIRST_WORD)
        logits = model(**inputs | {"input_ids": words.masked_fill(hidden, MASK)}).logits
        return F.cross_entropy(logits[hidden], words[hidden])

    fit([{"params": list(model.parameters()), "lr": 2e-3}], loss, steps)


def learn_to_tag(model: nn.Module, groups: list[dict], text: Text, steps: int) -> nn.Module:
    draw = torch.Generator().manual_seed(1)

    def loss() -> Tensor:
        rows = torch.randint(len(text.ids), (32,), generator=draw)
        return F.cross_entropy(model(**text.inputs(rows)).logits.flatten(0, 1), text.tags[rows].flatten())

    fit(groups, loss, steps)
    return model


@torch.no_grad()
def scores(model: nn.Module, text: Text) -> tuple[float, float]:
    """Shares of the nouns with the right tag, and of the sentences whose every word has it."""
    right = model(**text.inputs()).logits.argmax(-1) == text.tags
    nouns = text.tags > OTHER
    return float(right[nouns].float().mean()), float((right | (text.tags == PADDING)).all(-1).float().mean())


def main() -> None:
    quick = is_quick(__doc__)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=FIRST_WORD + len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=PAD + 1 + LENGTH, pad_token_id=PAD, bos_token_id=START,
        eos_token_id=END, type_vocab_size=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_labels=3,
    )  # fmt: skip
    print("training a base to fill in masked words ...", flush=True)
    filler = RobertaForMaskedLM(config)
    learn_to_fill_in(filler, written(20_000, seed=0), 250 if quick else 700)
    base = RobertaForTokenClassification(config).requires_grad_(False)
    base.roberta.load_state_dict(filler.roberta.state_dict())
    base.eval()

    training, validation, test = written(500, seed=1), written(500, seed=2), written(1000, seed=3)
    steps, settings = (150, 1) if quick else (400, 3)
    print("a linear head ...", flush=True)
    heads = []
    for rate in [1e-1, 3e-2, 3e-1][:settings]:
        head = copy.deepcopy(base)
        heads.append(learn_to_tag(head, [head_group(head, rate)], training, 2 * steps))
    frozen = best(heads, lambda model: scores(model, validation)[0])

    print("zero-init prompts beside it ...", flush=True)
    with torch.no_grad():
        expected = frozen(**test.inputs()).logits
    tagged = []
    for rate in [1e-1, 3e-2, 1e-2][:settings]:
        torch.manual_seed(0)
        model = add_zero_init_attention(copy.deepcopy(frozen), PROMPTS, LAYERS)
        with torch.no_grad():
            assert torch.equal(model(**test.inputs()).logits, expected), "step 0 is the frozen model's"
        groups = [*parameter_groups(model, rate, gate_learning_rate=0.1), head_group(model, 3e-3)]
        tagged.append(learn_to_tag(model, groups, training, steps))
    adapted = best(tagged, lambda model: scores(model, validation)[0])

    rows = [
        [name, trained_numbers(model), *scores(model, test)]
        for name, model in {"linear head": frozen, "zero-init prompts and head": adapted}.items()
    ]
    show(
        "Who does it, and who it is done to", ["", "trained numbers", "nouns right", "sentences right"], rows
    )
    assert rows[1][2] > rows[0][2] + 0.05, "zero-init prompts learned nothing"


if __name__ == "__main__":
    run(main)
