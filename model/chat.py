"""A conversation as the tokens that a chat model was trained on, by the template of its tokenizer.

The template is a program from a downloaded folder. It runs in a sandbox (chat_sandbox.py), which keeps it from
everything but the messages and the few names below, and ends it if it does not end itself.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

from .errors import UserError
from .tokenizer import MARGIN, Tokenizer
from .tokenizer_libraries import Encoded

# How a long conversation is encoded up to a limit: the messages of the first try, and the characters of each message
# for each id that is wanted. The longest tokens of vocabularies, runs of spaces, have 128 characters.
_FIRST_MESSAGES, _FIRST_CHARACTERS = 16, 32


class ChatTokens(NamedTuple):
    """A conversation in tokens."""

    ids: list[int]
    answers: tuple[
        tuple[int, int], ...
    ]  # (start, end) of each assistant message, with the token that ends it
    ended: bool  # a special token ends every answer


class SpecialTokenInText(UserError):
    """A message holds the name of a special token."""


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], limit: int | None = None
) -> list[int]:
    """The token ids of a conversation, up to where the model's answer begins.

    messages: objects with "role" (system, user, assistant) and "content". limit: as in `Tokenizer.encode`.

    The names of special tokens in the template become these tokens. In a message they stay text, so that no message
    can end itself or speak for another role. Raises UserError for a tokenizer without a template, or with one that
    cannot be rendered.
    """
    mark = _unused_character(messages)
    marked = [
        {**message, "content": _marked(message["content"], tokenizer.special_ids, mark)}
        for message in messages
    ]
    return tokenizer.encode_template(render(tokenizer, marked), mark, limit).ids


def encode_answers(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], limit: int | None = None
) -> ChatTokens:
    """The token ids of a whole conversation, and where the assistant's messages are in them.

    An answer begins where the template's beginning of an answer ends, and it ends with the special token behind it:
    what the model writes when it is asked with `encode_chat`. Raises UserError as `encode_chat` does, for a message
    that holds the name of a special token, and for a template that leaves a message out or renders a longer
    conversation otherwise than its beginning.

    limit: only the first `limit` ids are wanted, and of a long conversation only a beginning that has more is looked
    at. Each answer behind it stands as one token behind the ids. The template is rendered once for each answer, so the
    time of a whole conversation grows with the square of its length: 76 s for 1,000 short answers.
    """
    _refuse_special_tokens(tokenizer, messages)
    if limit is None:
        return _encode_whole(tokenizer, messages, None)
    count, longest = _FIRST_MESSAGES, max(_FIRST_CHARACTERS * limit, 1 << 14)
    while count < len(messages) or any(len(message["content"]) > longest for message in messages):
        part = [{**message, "content": message["content"][:longest]} for message in messages[:count]]
        if any(message["role"] == "assistant" for message in part):
            found = _encode_whole(tokenizer, part, limit + MARGIN)
            if len(found.ids) >= limit + MARGIN:
                left = sum(message["role"] == "assistant" for message in messages[count:])
                behind = (len(found.ids), len(found.ids) + 1)
                return found._replace(answers=(*found.answers, *[behind] * left))
        count, longest = 2 * count, 2 * longest
    return _encode_whole(tokenizer, messages, limit)


def _encode_whole(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], limit: int | None
) -> ChatTokens:
    """`encode_answers` of all messages."""
    last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
    text = render(tokenizer, messages[: last + 1], answer=False)
    _refuse_left_out(tokenizer, messages[: last + 1], text)
    borders = []  # in characters
    for place in range(last + 1):
        if messages[place]["role"] == "assistant":
            before = render(tokenizer, messages[:place])
            whole = text if place == last else render(tokenizer, messages[: place + 1], answer=False)
            if not whole.startswith(before) or not text.startswith(whole):
                raise UserError(
                    "the tokenizer's chat template renders a message otherwise when another follows it, so that what "
                    "the model is asked is no beginning of what it would be trained on: pass another by "
                    "--chat-template."
                )
            borders.append((len(before), len(whole)))
    found = tokenizer.encode_template(text, limit=None if limit is None else limit + 1)
    ids = found.ids
    starts = _borders(tokenizer, text, found, sorted({border for pair in borders for border in pair}))
    special = set(tokenizer.special_ids.values())
    answers, ended = [], True
    for first, end in borders:
        start, stop = starts[first], starts[end]
        if limit is not None and stop == len(ids) > limit:
            answers.append((max(start, 1), stop + 1))  # it goes on behind what was encoded
            continue
        ends = [place for place in range(start, stop) if ids[place] in special]
        ended = ended and bool(ends)
        # what follows the last special token is the template's, as the line end after ChatML's <|im_end|>
        answers.append((max(start, 1), ends[-1] + 1 if ends else stop))
    return ChatTokens(ids, tuple(answers), ended)


def render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], answer: bool = True) -> str:
    """The text that the template makes of a conversation. answer: with the beginning of the model's answer."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template: add one to its tokenizer_config.json (zinit train takes one by "
            "--chat-template), or ask with --instruction or --prompt."
        )
    try:
        template = _compiled(tokenizer.chat_template)
        values = {
            "messages": list(messages),
            "add_generation_prompt": answer,
            "tools": None,
            "documents": None,
        }
        text: str = template.environment.render(template, dict(tokenizer.named) | values)
        return text
    except (
        TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
        MemoryError,
    ) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(f"the tokenizer's chat template cannot be rendered: {reason}.") from None


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    from jinja2.ext import Extension

    from .chat_sandbox import Sandbox

    class Generation(Extension):
        """transformers' {% generation %} marks answers; they are found by their borders here, so it stands for its
        content."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.bound_filters()
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment.from_string(template)


def _borders(tokenizer: Tokenizer, text: str, whole: Encoded, borders: Iterable[int]) -> dict[int, int]:
    """How many of a text's tokens belong to its first so many characters, for each of these numbers.

    It is where the tokens of the beginning, encoded alone, part from those of the text: a tokenizer may merge across
    the border. The beginning is encoded from the last special token before the border on.
    """
    special = set(tokenizer.special_ids.values())
    tokens = [place for place, id in enumerate(whole.ids) if id in special]
    counts = {}
    for border in borders:
        before = bisect_right(tokens, border, key=lambda place: whole.spans[place][1])
        first = tokens[before - 1] if before else 0
        start = whole.spans[first][0] if before else 0
        alone = tokenizer.encode_template(text[start:border], limit=len(whole.ids) - first + 1).ids
        pairs = enumerate(zip(alone, whole.ids[first:], strict=False))
        shorter = min(len(alone), len(whole.ids) - first)
        counts[border] = first + next((index for index, (ours, other) in pairs if ours != other), shorter)
    return counts


def _unused_character(messages: Sequence[Mapping[str, str]]) -> str:
    """One that no message holds: of those that Unicode leaves to programs' own use."""
    used = set().union(*(message["content"] for message in messages))
    return next(chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)


