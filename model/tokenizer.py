"""Text to token ids and back: tokenizer.json and GGUF files through the tokenizers library, tokenizer.model through
sentencepiece.

The ids are those of transformers' AutoTokenizer for the same folder, beginning- and end-of-sequence tokens included,
with two differences. The name of a special token inside a text ("</s>") is text and never becomes the token, as under
AutoTokenizer's `split_special_tokens=True`, so a record cannot end its own answer. And a folder with a tokenizer.model
alone gets the pieces that sentencepiece finds, after a beginning-of-sequence token unless a file says otherwise: the
model was trained on these. transformers 5 makes a tokenizer of its own of the file, which loses leading spaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from .errors import UserError, is_out_of_memory, warn
from .gguf_file import find_gguf, read_gguf
from .gguf_tokenizer import describe_tokenizer
from .token_bytes import is_byte_level
from .tokenizer_config import AddedToken, TokenizerConfig, read_tokenizer_config
from .tokenizer_libraries import Encoded, Library, SentencePiece, guarded, without_prefix, without_template

# The special tokens of the LLaMA family, for a tokenizer whose files name none
_BOS_TOKENS = ("<|begin_of_text|>", "<s>")
_EOS_TOKENS = ("<|end_of_text|>", "</s>")
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # of the class LlamaTokenizer
# Rows that an embedding may have beyond the tokenizer's ids. More rows mean another model's tokenizer.
_MAX_PADDING = 1024
# How a long text is encoded up to a limit: the characters of the first window for each id that is wanted, and the
# ids that are never taken from a window's end, where the cut may have split a token
_WINDOW, MARGIN = 8, 32
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
    named: Mapping[str, str] = field(default_factory=dict)  # unk_token, pad_token, ... -> the token's name
    unlisted: frozenset[int] = frozenset()  # of tokens that are named, but that no file gives an id
    chat_template: str | None = None  # Jinja: how a conversation becomes a text; chat.py renders it
    _bytes_of: Callable[[int], bytes | None] | None = None  # in a vocabulary whose tokens are bytes
    # of a text with special tokens in it, and a character that keeps names from being tokens
    _encode_template: Callable[..., Encoded] = field(default=without_template)

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
        inner = self._encode_start(text, limit, lambda part: Encoded(self._encode(part), []))
        return self._with_rows((before + inner.ids + after)[:limit])

    def encode_template(self, text: str, mark: str = "", limit: int | None = None) -> Encoded:
        """The tokens of a text that a chat template made, where the names of special tokens are these tokens.

        mark: a character that keeps a name from being the token, and that is no part of the text itself. limit: as in
        `encode`; nothing is put around the text. Raises UserError as `encode` does.
        """
        found = self._encode_start(text, limit, partial(self._encode_template, mark=mark))
        return Encoded(self._with_rows(found.ids[:limit]), found.spans[:limit])

    def _with_rows(self, ids: list[int]) -> list[int]:
        """The ids, none of which lies beyond the model's vocabulary."""
        if self.rows is not None and max(ids, default=0) >= self.rows:
            names = {id: name for name, id in self.special_ids.items()}
            name = names.get(max(ids)) or self.decode([max(ids)])
            raise UserError(
                f"a text holds the token {name!r} (id {max(ids)}), and the model's vocabulary ends at {self.rows - 1}: "
                "take it out of the text."
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens. Ids that the tokenizer does not have are left out; bytes that
        are no whole character become U+FFFD.
        """
        return self._decode(self._whole_characters([id for id in ids if 0 <= id < self.vocab_size]))

    def token_bytes(self, id: int) -> bytes | None:
        """The bytes of a token, which text cannot show where it is a part of a character. None: only text is known."""
        if self._bytes_of is not None:
            return self._bytes_of(id)
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
        eos_id = self.eos_id
        if eos_id in self.unlisted and eos_id >= rows and eos_id not in self.suffix:
            warn(f"the tokenizer's files name the eos_token {self.named['eos_token']!r}, which has no id.")
            eos_id = None
        for id in (*self.prefix, *self.suffix, eos_id):
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
        return replace(self, rows=rows, eos_id=eos_id)

    def _encode_start(self, text: str, limit: int | None, encode: Callable[[str], Encoded]) -> Encoded:
        """At least the first `limit` tokens of a text, from as few of its characters as that takes.

        A cut changes the ids near it, and only these. So a window counts only if it gives `MARGIN` ids more than are
        wanted, and if the window of half its size gives the same ones. Unigram models read the whole text: they look
        for the best division of all of it, and of "abab..." either phase may be the best.
        """
        before: Encoded | None = None
        size = len(text) if limit is None or not self.local else max(_WINDOW * limit, 1024)
        while limit is not None and size < len(text):
            found = encode(text[:size])
            if len(found.ids) >= limit + MARGIN:
                if before is not None and before.ids[:limit] == found.ids[:limit]:
                    return before
                before = found
            size *= 2
        return encode(text)

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

    tokenizer = guarded(
        lambda: tokenizers.Tokenizer.from_file(str(path)), f"{path} is not a readable tokenizer.json"
    )
    # Truncation and padding that the file asks for would cut a sample, or fill it up, without a word: the length of
    # samples is the caller's.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "</s>" in a text is text
    own_size = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1
    content = path.read_text(encoding="utf-8")
    is_llama_tokenizer = config.is_llama_tokenizer and '"ByteLevel"' not in content
    if is_llama_tokenizer:
        _rebuild_as_llama_tokenizer(tokenizer, config)
    listed = {token.content: token for token in config.added_tokens if token.content}
    tokenizer.add_tokens([_as_added(token) for token in listed.values()])
    missing = [name for name in config.special_names if tokenizer.token_to_id(name) is None]
    _mark_special(tokenizer, config.special_names)
    known = tokenizer.get_vocab()
    bos_id, eos_id = (
        next((known[name] for name in ([named] if given else usual) if name in known), None)
        for (given, named), usual in ((config.bos, _BOS_TOKENS), (config.eos, _EOS_TOKENS))
    )
    if is_llama_tokenizer and config.is_code_llama:  # whatever the file's post-processor says
        begin = [("begin", id) for id in [bos_id] if id is not None]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=[*(name for name, _ in begin), "$A"], special_tokens=begin
        )
    byte_fallback = '"ByteFallback"' in content or is_llama_tokenizer
    wrapped = _wrapped(tokenizer, path, bos_id, eos_id, own_size, byte_fallback, config.chat_template)
    unlisted = frozenset(known[name] for name in missing)
    return replace(
        wrapped,
        vocab_size=max((id for id in known.values() if id not in unlisted), default=-1) + 1,
        unlisted=unlisted,
        named=_named(_LLAMA_TOKENS if is_llama_tokenizer else {}, config),
    )


def _as_added(token: AddedToken) -> Any:
    import tokenizers

    _, content, *flags = token
    return tokenizers.AddedToken(content, **dict(zip(AddedToken._fields[2:], flags, strict=True)))


def _mark_special(tokenizer: Any, names: Iterable[str]) -> None:
    """Makes these tokens special; those that the vocabulary lacks get the next ids, as from AutoTokenizer."""
    import tokenizers

    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for name in names:
        token = known.get(name) or tokenizers.AddedToken(name, special=True)
        if not token.special:  # what it does with spaces stays
            flags = {flag: getattr(token, flag) for flag in AddedToken._fields[3:]}
            token = tokenizers.AddedToken(name, special=True, **flags)
        tokenizer.add_special_tokens([token])


def _from_gguf(path: Path) -> Tokenizer:
    described = guarded(
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

    added = tokenizer.get_added_tokens_decoder()
    library = Library(tokenizer, path.parent, frozenset(added))
    known = tokenizer.get_vocab()
    prefix, suffix = _around(tokenizer, path)
    special_ids = {token.content: id for id, token in added.items() if token.special and token.content}
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
        special_ids=special_ids,
        chat_template=chat_template,
        named=_names_of(bos_id, eos_id, special_ids),
        _bytes_of=library.bytes_of if is_byte_level(tokenizer) else None,
        _encode_template=library.encode_template,
    )


def _rebuild_as_llama_tokenizer(tokenizer: Any, config: TokenizerConfig) -> None:
    """What transformers' class LlamaTokenizer keeps of a tokenizer.json is the vocabulary and the post-processor; the
    rest it makes itself, as CodeLlamaTokenizer does. The ids differ for a text that begins with a space.
    """
    from tokenizers import decoders, models, pre_tokenizers

    if not isinstance(tokenizer.model, models.BPE):
        return
    tokenizer.model.byte_fallback = tokenizer.model.fuse_unk = True
    scheme = "never" if not config.add_prefix_space else "always" if config.legacy else "first"
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strips = config.add_prefix_space or config.is_code_llama
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strips)


def _around(tokenizer: Any, path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor puts before and after a text: its answer for a text of one token."""
    import tokenizers

    word = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0}, unk_token="x")).encode("x")
    done = guarded(lambda: tokenizer.post_process(word), f"the post-processor of {path} cannot be run")
    if done.special_tokens_mask.count(0) != 1:
        raise UserError(f"the post-processor of {path} does not put tokens around a text but repeats it.")
    place = done.special_tokens_mask.index(0)
    return tuple(done.ids[:place]), tuple(done.ids[place + 1 :])


