"""The tokenizers and the sentencepiece library behind one face: text to ids, ids to text, templates to tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .errors import UserError, is_out_of_memory
from .token_bytes import bytes_of


class Encoded(NamedTuple):
    """The tokens of a text."""

    ids: list[int]
    spans: list[tuple[int, int]]  # the characters that each stands for; in order


def without_template(text: str, mark: str = "") -> NoReturn:
    """Of a tokenizer whose special tokens are not known."""
    raise UserError("this tokenizer has no special tokens for a chat template.")


@dataclass(frozen=True)
class Library:
    """A tokenizer of the tokenizers library. Its methods can be sent to another process, which a closure cannot."""

    tokenizer: Any
    folder: Path
    added: frozenset[int]  # added tokens, which are text
    _with_special: dict[str, Any] = field(default_factory=dict, compare=False)  # by mark

    def encode(self, text: str) -> list[int]:
        """The ids of a text without special tokens; their names are text."""
        ids: list[int] = guarded(
            lambda: self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids, self._cannot
        )
        return ids

    def encode_template(self, text: str, mark: str = "") -> Encoded:
        """The tokens of a text in which the names of special tokens are these tokens, unless the mark is in them.

        It is encoded in one piece: a special token may take the spaces beside it, and some tokenizers put a space
        before a text but not before what follows a special token.
        """
        mark = mark if mark in text else ""
        if mark not in self._with_special:
            self._with_special[mark] = guarded(
                lambda: _with_special_tokens(self.tokenizer, mark), self._cannot
            )
        found = guarded(lambda: self._with_special[mark].encode(text, add_special_tokens=False), self._cannot)
        return Encoded(found.ids, found.offsets)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def bytes_of(self, id: int) -> bytes | None:
        """The bytes of a token of a byte-level vocabulary. None for a token that is text."""
        token = None if id in self.added else self.tokenizer.id_to_token(id)
        return None if token is None else bytes_of(token)

    @property
    def _cannot(self) -> str:
        return f"the tokenizer of {self.folder} cannot encode a text"

    def __reduce__(self) -> tuple[Callable[..., Library], tuple[str, Path, frozenset[int]]]:
        return _read_library, (self.tokenizer.to_str(), self.folder, self.added)


def _read_library(content: str, folder: Path, added: frozenset[int]) -> Library:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(content)
    tokenizer.encode_special_tokens = True  # no part of the library's file format, nor of its own pickles
    return Library(tokenizer, folder, added)


def _with_special_tokens(tokenizer: Any, mark: str) -> Any:
    """A copy that takes the names of special tokens for the tokens, and for which a mark is not there.

    Names are looked for before the text is normalised, and the normaliser takes the marks out.
    """
    import tokenizers

    content = json.loads(tokenizer.to_str())
    if mark:
        steps = [{"type": "Replace", "pattern": {"String": mark}, "content": ""}]
        steps += [content["normalizer"]] if content["normalizer"] else []
        content["normalizer"] = {"type": "Sequence", "normalizers": steps}
        for token in content["added_tokens"]:
            token["normalized"] = token["normalized"] and not token["special"]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


@dataclass(frozen=True)
class SentencePiece:
    """A model of the sentencepiece library. Its methods can be sent to another process."""

    processor: Any
    size: int
    ordinary: tuple[str, ...]  # added tokens that a text may hold, and that the model does not know
    path: Path
    special_ids: Mapping[str, int]
    inner: Any  # the processor for what follows a special token: without the space that it puts before a text

    def encode(self, text: str) -> list[int]:
        """The ids of a text without special tokens; their names are text."""
        return self._encode(self.processor, text)

    def _encode(self, processor: Any, text: str) -> list[int]:
        if found := next((token for token in self.ordinary if token in text), None):
            raise UserError(
                f"a text holds the added token {found!r}, which {self.path} does not have: write a tokenizer.json "
                "with transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
            )
        ids: list[int] = processor.encode(text)
        return ids

    def encode_template(self, text: str, mark: str = "") -> Encoded:
        """As `Library.encode_template`. Spans are exact for special tokens alone."""
        names = sorted(self.special_ids, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
        found, place = Encoded([], []), 0
        for part in parts:
            end = place + len(part)
            if part in self.special_ids:
                found.ids.append(self.special_ids[part])
                found.spans.append((place, end))
            elif part:
                ids = self._encode(self.inner if found.ids else self.processor, part.replace(mark, ""))
                found.ids.extend(ids)
                found.spans.extend([(place, end)] * len(ids))
            place = end
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens."""
        text: str = self.processor.decode([int(id) for id in ids if id < self.size])
        return text


def without_prefix(processor: Any) -> Any:
    """A sentencepiece model that puts no space before a text.

    What is appended to a protocol buffer overrides it: here add_dummy_prefix (3) of the normalizer_spec (3).
    """
    import sentencepiece

    proto = processor.serialized_model_proto()
    return sentencepiece.SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")


def guarded(call: Callable[[], Any], sentence: str) -> Any:
    """The call's result; whatever the tokenizers library raises, plain Exception or Rust's panic, as a UserError."""
    try:
        return call()
    except UserError:
        raise
    except BaseException as error:
        if is_out_of_memory(error):
            raise
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{sentence}: {' '.join(str(error).split()).rstrip('.')}.") from None
