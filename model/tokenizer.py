"""Text to token ids and back: tokenizer.json by the tokenizers library, tokenizer.model by sentencepiece."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

# The special tokens of the LLaMA family, for a tokenizer.json without tokenizer_config.json beside it
_BOS_TOKENS = ("<|begin_of_text|>", "<s>")
_EOS_TOKENS = ("<|end_of_text|>", "</s>")
# Rows an embedding may have beyond the tokenizer's ids; more is another model's tokenizer
_MAX_PADDING = 1024


@dataclass(frozen=True)
class Tokenizer:
    vocab_size: int  # one above the highest id; a vocabulary may have gaps
    bos_id: int | None
    eos_id: int | None
    _encode: Callable[[str], list[int]]
    _decode: Callable[[Sequence[int]], str]

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids; bos and eos put the beginning and end of sequence around them where the tokenizer has
        them. Whatever the text holds is text: no special token comes from it.
        """
        before = [self.bos_id] if bos and self.bos_id is not None else []
        after = [self.eos_id] if eos and self.eos_id is not None else []
        return before + self._encode(text) + after

    def decode(self, ids: Sequence[int]) -> str:
        """Text, special tokens left out."""
        return self._decode(ids)

    def check_vocabulary(self, vocab_size: int) -> Tokenizer:
        """Itself if its ids fit an embedding of `vocab_size` rows."""
        if not self.vocab_size <= vocab_size <= self.vocab_size + _MAX_PADDING:
            raise UserError(
                f"the tokenizer has ids below {self.vocab_size} and the model a vocabulary of {vocab_size}: "
                "they belong to different models."
            )
        return self


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory: tokenizer.json if it is there, else tokenizer.model."""
    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        return _from_json(directory / "tokenizer.json")
    if (directory / "tokenizer.model").is_file():
        return _from_sentencepiece(directory / "tokenizer.model")
    raise UserError(
        f"{directory} has neither tokenizer.json nor tokenizer.model: put the model's tokenizer there."
    )


def _from_json(path: Path) -> Tokenizer:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} is not a readable tokenizer.json: {error}.") from error
    names = _special_tokens(path.with_name("tokenizer_config.json"))
    # what the file asks for would cut a sample, or fill it up, unseen: the samples' length is the caller's
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # a special token's name inside a text is text, as it is to sentencepiece: "</s>" ends no sample from within
    tokenizer.encode_special_tokens = True
    ids = []
    for kind, usual in (("bos_token", _BOS_TOKENS), ("eos_token", _EOS_TOKENS)):
        candidates = [names[kind]] if names.get(kind) else usual
        ids.append(next((i for i in map(tokenizer.token_to_id, candidates) if i is not None), None))
    return Tokenizer(
        max(tokenizer.get_vocab().values(), default=-1) + 1,
        *ids,
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
    )


def _special_tokens(path: Path) -> dict[str, str]:
    """bos_token and eos_token as tokenizer_config.json names them, by a string or by an object."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object.")
    named = {kind: config[kind] for kind in ("bos_token", "eos_token") if config.get(kind)}
    names = {kind: name.get("content") if isinstance(name, dict) else name for kind, name in named.items()}
    for kind, name in names.items():
        if not isinstance(name, str):
            raise UserError(f"{path} must name the {kind} by a string, or by an object with content.")
    return names


def _from_sentencepiece(path: Path) -> Tokenizer:
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{path} is not a sentencepiece model; LLaMA 3's tokenizer.model is another format, so put its "
            "tokenizer.json there instead."
        ) from error
    bos, eos = (None if i < 0 else i for i in (processor.bos_id(), processor.eos_id()))
    return Tokenizer(
        processor.vocab_size(),
        bos,
        eos,
        processor.encode,
        lambda ids: processor.decode([int(i) for i in ids]),
    )
