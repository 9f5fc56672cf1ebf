"""Tokenizers of a few hundred tokens, each with another way to turn tokens into a text."""

import tokenizers
from tiny_models import word_tokenizer


def byte_fallback(path):
    """Bytes, a space and a few words, whose decoder strips the first space."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {piece: 256 + place for place, piece in enumerate(["▁", "▁the", "h", "i", "é"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    decoders = tokenizers.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.save(str(path / "tokenizer.json"))


def byte_level(path):
    """Words over all 256 bytes."""
    word_tokenizer(path, 400)


def sentencepiece(path, extra=False):
    """With byte fallback. extra: it takes all spaces off the beginning of a text, not one alone."""
    import sentencepiece

    (path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "text"), model_prefix=str(path / "tokenizer"), vocab_size=300, minloglevel=2,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=extra,
    )  # fmt: skip


def sentencepiece_that_strips(path):
    sentencepiece(path, True)
