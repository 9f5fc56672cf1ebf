"""Text to token ids and back: tokenizer.json and GGUF files through the tokenizers library, tokenizer.model through
sentencepiece.

The ids are those of transformers' AutoTokenizer for the same folder, beginning- and end-of-sequence tokens included,
with one difference: the name of a special token inside a text ("</s>") is text and never becomes the token, as under
AutoTokenizer's `split_special_tokens=True`. So a record cannot end its own answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import UserError, warn
from .gguf_file import find_gguf, read_gguf
from .gguf_tokenizer import describe_tokenizer
from .token_bytes import ByteLevel
from .tokenizer_config import TokenizerConfig, read_tokenizer_config

# The special tokens of the LLaMA family, for a tokenizer whose files name none
_BOS_TOKENS = ("<|begin_of_text|>", "<s>")
_EOS_TOKENS = ("<|end_of_text|>", "</s>")
# Rows that an embedding may have beyond the tokenizer's ids. More rows mean another model's tokenizer.
_MAX_PADDING = 1024
# How a long text is encoded up to a limit: the characters of the first window for each id that is wanted, and the
# ids that are never taken from a window's end, where the cut may have split a token
_WINDOW, _MARGIN = 8, 32
_OTHER_FORMATS = {
    "tekken.json": "Mistral's own format",
    "tiktoken.model": "tiktoken's format",
    "vocab.json": "a vocabulary without its rules",
}


@dataclass(frozen=True)
class Tokenizer:
    """What `load_tokenizer` returns. `prefix` and `suffix` are the ids that the tokenizer's files put around a text."""

    vocab_size: int  # one above the highest id, added tokens included; a vocabulary may have gaps
    bos_id: int | None
    eos_id: int | None
    _encode: Callable[[str], list[int]]  # without prefix and suffix
    _decode: Callable[[Sequence[int]], str]
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    own_size: int | None = None  # one above the highest id without added tokens; None: vocab_size
    byte_ids: Mapping[int, int] = field(default_factory=dict)  # byte -> its id, under byte fallback
    local: bool = True  # the ids of a text's beginning do not depend on its end
    rows: int | None = None  # of the model's embedding, once `check_vocabulary` has seen it
    special_ids: Mapping[str, int] = field(default_factory=dict)  # of the tokens that no text holds, by name
    chat_template: str | None = None  # Jinja: how a conversation becomes a text; chat.py renders it
    byte_level: ByteLevel | None = None  # of a vocabulary whose tokens are bytes

    def encode(
        self, text: str, bos: bool | None = None, eos: bool | None = None, limit: int | None = None
    ) -> list[int]:
        """The token ids of a text.

        bos, eos: whether the beginning- and the end-of-sequence token stand around it; None = as the tokenizer's
        files say. True changes nothing for a tokenizer that has no such token.
        limit: only the first `limit` ids are wanted. A text much longer than that is not encoded to its end, which for
        10 MB takes two gigabytes and ten seconds.
        Raises UserError for a text that the tokenizer cannot encode, or that holds a token the model has no row for.
        """
        before, after = list(self.prefix), list(self.suffix)
        for wanted, id, around in ((bos, self.bos_id, before), (eos, self.eos_id, after)):
            if wanted is False:
                around[:] = [other for other in around if other != id]
            elif wanted and id is not None and id not in around:
                around.insert(0 if around is before else len(around), id)
        inner = self._encode(text) if limit is None else self._encode_start(text, limit)
        ids = (before + inner + after)[:limit]
        if self.rows is not None and max(ids, default=0) >= self.rows:
            raise UserError(
                f"a text holds the token {self.decode([max(ids)])!r} (id {max(ids)}), and the model's vocabulary ends "
                f"at {self.rows - 1}: take it out of the text."
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens. Ids that the tokenizer does not have are left out; bytes that
        are no whole character become U+FFFD.
        """
        return self._decode(self._whole_characters([id for id in ids if 0 <= id < self.vocab_size]))

    def token_bytes(self, id: int) -> bytes | None:
        """The bytes of a token, which text cannot show where it is a part of a character. None: only text is known."""
        if self.byte_level is not None:
            return self.byte_level.bytes_of(id)
        return next((bytes([byte]) for byte, other in self.byte_ids.items() if other == id), None)

    def check_vocabulary(self, rows: int) -> Tokenizer:
        """This tokenizer for a model whose embedding has so many rows.

        An added token (a <pad>, say) may lie beyond them: no ordinary text holds it, and `encode` refuses one that
        does. Raises UserError if the tokenizer's own ids do not fit, or if it puts a token without a row around texts.
        """
        own = self.vocab_size if self.own_size is None else self.own_size
        if not own <= rows <= self.vocab_size + _MAX_PADDING:
            raise UserError(
                f"the tokenizer has ids below {own} and the model a vocabulary of {rows}: "
                "they belong to different models."
            )
        for id in (*self.prefix, *self.suffix, self.eos_id):
            if id is not None and id >= rows:
                raise UserError(
                    f"the tokenizer puts id {id} around a text and the model has a vocabulary of {rows}: "
                    "they belong to different models."
                )
        if self.vocab_size > rows:
            warn(
                f"the tokenizer has ids up to {self.vocab_size - 1} and the model a vocabulary of {rows}: a text that "
                "holds one of the added tokens without a row is refused."
            )
        return replace(self, rows=rows)

    def _encode_start(self, text: str, limit: int) -> list[int]:
        """At least the first `limit` ids of a text, from as few of its characters as that takes.

        A cut changes the ids near it, and only these. So a window counts only if it gives `_MARGIN` ids more than are
        wanted, and if the window of half its size gives the same ones. Unigram models read the whole text: they look
        for the best division of all of it, and of "abab..." either phase may be the best.
        """
        size, before = max(_WINDOW * limit, 1024), None
        while self.local and size < len(text):
            ids = self._encode(text[:size])
            if len(ids) >= limit + _MARGIN:
                if before == ids[:limit]:
                    return before
                before = ids[:limit]
            size *= 2
        return self._encode(text)

    def _whole_characters(self, ids: list[int]) -> list[int]:
        """The ids, with the bytes of broken characters replaced by those of U+FFFD.

        The tokenizers library turns every byte of a run into U+FFFD if one of them is broken: an answer cut inside its
        second emoji would lose the first one too.
        """
        if not self.byte_ids:
            return ids
        bytes_of = {id: byte for byte, id in self.byte_ids.items()}
        whole: list[int] = []
        run = bytearray()
        for id in (*ids, -1):
            if id in bytes_of:
                run.append(bytes_of[id])
                continue
            if run:
                whole += [self.byte_ids[byte] for byte in bytes(run).decode(errors="replace").encode()]
                run.clear()
            if id >= 0:
                whole.append(id)
        return whole


@dataclass(frozen=True)
class _Library:
    """A tokenizer of the tokenizers library. Its methods can be sent to another process, which a closure cannot."""

    tokenizer: Any
    folder: Path

    def encode(self, text: str) -> list[int]:
        ids: list[int] = _guarded(
            lambda: self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids,
            f"the tokenizer of {self.folder} cannot encode a text",
        )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def __reduce__(self) -> tuple[Callable[[str, Path], _Library], tuple[str, Path]]:
        return _read_library, (self.tokenizer.to_str(), self.folder)


def _read_library(content: str, folder: Path) -> _Library:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(content)
    tokenizer.encode_special_tokens = True  # no part of the library's file format, nor of its own pickles
    return _Library(tokenizer, folder)


@dataclass(frozen=True)
class _SentencePiece:
    """A model of the sentencepiece library. Its methods can be sent to another process."""

    processor: Any
    size: int
    ordinary: tuple[str, ...]  # added tokens that a text may hold, and that the model does not know
    path: Path

    def encode(self, text: str) -> list[int]:
        if found := next((token for token in self.ordinary if token in text), None):
            raise UserError(
                f"a text holds the added token {found!r}, which {self.path} does not have: write a tokenizer.json "
                "with transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
            )
        ids: list[int] = self.processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.processor.decode([int(id) for id in ids if id < self.size])
        return text


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder: tokenizer.json if it is there, else tokenizer.model, else a GGUF file's.

    tokenizer_config.json, special_tokens_map.json, added_tokens.json and config.json beside it are read as
    AutoTokenizer reads them. A GGUF file has all of that in itself; the ids are llama.cpp's.
    """
    directory = Path(directory)
    if directory.is_file():
        return _from_gguf(directory)
    if (directory / "tokenizer.json").is_file():
        return _from_json(directory / "tokenizer.json", read_tokenizer_config(directory))
    if (directory / "tokenizer.model").is_file():
        return _from_sentencepiece(directory / "tokenizer.model", read_tokenizer_config(directory))
    if gguf := find_gguf(directory):
        return _from_gguf(gguf)
    advice = "put the model's tokenizer there"
    for name, format in _OTHER_FORMATS.items():
        if (directory / name).is_file():
            advice = (
                f"it has {name}, {format}, which is not read here; write a tokenizer.json with transformers' "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
            break
    raise UserError(f"{directory} has neither tokenizer.json nor tokenizer.model: {advice}.")


def _from_json(path: Path, config: TokenizerConfig) -> Tokenizer:
    import tokenizers

    tokenizer = _guarded(
        lambda: tokenizers.Tokenizer.from_file(str(path)), f"{path} is not a readable tokenizer.json"
    )
    # Truncation and padding that the file asks for would cut a sample, or fill it up, without a word: the length of
    # samples is the caller's.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "</s>" in a text is text
    own_size = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1
    known = tokenizer.get_vocab()
    content = path.read_text(encoding="utf-8")
    if config.is_llama_tokenizer and '"ByteLevel"' not in content:
        _rebuild_as_llama_tokenizer(tokenizer, config)
    for token in config.added_tokens:
        if token.content not in known:
            flags = {"special": token.special, "normalized": token.normalized}
            tokenizer.add_tokens([tokenizers.AddedToken(token.content, **flags)])
    tokenizer.add_special_tokens([name for name in config.special_names if name in known])
    known = tokenizer.get_vocab()
    bos_id, eos_id = (
        next((known[name] for name in ([named] if given else usual) if name in known), None)
        for (given, named), usual in ((config.bos, _BOS_TOKENS), (config.eos, _EOS_TOKENS))
    )
    byte_fallback = '"ByteFallback"' in content or config.is_llama_tokenizer
    return _wrapped(tokenizer, path, bos_id, eos_id, own_size, byte_fallback, config.chat_template)


def _from_gguf(path: Path) -> Tokenizer:
    described = _guarded(
        lambda: describe_tokenizer(read_gguf(path)), f"{path} describes a tokenizer that cannot be made"
    )
    tokenizer, *ids, byte_fallback, chat_template = described
    tokenizer.encode_special_tokens = True  # "</s>" in a text is text
    return _wrapped(tokenizer, path, *ids, None, byte_fallback, chat_template)


def _wrapped(
    tokenizer: Any,
    path: Path,
    bos_id: int | None,
    eos_id: int | None,
    own_size: int | None,
    byte_fallback: bool,
    chat_template: str | None,
) -> Tokenizer:
    """A tokenizer of the tokenizers library as a `Tokenizer`."""
    import tokenizers

    library = _Library(tokenizer, path.parent)
    known = tokenizer.get_vocab()
    prefix, suffix = _around(tokenizer, path)
    added = tokenizer.get_added_tokens_decoder()
    return Tokenizer(
        max(known.values(), default=-1) + 1,
        bos_id,
        eos_id,
        library.encode,
        library.decode,
        prefix,
        suffix,
        own_size,
        _byte_ids(known) if byte_fallback else {},
        not isinstance(tokenizer.model, tokenizers.models.Unigram),
        special_ids={token.content: id for id, token in added.items() if token.special and token.content},
        chat_template=chat_template,
        byte_level=ByteLevel.of(tokenizer),
    )


def _rebuild_as_llama_tokenizer(tokenizer: Any, config: TokenizerConfig) -> None:
    """What transformers' class LlamaTokenizer keeps of a tokenizer.json is the vocabulary and the post-processor; the
    rest it makes itself. The ids differ for a text that begins with a space.
    """
    from tokenizers import decoders, models, pre_tokenizers

    if not isinstance(tokenizer.model, models.BPE):
        return
    tokenizer.model.byte_fallback = tokenizer.model.fuse_unk = True
    scheme = "never" if not config.add_prefix_space else "always" if config.legacy else "first"
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * config.add_prefix_space)


def _around(tokenizer: Any, path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor puts before and after a text: its answer for a text of one token."""
    import tokenizers

    word = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0}, unk_token="x")).encode("x")
    done = _guarded(lambda: tokenizer.post_process(word), f"the post-processor of {path} cannot be run")
    if done.special_tokens_mask.count(0) != 1:
        raise UserError(f"the post-processor of {path} does not put tokens around a text but repeats it.")
    place = done.special_tokens_mask.index(0)
    return tuple(done.ids[:place]), tuple(done.ids[place + 1 :])


def _from_sentencepiece(path: Path, config: TokenizerConfig) -> Tokenizer:
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{path} is not a sentencepiece model; LLaMA 3's tokenizer.model is another format, so put its "
            "tokenizer.json there instead."
        ) from error
    size = processor.vocab_size()
    known = {processor.id_to_piece(id): id for id in range(size)}
    added = {token.content: token.id for token in config.added_tokens if token.content not in known}
    ordinary = [
        token.content for token in config.added_tokens if token.content in added and not token.special
    ]
    bos_id, eos_id = (
        (known | added).get(name or "") if given else None if usual < 0 else usual
        for (given, name), usual in ((config.bos, processor.bos_id()), (config.eos, processor.eos_id()))
    )

    pieces = _SentencePiece(processor, size, tuple(ordinary), path)
    return Tokenizer(
        max([size - 1, *added.values()]) + 1,
        bos_id,
        eos_id,
        pieces.encode,
        pieces.decode,
        () if bos_id is None or not config.add_bos else (bos_id,),
        () if eos_id is None or not config.add_eos else (eos_id,),
        size,
        _byte_ids({piece: id for piece, id in known.items() if processor.is_byte(id)}),
        # BPE's scores are ranks, Unigram's logarithms
        all(processor.get_score(id).is_integer() for id in range(size)),
        special_ids={
            name: id
            for name, id in (known | added).items()
            if (processor.is_control(id) if id < size else name not in ordinary)
        },
        chat_template=config.chat_template,
    )


def _byte_ids(vocabulary: Mapping[str, int]) -> dict[int, int]:
    """byte -> id of the 256 tokens <0x00> to <0xFF>; {} for a vocabulary without them all."""
    found = {byte: vocabulary.get(f"<0x{byte:02X}>") for byte in range(256)}
    return {} if None in found.values() else found  # type: ignore[return-value]


def _guarded(call: Callable[[], Any], sentence: str) -> Any:
    """The call's result; whatever the tokenizers library raises, plain Exception or Rust's panic, as a UserError."""
    try:
        return call()
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{sentence}: {' '.join(str(error).split()).rstrip('.')}.") from None