def _marked(content: str, names: Iterable[str], mark: str) -> str:
    """A message with a mark within every special token's name that it spells, and where its ends could be part of one
    that the template, or the next message, completes. Elsewhere it is as it was, because templates look into it.
    """
    places: set[int] = set()
    for name in names:
        if name in content:
            if len(name) == 1:
                raise UserError(
                    f"the message holds {name!r}, which the chat template would take for its own token."
                )
            places |= {match.start() + 1 for match in re.finditer(f"(?={re.escape(name)})", content)}
        if any(content.endswith(name[:length]) for length in range(1, len(name))):
            places.add(len(content))
        if any(content.startswith(name[length:]) for length in range(1, len(name))):
            places.add(0)
    ends = [0, *sorted(places), len(content)]
    return (
        mark.join(content[first:last] for first, last in zip(ends, ends[1:], strict=False))
        if places
        else content
    )


def _refuse_special_tokens(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> None:
    for message in messages:
        for name in tokenizer.special_ids:
            if name in message["content"]:
                raise SpecialTokenInText(
                    f"the message holds {name!r}, which the chat template would take for its own token."
                )


def _refuse_left_out(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], text: str) -> None:
    """Raises UserError if a message is not in the text, for instance because the template has other names of roles."""
    position = 0
    for message in messages:
        content = message["content"].strip()
        position = text.find(content, position)
        if position < 0:
            named = roles_named(tokenizer.chat_template or "")
            names = f" (it names the roles {', '.join(named)})" if named else ""
            raise UserError(
                f"the tokenizer's chat template leaves out or changes the message of the role {message['role']!r}"
                f"{names}: it must take system, user and assistant."
            )
        position += len(content)


def roles_named(template: str) -> list[str]:
    """The names that a template compares roles with."""
    role = r"(?:\brole|\[\s*['\"]role['\"]\s*\])"
    found = re.findall(rf"{role}\s*[=!]=\s*['\"](\w+)['\"]", template)
    return sorted(set(found))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, with transformers' options; Jinja's own filter writes <, > and & for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
