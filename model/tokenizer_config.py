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


class AddedToken(NamedTuple):
    """A token that was added to a trained vocabulary."""

    id: int
    content: str
    special: bool
    normalized: bool


@dataclass(frozen=True)
class TokenizerConfig:
    """The facts of tokenizer_config.json, special_tokens_map.json, added_tokens.json and config.json."""

    bos: tuple[bool, str | None]  # whether a file names it, and the name; None: it says that there is none
    eos: tuple[bool, str | None]
    add_bos: bool  # these two count for tokenizer.model; a tokenizer.json has them in its post-processor
    add_eos: bool
    special_names: tuple[str, ...]
    added_tokens: tuple[AddedToken, ...]  # by id
    is_llama_tokenizer: bool  # the class LlamaTokenizer makes the normaliser and the decoder itself
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
    names = {kind: _name(value, kind, directory) for kind, value in told.items() if kind.endswith("_token")}
    names = {kind: name for kind, name in names.items() if not isinstance(name, bool)}
    lists = (told.get(kind) for kind in ("additional_special_tokens", "extra_special_tokens"))
    more = [_name(token, "special token", directory) for tokens in lists for token in _as_list(tokens)]
    special = tuple(
        dict.fromkeys(name for name in (*names.values(), *more) if isinstance(name, str) and name)
    )
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
    is_llama = isinstance(kind, str) and kind.removesuffix("Fast") == "LlamaTokenizer"
    return TokenizerConfig(
        bos=("bos_token" in names, names.get("bos_token")),
        eos=("eos_token" in names, names.get("eos_token")),
        add_bos=bool(told.get("add_bos_token", True)),
        add_eos=bool(told.get("add_eos_token", False)),
        special_names=special,
        added_tokens=tuple(sorted(added)),
        is_llama_tokenizer=is_llama and model.get("model_type") != "mistral",
        legacy=bool(told.get("legacy", False)),
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
    return AddedToken(int(id), content, special, bool(token.get("normalized", not special)))


def _as_list(tokens: Any) -> list[Any]:
    return list(tokens.values()) if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else []


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except CheckpointError as error:
        raise UserError(f"{error}.") from error
