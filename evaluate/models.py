"""The model that answers: a LLaMA with an adapter, as `zinit generate` runs it, with or without a visual part."""

from __future__ import annotations

import hashlib
import os
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .question import Item, Picture
from .shared import (
    DTYPES,
    Llama,
    LlamaAdapter,
    Tokenizer,
    UserError,
    VisualAdapter,
    about_images,
    format_prompt,
    generate,
    load_base,
    load_tokenizer,
    open_adapter,
    open_device,
    open_source,
    writing,
)

QUESTION = "{question}"
BRIEF = "using a single word or phrase"  # what the authors' MME template adds
_WHOLE, _PARTS, _PART = 1 << 23, 64, 1 << 16  # bytes of a file that is read whole, and parts of a larger one


def identity(base: Path, adapter: Path | None, encoder: Path | None = None) -> dict[str, Any]:
    """What tells a model's answers from another's: digests of the files of its base, adapter and encoder."""
    return {
        name: None if path is None else _digest(path)
        for name, path in (("base", base), ("adapter", adapter), ("encoder", encoder))
    }


def _digest(path: Path) -> str:
    """Of a file, or of the files of a folder and the folders in it: names, sizes and content. Weights may lie in
    subfolders, which an index names. What is hidden (.git, the .cache of a download) is no part of a model.

    Of a large file only some parts are read, spread evenly: two models of one shape differ nearly everywhere.
    """
    if not path.exists():
        raise UserError(f"there is no {path}.")
    names = {path.name: path}
    if path.is_dir():
        names = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    found = hashlib.sha256()
    for name, file in sorted(names.items()):
        if path.is_dir() and any(part.startswith(".") for part in name.split("/")[:-1]):
            continue
        size = file.stat().st_size
        found.update(os.fsencode(name) + f" {size}\0".encode())
        places = [0] if size <= _WHOLE else [size * part // _PARTS for part in range(_PARTS)]
        with file.open("rb") as opened:
            for place in places:
                opened.seek(place)
                found.update(opened.read(_WHOLE if size <= _WHOLE else _PART))
    return found.hexdigest()[:16]


class Wording(NamedTuple):
    """How a question is put to the model, and which part of what it says is the answer.

    Args:
        brief: the Alpaca template asks for a single word or phrase.
        template: instead of the Alpaca template, this text; the question stands where it has {question}.
        answer_after: the answer is what stands behind the last of these, for a model that says something else first.
    """

    brief: bool = False
    template: str | None = None
    answer_after: str | None = None

    def prompt(self, question: str) -> str:
        if self.template is not None:
            return self.template.replace(QUESTION, question)
        prompt = format_prompt(question)
        if self.brief:
            return prompt.replace("completes the request.", f"completes the request {BRIEF}.", 1)
        return prompt

    def answer(self, said: str) -> str:
        return (said.rpartition(self.answer_after)[2] if self.answer_after else said).strip()

    def asked(self) -> dict[str, str]:
        """What tells these answers from others: only what was chosen, so that earlier runs go on."""
        found = {"template": self.template, "answer_after": self.answer_after}
        return {name: value for name, value in found.items() if value is not None}


class LlamaAnswerer:
    """A LLaMA with an adapter. It answers greedily; questions about images need an adapter with a visual part.

    An image is encoded once in a run, and projected once for all questions of a batch that are about it.

    Args:
        max_new_tokens: of an answer.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        adapter: LlamaAdapter | None,
        identity: Mapping[str, Any],
        max_new_tokens: int,
        wording: Wording,
    ):
        self.model, self.tokenizer, self.adapter, self.identity = model, tokenizer, adapter, identity
        self.max_new_tokens, self.wording = max_new_tokens, wording
        self.eos_ids = [*model.config.eos_ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]
        self._files: dict[str, str] = {}  # of pictures that a table holds
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def check(self, items: Sequence[Item]) -> None:
        """Raises UserError for a question with an image that the adapter cannot see, and for one that is too long."""
        self._encode(items)

    def _encode(self, items: Sequence[Item]) -> list[list[int]]:
        """The prompts in tokens, checked as `check` says."""
        seen = next((item for item in items if item.pictures), None)
        if seen is not None and not isinstance(self.adapter, VisualAdapter):
            raise UserError(
                f"question {seen.id} has an image, and this adapter has no visual part: name a multi-modal adapter."
            )
        context = self.model.config.max_seq_len - self.max_new_tokens
        most = self.model.config.max_seq_len + 1  # enough to see that it is too long
        prompts = [
            self.tokenizer.encode(self.wording.prompt(item.question), eos=False, limit=most) for item in items
        ]
        long = [item.id for item, prompt in zip(items, prompts, strict=True) if len(prompt) > context]
        if long:
            raise UserError(
                f"{len(long)} of {len(items)} questions are longer than the {max(context, 0)} tokens that the model "
                f"has for them, the first is {long[0]}: lower --max-new-tokens, or take a base with a longer context."
            )
        return prompts

    def answer(self, items: Sequence[Item]) -> list[str]:
        """Raises UserError as `check` does."""
        prompts = self._encode(items)
        found = generate(
            self.model,
            prompts,
            about_images(
                self.adapter, [[self._file(picture) for picture in item.pictures] for item in items]
            ),
            max_new_tokens=self.max_new_tokens,
            temperature=0,
            eos_ids=self.eos_ids,
        )
        return [self.wording.answer(self.tokenizer.decode(tokens)) for tokens in found]

    def _file(self, picture: Picture) -> str:
        """The picture's file; one that a table holds is written into a temporary folder."""
        if picture.path is not None:
            return str(picture.path)
        if picture.key not in self._files:
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="zinit-pictures-")
            path = Path(self._folder.name) / str(len(self._files))
            with writing(path):
                path.write_bytes(picture.read())
            self._files[picture.key] = str(path)
        return self._files[picture.key]


def load(
    base: Path,
    adapter: Path | None,
    max_new_tokens: int,
    wording: Wording,
    dtype: str | None,
    device: str,
    encoder: Path | None = None,
    feature_cache: Path | None = None,
) -> LlamaAnswerer:
    """The model of the command line. Raises UserError where it cannot be loaded."""
    place = open_device(device)
    model = load_base(base, DTYPES.get(dtype or ""), place).freeze()
    tokenizer = load_tokenizer(base).check_vocabulary(model.config.vocab_size)
    found: LlamaAdapter | None = None
    if adapter is not None:  # a published V2 adapter changes the base too
        model, found = open_adapter(adapter, model)
    if encoder is not None:
        if not isinstance(found, VisualAdapter):
            raise UserError(f"--encoder is of no use: {adapter or 'the base alone'} has no visual part.")
        options = Namespace(encoder=encoder, feature_cache=feature_cache, convert_images=True)
        found.source = open_source(options, found, place)
    found = None if found is None else found.to(place)
    return LlamaAnswerer(model, tokenizer, found, identity(base, adapter, encoder), max_new_tokens, wording)
