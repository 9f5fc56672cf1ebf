"""The bytes of single tokens of a byte-level vocabulary, as GPT-2's, LLaMA 3's and SmolLM2's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class ByteLevel:
    """A tokenizer of the tokenizers library, each character of whose tokens is one byte."""

    tokenizer: Any
    added: frozenset[int]  # tokens that are text

    @classmethod
    def of(cls, tokenizer: Any) -> ByteLevel | None:
        """None where the tokenizer's decoder does not turn the characters of that alphabet into bytes."""
        if tokenizer.decoder is None or tokenizer.decoder.decode(["aĠa"]) != "a a":
            return None
        return cls(tokenizer, frozenset(tokenizer.get_added_tokens_decoder()))

    def bytes_of(self, id: int) -> bytes | None:
        """None for a token that is text."""
        token, byte_of = self.tokenizer.id_to_token(id), _alphabet()
        if token is None or id in self.added or not all(character in byte_of for character in token):
            return None
        return bytes(byte_of[character] for character in token)


@cache
def _alphabet() -> dict[str, int]:
    """character -> byte. Printable bytes are their own characters; the others follow from U+0100 on, in order."""
    from tokenizers.pre_tokenizers import ByteLevel as PreTokenizer

    characters = sorted(PreTokenizer.alphabet())
    own = {character: ord(character) for character in characters if ord(character) < 256}
    rest = sorted(set(range(256)) - set(own.values()))
    return own | dict(zip(characters[len(own) :], rest, strict=True))
