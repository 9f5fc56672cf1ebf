"""Makes the demo's base: a LLaMA of two million parameters with a word tokenizer, pre-trained on the corpus.

Pre-training takes 105 seconds on two cores. The result is a folder in Hugging Face's format.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import tokenizers
import torch
from torch import Tensor, nn

from . import corpus, layers, llama, muon
from .config import LlamaConfig
from .llama import Llama
from .loading import save_base
from .muon import Muon
from .run_folder import make_directory, write_file
from .tokenizer import Tokenizer, load_tokenizer

Report = Callable[[int, float], None]  # gets the number of steps done and the loss

WORD = r"\n|#+|->|[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
ROWS, ROW_LENGTH = 8, 128  # tokens of a step
STEPS = 550
SEED = 0


def small_base(cache: Path, steps: int = STEPS, report: Report = lambda done, loss: None) -> Path:
    """The base's folder in the cache. It is made if it is not there, or if a source file that makes it changed."""
    sources = (corpus, layers, llama, muon, sys.modules[__name__])
    recipe = "".join(map(inspect.getsource, sources)) + str(steps)
    directory = cache / f"base-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not directory.is_dir():
        unfinished = make_directory(cache / f"{directory.name}.part")
        write_tokenizer(unfinished)
        save_base(pretrain(load_tokenizer(unfinished), steps, report), unfinished)
        unfinished.rename(directory)
        for old in cache.iterdir():  # of other versions; what is not named so is not ours
            if old != directory and re.fullmatch(r"base-[0-9a-f]{12}(\.part)?", old.name) and old.is_dir():
                shutil.rmtree(old)
    return directory


def write_tokenizer(directory: Path) -> None:
    """Writes tokenizer.json: a token for every word, number and sign of the corpus, whether a space comes before it or
    not."""
    draw = random.Random("vocabulary")
    text = "\n".join(corpus.document(draw) for _ in range(5000))
    text += " ".join(word for skill in corpus.SKILLS for x in skill.subjects for word in (x, skill.answer(x)))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORD), behavior="removed", invert=True)
    words = sorted({word for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )
    write_file(directory / "tokenizer.json", tokenizer.to_str().encode())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_file(directory / "tokenizer_config.json", json.dumps(special).encode())


def pretrain(tokenizer: Tokenizer, steps: int, report: Report) -> Llama:
    """Next-token prediction on `steps` x ROWS x ROW_LENGTH tokens of the corpus."""
    torch.manual_seed(SEED)
    base = Llama(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=192,
            intermediate_size=544,
            num_layers=4,
            num_heads_q=6,
            num_heads_kv=6,
            head_dim=32,
            max_seq_len=512,
        )
    )
    base.initialise(std=base.config.hidden_size**-0.5)
    # As large as what the layers add. After 200 steps 65 % of the notes are right; with the usual 0.02, 13 %.
    nn.init.normal_(base.embed_tokens.weight, std=0.5)
    optimizers = _optimizers(base)
    rows = _rows(tokenizer)
    for step in range(steps):
        share = min(1.0, (step + 1) / 20, (steps - step) / (0.4 * steps))  # rises, stays, falls
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group["initial_lr"]
        tokens = next(rows)
        logits = base(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        base.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        report(step + 1, loss.item())
    return base


def _optimizers(base: Llama) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest. With AdamW alone 8 % are right after 200 steps."""
    matrices = [parameter for parameter in base.layers.parameters() if parameter.dim() == 2]
    theirs = set(matrices)
    others = [parameter for parameter in base.parameters() if parameter not in theirs]
    optimizers = [
        Muon(matrices, lr=0.02),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _rows(tokenizer: Tokenizer) -> Iterator[Tensor]:
    """Endless rows of tokens [ROWS, ROW_LENGTH + 1], from documents one after the other."""
    documents, tokens = corpus.documents(), []
    size = ROWS * (ROW_LENGTH + 1)
    while True:
        while len(tokens) < size:
            tokens += tokenizer.encode(next(documents), eos=True)
        yield torch.tensor(tokens[:size]).view(ROWS, -1)
        tokens = tokens[size:]
