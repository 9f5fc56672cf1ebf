"""The tokenizer that a GGUF file describes, as one of the tokenizers library.

There are two kinds: sentencepiece's pieces with scores ("llama"), and byte-level BPE with merges ("gpt2"). The latter
names the rule that splits a text before the merges; the rules are llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from zinit_kernels.console import shown

from .errors import UserError
from .gguf_file import GGUF

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type
# Splits of a text. None: GPT-2's, which the tokenizers library has built in
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Rule(NamedTuple):
    split: str | None
    single_digits: bool = False  # each digit is a word of its own
    whole_words: bool = (
        False  # a word that is a token is not merged from its bytes; such files begin texts with BOS
    )


_RULES = {
    "gpt-2": _Rule(None),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _Rule(None, single_digits=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _Rule(_LLAMA3, whole_words=True)),
    "tekken": _Rule(_TEKKEN, whole_words=True),
}


class Described(NamedTuple):
    """A tokenizer of the tokenizers library, and what its object does not say."""

    tokenizer: Any
    bos_id: int | None
    eos_id: int | None
    byte_fallback: bool
    chat_template: str | None


def describe_tokenizer(gguf: GGUF) -> Described:
    """The tokenizer of a file, with the tokens that it puts around a text in its post-processor. Raises UserError."""
    fields = _Fields(gguf)
    kind = fields.get("model", str, "")
    tokens = fields.get("tokens", list, [])
    if not tokens:
        raise UserError(
            f"{gguf.path} has no tokenizer: put the model's tokenizer.json beside it and name the folder."
        )
    vocabulary = {token: id for id, token in enumerate(tokens)}
    if not all(isinstance(token, str) for token in tokens) or len(vocabulary) < len(tokens):
        raise UserError(f"{gguf.path} must name each of its {len(tokens)} tokens by a text of its own.")
    if kind == "llama":
        tokenizer, adds_bos = _sentencepiece(fields, tokens, vocabulary), True
    elif kind == "gpt2":
        tokenizer, adds_bos = _byte_level(fields, vocabulary)
    else:
        raise UserError(
            f"{gguf.path} has a tokenizer of the kind {shown(kind)}, supported are 'llama' and 'gpt2': put the model's "
            "tokenizer.json beside it and name the folder."
        )
    _add_tokens(tokenizer, fields, tokens)
    sentencepiece = kind == "llama"
    bos_id = fields.token_id("bos", len(tokens), 1 if sentencepiece else None)
    eos_id = fields.token_id("eos", len(tokens), 2 if sentencepiece else None)
    before = bos_id if fields.get("add_bos_token", bool, adds_bos) else None
    after = eos_id if fields.get("add_eos_token", bool, False) else None
    _put_around(tokenizer, before, after)
    template = gguf.fields.get("tokenizer.chat_template")
    return Described(
        tokenizer, bos_id, eos_id, sentencepiece, template if isinstance(template, str) else None
    )


class _Fields:
    """The fields tokenizer.ggml.*, each checked as it is read."""

    def __init__(self, gguf: GGUF):
        self.path, self.fields = gguf.path, gguf.fields

    def get(self, name: str, kind: type, default: Any) -> Any:
        value = self.fields.get(f"tokenizer.ggml.{name}", default)
        if type(value) is not kind:
            raise UserError(
                f"{self.path} must have a {kind.__name__} as tokenizer.ggml.{name}, it has {shown(value)}."
            )
        return value

    def token_id(self, kind: str, size: int, default: int | None) -> int | None:
        id = self.fields.get(f"tokenizer.ggml.{kind}_token_id", default)
        if id is not None and (type(id) is not int or not 0 <= id < size):
            raise UserError(
                f"{self.path} must have one of its {size} tokens as {kind}_token_id, it has {shown(id)}."
            )
        return id


def _sentencepiece(fields: _Fields, tokens: list[str], vocabulary: Mapping[str, int]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = fields.token_id("unknown", len(tokens), 0) or 0
    tokenizer = Tokenizer(
        models.BPE(
            dict(vocabulary),
            _merges_of_scores(fields, tokens),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space_first = fields.get("add_space_prefix", bool, True)
    steps = [normalizers.Prepend("▁")] * space_first + [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * space_first)
    return tokenizer


def _merges_of_scores(fields: _Fields, tokens: list[str]) -> list[tuple[str, str]]:
    """The merges that sentencepiece's scores mean: two neighbours become the piece with the highest score."""
    scores, types = fields.get("scores", list, []), _types(fields, tokens)
    if len(scores) != len(tokens) or not all(isinstance(score, float) for score in scores):
        raise UserError(f"{fields.path} must have a score for each of its {len(tokens)} tokens.")
    pieces = {
        token: score for token, score, type in zip(tokens, scores, types, strict=True) if type == _NORMAL
    }
    if max(map(len, pieces), default=0) > 1000:
        raise UserError(f"{fields.path} is damaged: it has a token of more than 1000 characters.")
    ranked = sorted(pieces, key=lambda piece: -pieces[piece])
    halves = ((piece[:cut], piece[cut:]) for piece in ranked for cut in range(1, len(piece)))
    return [(left, right) for left, right in halves if left in pieces and right in pieces]


def _byte_level(fields: _Fields, vocabulary: Mapping[str, int]) -> tuple[Any, bool]:
    """The tokenizer, and whether it begins a text with BOS where the file does not say."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = fields.get("pre", str, "default")
    if name not in _RULES:
        raise UserError(
            f"{fields.path} splits texts by the rule {shown(name)}, supported are {', '.join(_RULES)}: put the model's "
            "tokenizer.json beside it and name the folder."
        )
    rule = _RULES[name]
    merges = [tuple(merge.split(" ")) for merge in _texts(fields.get("merges", list, []))]
    if not all(len(merge) == 2 and {*merge, "".join(merge)} <= vocabulary.keys() for merge in merges):
        raise UserError(f"{fields.path} is damaged: a merge must be two tokens that make a third one.")
    tokenizer = Tokenizer(models.BPE(dict(vocabulary), merges, ignore_merges=rule.whole_words))
    first = [pre_tokenizers.Digits(individual_digits=True)] * rule.single_digits
    if rule.split is not None:
        first.append(pre_tokenizers.Split(Regex(rule.split), "isolated"))
    last = pre_tokenizers.ByteLevel(
        add_prefix_space=fields.get("add_space_prefix", bool, False), use_regex=rule.split is None
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, last])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.whole_words


def _texts(values: Iterable[Any]) -> list[str]:
    return [value if isinstance(value, str) else "" for value in values]


def _types(fields: _Fields, tokens: list[str]) -> list[int]:
    types: list[int] = fields.get("token_type", list, [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise UserError(f"{fields.path} must have a type for each of its {len(tokens)} tokens.")
    return types


def _add_tokens(tokenizer: Any, fields: _Fields, tokens: list[str]) -> None:
    """Marks control tokens as special, and those of the user, which are matched whole in a text, as added."""
    from tokenizers import AddedToken

    types = _types(fields, tokens)
    for type, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, kind in zip(tokens, types, strict=True)
            if kind == type and token
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)


def _put_around(tokenizer: Any, before: int | None, after: int | None) -> None:
    from tokenizers import processors

    first, last = ([] if id is None else [f"token {id}"] for id in (before, after))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        special_tokens=list({(f"token {id}", id) for id in (before, after) if id is not None}),
    )
