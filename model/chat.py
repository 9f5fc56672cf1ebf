"""A conversation as the tokens that a chat model was trained on, by the template of its tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from .errors import UserError
from .tokenizer import Tokenizer


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], limit: int | None = None
) -> list[int]:
    """The token ids of a conversation, up to where the model's answer begins.

    messages: objects with "role" (system, user, assistant) and "content". limit: as in `Tokenizer.encode`.

    The names of special tokens in the template become these tokens. In a message they would too, so that a message
    could end itself: it is refused. Raises UserError for that, and for a tokenizer without a template or with one that
    cannot be rendered.
    """
    for message in messages:
        for name in tokenizer.special_ids:
            if name in message["content"]:
                raise UserError(
                    f"the message holds {name!r}, which the chat template would take for its own token."
                )
    text = render(tokenizer, messages)
    names = sorted(tokenizer.special_ids, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    ids: list[int] = []
    for part in parts:
        if part in tokenizer.special_ids:
            ids.append(tokenizer.special_ids[part])
        elif part:
            ids += tokenizer.encode(part, bos=False, eos=False, limit=limit)
    return ids[:limit]


def render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> str:
    """The text that the template makes of a conversation, with the beginning of the answer."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template: ask with --instruction or --prompt.")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    names = {id: name for name, id in tokenizer.special_ids.items()}
    special = {"bos_token": names.get(tokenizer.bos_id, ""), "eos_token": names.get(tokenizer.eos_id, "")}
    try:
        template = environment.from_string(tokenizer.chat_template)
        return template.render(messages=list(messages), add_generation_prompt=True, **special)
    except (
        TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"the tokenizer's chat template cannot be rendered: {reason}.") from None


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON as it is; Jinja's own filter writes <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
