"""What the files beside a tokenizer say of its special tokens, read in the order in which transformers reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from zinit_kernels.checkpoints.adapter import CheckpointError
from zinit_kernels.checkpoints.json_files import read_json
from zinit_kernels.console import shown

from .errors import UserError

# Tokens that the vocabulary lacks get ids in this order
_KINDS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class AddedToken(NamedTuple):
    """A token that was added to a trained vocabulary."""

    id: int
    content: str
    special: bool
    normalized: bool
    lstrip: bool = False  # these take the spaces before or behind the token with it
    rstrip: bool = False
    single_word: bool = False  # only where no letter stands beside it


@dataclass(frozen=True)
class TokenizerConfig:
    """The facts of tokenizer_config.json, special_tokens_map.json, added_tokens.json and config.json."""

    bos: tuple[bool, str | None]  # whether a file names it, and the name; None: it says that there is none
    eos: tuple[bool, str | None]
    add_bos: bool  # these two count for tokenizer.model; a tokenizer.json has them in its post-processor
    add_eos: bool
    special_names: tuple[str, ...]
    named: dict[
        str, str | None
    ]  # the name of the unk_token, pad_token, image_token, ..., where a file says it
    added_tokens: tuple[AddedToken, ...]  # by id
    is_llama_tokenizer: bool  # the class LlamaTokenizer makes the normaliser and the decoder itself
    is_code_llama: bool  # and so does CodeLlamaTokenizer, and what it puts around a text
    legacy: bool
    add_prefix_space: bool
    chat_template: str | None


def read_tokenizer_config(directory: Path) -> TokenizerConfig:
    """The facts of a folder; the defaults where it has none of these files. Raises UserError naming a broken one."""
    path = directory / "tokenizer_config.json"
    told = _read_object(path)
    stated = told.get("added_tokens_decoder")
    if stated is None:  # only then do the older files count
        told |= _read_object(directory / "special_tokens_map.json")
    more = told.get("extra_special_tokens") or told.get("additional_special_tokens")
    own_kinds = more if isinstance(more, dict) else {}  # tokens with a meaning of their own, as image_token
    kinds = dict.fromkeys(_KINDS) | {kind: None for kind in told if kind.endswith("_token")} | own_kinds
    values = {kind: (told | own_kinds)[kind] for kind in kinds if kind in told or kind in own_kinds}
    names = {kind: _name(value, kind, directory) for kind, value in values.items()}
    names = {kind: name for kind, name in names.items() if not isinstance(name, bool)}
    others = [_name(token, "special token", directory) for token in more] if isinstance(more, list) else []
    special = tuple(dict.fromkeys(name for name in (*names.values(), *others) if isinstance(name, str)))
    if stated is None:
        found = _read_object(directory / "added_tokens.json")
        added = [
            _added(id, {"content": text, "special": text in special}, directory) for text, id in found.items()
        ]
    elif isinstance(stated, dict):
        added = [_added(id, token, directory) for id, token in stated.items()]
    else:
        raise UserError(f"{path} must name the added_tokens_decoder by an object.")
    model = _read_object(directory / "config.json")
    kind = told.get("tokenizer_class") or model.get("tokenizer_class")
    kind = kind.removesuffix("Fast") if isinstance(kind, str) else None
    return TokenizerConfig(
        bos=("bos_token" in names, names.get("bos_token")),
        eos=("eos_token" in names, names.get("eos_token")),
        add_bos=bool(told.get("add_bos_token", True)),
        add_eos=bool(told.get("add_eos_token", False)),
        special_names=special,
        named=names,
        added_tokens=tuple(sorted(added)),
        is_llama_tokenizer=kind in ("LlamaTokenizer", "CodeLlamaTokenizer")
        and model.get("model_type") != "mistral",
        is_code_llama=kind == "CodeLlamaTokenizer" and model.get("model_type") != "mistral",
        legacy=bool(told.get("legacy", False)) and kind != "CodeLlamaTokenizer",
        add_prefix_space=told.get("add_prefix_space") is None or bool(told["add_prefix_space"]),
        chat_template=_chat_template(told.get("chat_template"), directory),
    )


def _chat_template(value: Any, directory: Path) -> str | None:
    """The template that a file of its own or tokenizer_config.json has; the one named "default" of several."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"{file} is not UTF-8 text.") from None
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _name(value: Any, kind: str, directory: Path) -> Any:
    """A token's name, which stands there as a string or as an object with content; null and "" are no token."""
    if isinstance(value, bool):  # add_bos_token and its like end in _token too
        return value
    name = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(name, str):
        raise UserError(f"{directory} must name the {kind} by a string, or by an object with content.")
    return name or None


def _added(id: Any, token: Any, directory: Path) -> AddedToken:
    content = token.get("content") if isinstance(token, dict) else None
    if not re.fullmatch("[0-9]{1,9}", str(id)) or not isinstance(content, str):
        raise UserError(
            f"{directory} lists an added token that is no id with a text: {shown(id)}: {shown(token)}."
        )
    special = bool(token.get("special", False))
    flags = (bool(token.get(name, False)) for name in ("lstrip", "rstrip", "single_word"))
    return AddedToken(int(id), content, special, bool(token.get("normalized", not special)), *flags)


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except CheckpointError as error:
        raise UserError(f"{error}.") from error
