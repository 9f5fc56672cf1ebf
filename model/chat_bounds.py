"""How large what an operation of a chat template makes can be, told before it is made.

Most operations make no more than they are given. Those here multiply it: `'%999999999d' % 1` asks for a gigabyte at
once, and `text.replace('a', text)` makes the square of a text's length. Each function returns a number of characters,
which is the right one or above it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

_DEEPEST = 40  # lists within lists that are made a text
_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\d+|\*)?(?:\.(\d+|\*))?")
_FIELD = re.compile(r"\{[^{}:]*:?([^}]*)")
_LINK = 60  # characters that urlize adds to a link, beside those that it is given


def printed_length(value: Any, most: int, depth: int = 0) -> int:
    """The characters of a value as a text. Stops counting above `most`: a list may hold one text a million times."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3 + 2
    if isinstance(value, Mapping):
        value = chain(value.keys(), value.values())
    elif not isinstance(value, (list, tuple, set, frozenset)):
        return 40
    if depth == _DEEPEST:
        return most + 1
    total = 2
    for item in value:
        total += 4 + (len(item) if isinstance(item, str) else printed_length(item, most - total, depth + 1))
        if total > most:
            break
    return total


def _longest(values: Iterable[Any], most: int) -> int:
    return max((printed_length(value, most) for value in values), default=0)


def _number(text: str, stars: int) -> int:
    if text == "*":
        return stars
    return int(text[:12] or 0)  # Python refuses longer ones


def percent_length(form: Any, values: Any, most: int) -> int:
    """`form % values`, and the filter format."""
    text = form.decode("latin-1") if isinstance(form, bytes) else str(form)
    given = (
        list(values.values())
        if isinstance(values, Mapping)
        else list(values)
        if isinstance(values, tuple)
        else [values]
    )
    widest = max((abs(value) for value in given if isinstance(value, int)), default=0)
    fields = [match.groups(default="") for match in _PERCENT.finditer(text)]
    widths = sum(_number(width, widest) + _number(precision, widest) for width, precision in fields)
    return len(text) + widths + len(fields) * _longest(given, most)


def format_length(form: str, args: Iterable[Any], kwargs: Mapping[str, Any], most: int) -> int:
    """`form.format(*args, **kwargs)`; a width may be a field of its own: `'{:{}}'.format(1, 99)`."""
    given = [*args, *kwargs.values()]
    if len(given) == 1 and isinstance(given[0], Mapping):  # format_map
        given = list(given[0].values())
    numbers = [int(value) for value in given if isinstance(value, int)]
    numbers += [
        int(digits[:12]) for value in given if isinstance(value, str) for digits in re.findall(r"\d+", value)
    ]
    widest = max(map(abs, numbers), default=0)
    specs = _FIELD.findall(form)
    widths = sum(int(digits[:12]) for spec in specs for digits in re.findall(r"\d+", spec))
    nested = sum("{" in spec for spec in specs)
    return len(form) + widths + nested * widest + len(specs) * _longest(given, most)


def _replace(most: int, text: str, old: str = "", new: str = "", *_: Any, **__: Any) -> int:
    old, new = str(old), str(new)
    return len(text) + str(text).count(old) * max(len(new) - len(old), 0)


def _join(most: int, values: Any, d: Any = "", *_: Any, **__: Any) -> int:
    count = len(values) if hasattr(values, "__len__") else most
    length = printed_length(values, most) if hasattr(values, "__len__") else 0
    return length + count * len(str(d))


def _join_method(most: int, separator: str, values: Any) -> int:
    return _join(most, values, separator)


def _translate(most: int, text: str, table: Any) -> int:
    return len(text) * max(_longest(table.values(), most) if isinstance(table, Mapping) else 1, 1)


def _expandtabs(most: int, text: str, tabsize: int = 8) -> int:
    return len(text) + text.count("\t") * int(tabsize)


def _indent(most: int, text: Any, width: Any = 4, *_: Any, **__: Any) -> int:
    step = len(width) if isinstance(width, str) else int(width)
    return len(str(text)) + (str(text).count("\n") + 1) * step


def _wordwrap(most: int, text: Any, width: int = 79, *rest: Any, **named: Any) -> int:
    between = named.get("wrapstring", rest[1] if len(rest) > 1 else None)
    return len(str(text)) * (1 + len(between or ""))


def _urlize(most: int, text: Any, *rest: Any, **named: Any) -> int:
    added = sum(len(value) for value in (*rest, *named.values()) if isinstance(value, str))
    return len(str(text)) + (len(str(text)) // 4 + 1) * (added + _LINK)


def _to_json(
    most: int,
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> int:
    length = printed_length(value, most) * (6 if ensure_ascii else 1)  # \u0000
    step = len(indent) if isinstance(indent, str) else int(indent or 0)
    step += sum(len(text) for text in separators or () if isinstance(text, str))
    return length + length // 4 * step


def _format(most: int, form: Any, *args: Any, **kwargs: Any) -> int:
    return percent_length(form, kwargs or args, most)


def _sum(most: int, values: Any, attribute: Any = None, start: Any = 0) -> int:
    return 0 if isinstance(start, (int, float)) else most + 1  # lists: each sum is a copy of the one before


def _printed(most: int, value: Any, *_: Any, **__: Any) -> int:
    return printed_length(value, most)


# (most, what the filter is given) -> characters
FILTERS: dict[str, Callable[..., int]] = {
    "format": _format, "indent": _indent, "join": _join, "replace": _replace, "sum": _sum, "tojson": _to_json,
    "urlize": _urlize, "wordwrap": _wordwrap,
    **dict.fromkeys(
        ("capitalize", "center", "e", "escape", "forceescape", "lower", "pprint", "safe", "string", "striptags",
         "title", "trim", "truncate", "upper", "urlencode", "wordcount", "xmlattr"),
        _printed,
    ),
}  # fmt: skip
# methods of str; format and format_map are Jinja's own
METHODS: dict[str, Callable[..., int]] = {
    "expandtabs": _expandtabs, "join": _join_method, "replace": _replace, "translate": _translate,
}  # fmt: skip
