"""The bytes of single tokens of a byte-level vocabulary, as GPT-2's, LLaMA 3's and SmolLM2's."""

from __future__ import annotations

from functools import cache
from typing import Any


def is_byte_level(tokenizer: Any) -> bool:
    """Whether the decoder of the tokenizers library's tokenizer turns the characters of that alphabet into bytes."""
    return tokenizer.decoder is not None and tokenizer.decoder.decode(["aĠa"]) == "a a"


def bytes_of(token: str) -> bytes | None:
    """The bytes of a token, each character of which is one. None for other text."""
    byte_of = _alphabet()
    if not all(character in byte_of for character in token):
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