def _from_sentencepiece(path: Path, config: TokenizerConfig) -> Tokenizer:
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{path} is not a sentencepiece model; LLaMA 3's tokenizer.model is another format, so put its "
            "tokenizer.json there instead."
        ) from error
    if not config.add_prefix_space:
        processor = without_prefix(processor)
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

    special_ids = {
        name: id
        for name, id in (known | added).items()
        if (processor.is_control(id) or processor.is_unknown(id) if id < size else name not in ordinary)
    }
    inner = processor if config.legacy else without_prefix(processor)
    pieces = SentencePiece(processor, size, tuple(ordinary), path, special_ids, inner)
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
        special_ids=special_ids,
        chat_template=config.chat_template,
        named=_named(_LLAMA_TOKENS | _names_of(bos_id, eos_id, special_ids), config),
        _encode_template=pieces.encode_template,
    )


def _names_of(bos_id: int | None, eos_id: int | None, special_ids: Mapping[str, int]) -> dict[str, str]:
    names = {id: name for name, id in special_ids.items()}
    ids = {"bos_token": bos_id, "eos_token": eos_id}
    return {kind: names[id] for kind, id in ids.items() if id is not None and id in names}


def _named(own: dict[str, str], config: TokenizerConfig) -> dict[str, str]:
    """The tokens by what they are for: the tokenizer's own ones, unless the files say otherwise."""
    return {kind: name for kind, name in (own | config.named).items() if name is not None}


def _byte_ids(vocabulary: Mapping[str, int]) -> dict[int, int]:
    """byte -> id of the 256 tokens <0x00> to <0xFF>; {} for a vocabulary without them all."""
    found = {byte: vocabulary.get(f"<0x{byte:02X}>") for byte in range(256)}
    return {} if None in found.values() else found  # type: ignore[return-value]
