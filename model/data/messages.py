"""Conversations: OpenAI's messages and ShareGPT's turns, as messages with the roles system, user and assistant.

    {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
    {"system": "Be brief.", "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}

An assistant's message with "weight": 0 is not learned, as in OpenAI's format; the others are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import UserError
from ..records import check_fields, check_text

# The names that data sets give the three roles
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_FIELDS = ("messages", "conversations")  # where a record has its turns


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str  # system, user or assistant
    content: str
    learned: bool = True  # an assistant's message that is not is read and not trained on


class Conversation(NamedTuple):
    """The messages of one record, up to the last answer that is learned."""

    messages: tuple[Message, ...]
    where: str = ""  # file and line, for what is said about it

    @property
    def images(self) -> tuple[str, ...]:
        """Conversations about images are read by `model.vision.records`."""
        return ()


def is_conversation(value: object) -> bool:
    """Whether an object of a file is a conversation, and not an Alpaca record."""
    return isinstance(value, Mapping) and "instruction" not in value and _turns_field(value) is not None


def read_conversation(value: Mapping[str, Any], where: str, unused: Counter[str]) -> Conversation | None:
    """The conversation of one object; None if it has no answer to learn.

    Raises UserError for a role that is not known, for a conversation that begins with the assistant, and for what
    neither a role nor a text is in.
    """
    name = _turns_field(value)
    assert name is not None
    if name == "conversations" and ("image" in value or "images" in value):
        raise UserError(f"{where}: records with images need --encoder.")
    check_fields(dict(value), (name, "system"), where, unused)
    turns = value[name]
    if not isinstance(turns, list):
        raise UserError(
            f"{where}: the field {name!r} must be a list of messages, got a {type(turns).__name__}."
        )
    messages = [_message(turn, f"{where}, message {number}", unused) for number, turn in enumerate(turns, 1)]
    if value.get("system"):
        if messages and messages[0].role == "system":
            raise UserError(f"{where}: the field 'system' and a system message: keep one of them.")
        messages.insert(0, Message("system", check_text(value["system"], "system", where)))
    if any(message.role == "system" for message in messages[1:]):
        raise UserError(f"{where}: a system message must be the first of its conversation.")
    first = next((message.role for message in messages if message.role != "system"), None)
    if first == "assistant":
        raise UserError(
            f"{where}: the conversation begins with the assistant, and a chat template wants the user first: put a "
            "user's message before it, or take it out of the file."
        )
    learned = [place for place, message in enumerate(messages) if _is_learned(message)]
    return Conversation(tuple(messages[: learned[-1] + 1]), where) if learned else None


def _is_learned(message: Message) -> bool:
    return message.role == "assistant" and message.learned and bool(message.content.strip())


def _turns_field(value: Mapping[str, Any]) -> str | None:
    return next((name for name in _FIELDS if value.get(name) is not None), None)


def _message(turn: object, where: str, unused: Counter[str]) -> Message:
    if not isinstance(turn, Mapping):
        raise UserError(
            f"{where}: a message must be an object with role and content, got a {type(turn).__name__}."
        )
    role_field, text_field = ("from", "value") if "from" in turn else ("role", "content")
    if role_field not in turn or text_field not in turn:
        has = ", ".join(map(repr, turn)) or "nothing"
        raise UserError(f"{where}: a message must have role and content, or from and value (it has {has}).")
    weight = turn.get("weight")
    if weight is not None and (weight not in (0, 1) or isinstance(weight, bool)):
        raise UserError(f"{where}: the weight of a message must be 0 or 1, got {weight!r}.")
    check_fields(dict(turn), (role_field, text_field, "weight"), where, unused)
    role = turn[role_field]
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(
            f"{where}: the role {role!r} is not known; the roles are system, user (human) and assistant (gpt)."
        )
    return Message(ROLES[role], _content(turn[text_field], text_field, where), weight != 0)


def _content(content: object, name: str, where: str) -> str:
    """The text of a message: a string, or OpenAI's list of text parts."""
    if content is None:
        return ""
    if isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise UserError(f"{where}: a part of the content is {kind!r}, and only text is read here.")
            parts.append(check_text(part.get("text"), "text", where))
        return "".join(parts)
    return check_text(content, name, where)
