"""The bodies of OpenAI's /v1/completions and /v1/chat/completions, read and checked.

A field that this server does not know is refused if it asks for something: an answer that leaves it out would be
another one than was asked for. It passes where it is switched off (null, false, 0, empty), or changes nothing in the
answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from zinit_kernels.checkpoints import CheckpointError
from zinit_kernels.checkpoints.json_files import parse_object
from zinit_kernels.console import shortened, shown

from ..sampling import NUM_SEEDS
from .errors import ApiError
from .request import MOST_CHOICES, MOST_LOGPROBS

MOST_STOPS = 16
LONGEST_STOP = 1024  # characters
COMPLETION_TOKENS = 16  # that /v1/completions makes unless told
# What a body may hold. Python reads JSON in one piece, so a body of many values takes memory and holds up everybody: of
# 64 MiB, 22 million empty lists took 1.8 GB, and 4 million names in one object 1.2 GB and 9 s. Signs in texts count
# too: no context holds so many.
_MOST = {"lists and objects": (b"[{", 1 << 18), "names": (b":", 1 << 18), "values": (b",", 1 << 20)}
_NO_EFFECT = frozenset(
    (
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "parallel_tool_calls",
    )
)
# fields that ask for nothing at these values
_OFF = {
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tool_choice": ("none", "auto"),
    "best_of": (1,),
    "top_k": (-1,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Asked:
    """A request of either kind. Exactly one of `prompts` and `messages` is given."""

    model: str
    prompts: list[str | list[int]]
    messages: list[dict[str, str]] | None
    images: list[str]  # data URLs, in the order of the messages
    max_tokens: int | None  # None = what the context has room for
    temperature: float
    top_p: float
    n: int
    seed: int | None
    stop: tuple[str, ...]
    logprobs: int | None
    stream: bool
    include_usage: bool
    ignore_eos: bool

    @property
    def is_chat(self) -> bool:
        return self.messages is not None


class _Fields:
    """The fields of a body. Each is taken once; what is left at the end was not understood."""

    def __init__(self, body: Mapping[str, Any]):
        self._left = dict(body)

    def take(self, name: str, is_right: Callable[[Any], bool], what: str, default: Any) -> Any:
        """A field's value, the default where it is absent or null. Raises ApiError unless it is `what`."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not is_right(value):
            raise ApiError(400, f"{name} must be {what}, got {shown(value)}.", param=name)
        return value

    def flag(self, name: str) -> bool:
        return bool(self.take(name, lambda value: isinstance(value, bool), "true or false", False))

    def whole(self, name: str, least: int, most: int, default: int | None = None) -> int | None:
        what = f"a whole number from {least} to {most}"
        found = self.take(name, lambda v: _is_whole(v) and least <= v <= most, what, default)
        return None if found is None else int(found)

    def number(self, name: str, is_right: Callable[[float], bool], what: str, default: float) -> float:
        return float(self.take(name, lambda v: _is_number(v) and is_right(v), what, default))

    def refuse_the_rest(self) -> None:
        for name, value in self._left.items():
            if name in _NO_EFFECT or value in (None, False, 0, "") or value in ([], {}):
                continue
            if value in _OFF.get(name, ()):
                continue
            name = shortened(name, 60)
            raise ApiError(400, f"{name} = {shown(value)} is not supported: leave it out.", param=name)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises ApiError for anything else."""
    for what, (signs, most) in _MOST.items():
        # iterating bytes gives numbers, which count() takes
        if sum(body.count(sign) for sign in signs) > most:
            raise ApiError(413, f"the body has more than {most} {what}.")
    try:
        return parse_object(body, "the body of the request")
    except CheckpointError as error:
        raise ApiError(400, f"{error}.") from None


def read_completion(body: Mapping[str, Any]) -> Asked:
    """A body of /v1/completions. Raises ApiError."""
    fields = _Fields(body)
    prompts = _prompts(fields)
    logprobs = fields.whole("logprobs", 0, MOST_LOGPROBS)
    max_tokens = fields.whole("max_tokens", 1, 1 << 31, COMPLETION_TOKENS)
    return _asked(fields, prompts, None, [], max_tokens, logprobs)


def read_chat(body: Mapping[str, Any]) -> Asked:
    """A body of /v1/chat/completions. Raises ApiError."""
    fields = _Fields(body)
    messages, images = _messages(fields)
    wants = fields.flag("logprobs")
    most = fields.whole("top_logprobs", 0, MOST_LOGPROBS)
    if most and not wants:
        raise ApiError(400, "top_logprobs needs logprobs = true.", param="top_logprobs")
    limits = [fields.whole(name, 1, 1 << 31) for name in ("max_completion_tokens", "max_tokens")]
    given = [limit for limit in limits if limit is not None]
    return _asked(fields, [], messages, images, min(given, default=None), (most or 0) if wants else None)


def _asked(
    fields: _Fields,
    prompts: list[str | list[int]],
    messages: list[dict[str, str]] | None,
    images: list[str],
    max_tokens: int | None,
    logprobs: int | None,
) -> Asked:
    model = fields.take("model", lambda v: isinstance(v, str) and v != "", "the name of a model", None)
    if model is None:
        raise ApiError(
            400, "model is missing: name an adapter, or the base (GET /v1/models lists them).", param="model"
        )
    stream = fields.flag("stream")
    options = fields.take("stream_options", lambda v: isinstance(v, dict), "an object", {})
    nested = _Fields(options)
    include_usage = nested.flag("include_usage")
    nested.flag("include_obfuscation")
    nested.refuse_the_rest()
    n = fields.whole("n", 1, MOST_CHOICES, 1)
    assert n is not None
    if n * max(len(prompts), 1) > MOST_CHOICES:
        raise ApiError(
            400,
            f"a request may have {MOST_CHOICES} answers, this one asks for {n * len(prompts)}.",
            param="n",
        )
    if fields.take("best_of", _is_whole, "a whole number", n) not in (1, n):
        raise ApiError(
            400, "best_of is not supported: leave it out, or give it the value of n.", param="best_of"
        )
    seed = fields.whole("seed", -(1 << 63), (1 << 63) - 1)
    asked = Asked(
        model=model,
        prompts=prompts,
        messages=messages,
        images=images,
        max_tokens=max_tokens,
        temperature=fields.number("temperature", lambda v: v >= 0, "a number from 0 on", 1.0),
        top_p=fields.number("top_p", lambda v: 0 < v <= 1, "a number above 0, at most 1", 1.0),
        n=n,
        seed=None if seed is None else seed % NUM_SEEDS,
        stop=_stops(fields),
        logprobs=logprobs,
        stream=stream,
        include_usage=include_usage,
        ignore_eos=fields.flag("ignore_eos"),
    )
    fields.refuse_the_rest()
    return asked


def _stops(fields: _Fields) -> tuple[str, ...]:
    def is_right(value: Any) -> bool:
        texts = [value] if isinstance(value, str) else value
        return (
            isinstance(texts, list)
            and len(texts) <= MOST_STOPS
            and all(isinstance(text, str) and 1 <= len(text) <= LONGEST_STOP for text in texts)
        )

    what = f"a text or up to {MOST_STOPS} of them, each of 1 to {LONGEST_STOP} characters"
    found = fields.take("stop", is_right, what, [])
    return (found,) if isinstance(found, str) else tuple(found)


def _prompts(fields: _Fields) -> list[str | list[int]]:
    """Of the four forms: a text, texts, token ids, lists of token ids."""

    def are_ids(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(map(_is_whole, value))

    def is_right(value: Any) -> bool:
        if isinstance(value, str) or are_ids(value):
            return True
        return (
            isinstance(value, list)
            and 1 <= len(value) <= MOST_CHOICES
            and (all(isinstance(one, str) for one in value) or all(map(are_ids, value)))
        )

    what = f"a text, a list of token ids, or a list of up to {MOST_CHOICES} of either"
    value = fields.take("prompt", is_right, what, None)
    if value is None:
        raise ApiError(400, "prompt is missing.", param="prompt")
    return [value] if isinstance(value, str) or are_ids(value) else list(value)


def _messages(fields: _Fields) -> tuple[list[dict[str, str]], list[str]]:
    given = fields.take("messages", lambda v: isinstance(v, list) and v != [], "a list of messages", None)
    if given is None:
        raise ApiError(400, "messages is missing.", param="messages")
    messages: list[dict[str, str]] = []
    images: list[str] = []
    for place, message in enumerate(given):
        where = f"messages[{place}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"{where} must be an object, got {shown(message)}.", param=where)
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise ApiError(
                400, f"{where}.role must be one of {', '.join(_ROLES)}, got {shown(role)}.", param=where
            )
        for name, value in message.items():
            if (
                name not in ("role", "content", "name")
                and value not in (None, False, 0, "")
                and value not in ([], {})
            ):
                raise ApiError(
                    400, f"{where}.{shortened(name, 60)} is not supported: leave it out.", param=where
                )
        text, urls = _content(message.get("content"), where)
        if urls and role != "user":
            raise ApiError(400, f"{where}: only messages of the user may hold images.", param=where)
        messages.append({"role": _ROLES[role], "content": text})
        images += urls
    return messages, images


def _content(content: Any, where: str) -> tuple[str, list[str]]:
    """The text of a message, and the addresses of its images."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise ApiError(
            400, f"{where}.content must be a text or a list of parts, got {shown(content)}.", param=where
        )
    texts: list[str] = []
    urls: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        inner = part.get(kind) if isinstance(kind, str) else None
        if kind == "text" and isinstance(inner, str):
            texts.append(inner)
        elif kind == "image_url" and isinstance(inner, dict) and isinstance(inner.get("url"), str):
            urls.append(inner["url"])
        else:
            what = '{"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": ...}}'
            raise ApiError(400, f"a part of {where}.content must be {what}, got {shown(part)}.", param=where)
    return "".join(texts), urls
