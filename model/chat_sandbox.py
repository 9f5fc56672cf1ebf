"""A sandbox for chat templates, which are programs from downloaded folders: what it renders ends, and is no larger than
memory.

Jinja's own sandbox keeps a template from Python's internals, and bounds `range`. It bounds neither loops within loops,
nor what operators, filters and methods make: `{{ 'a' * 10 ** 10 }}`. Three things are bounded here: the steps, the size
of each text or list (before it is made, where chat_bounds.py knows how), and the bytes of all of them together.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import TemplateError
from jinja2.compiler import CodeGenerator
from jinja2.nodes import Slice
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .chat_bounds import FILTERS, METHODS, format_length, percent_length, printed_length

MOST_STEPS = 1_000_000  # lines and calls, about 1 s; a conversation of 1,000 messages takes some 20,000
MOST_CHARACTERS = (
    1 << 24
)  # of a text, or items of a list; also the largest number that a filter or method is given
MOST_BITS = 1 << 16  # of a whole number
MOST_BYTES = 1 << 29  # of all texts and lists that one rendering makes: a template may keep each of them


class _Made(threading.local):
    """What the rendering in this thread has made until now."""

    bytes = 0


_made = _Made()


class _Generator(CodeGenerator):
    def visit_Concat(self, node: Any, frame: Any) -> None:
        """`a ~ b`, through `Sandbox.joined`."""
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: Any, frame: Any) -> None:
        """`a[b:c]`, which is a copy, through `Sandbox.sliced`."""
        if not isinstance(node.arg, Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.sliced(")
        self.visit(node.node, frame)
        self.write(", slice(")
        for place, part in enumerate((node.arg.start, node.arg.stop, node.arg.step)):
            self.write(", " * (place > 0))
            self.write("None") if part is None else self.visit(part, frame)
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's environment for templates that nobody has read. Beyond a bound they raise TemplateError."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    code_generator_class = _Generator

    def __init__(self, **options: Any):
        super().__init__(finalize=_printable, **options)

    def render(self, template: Any, values: dict[str, Any]) -> str:
        """The text of a template of this environment."""
        pieces, length = [], 0
        _made.bytes = 0
        with _counted_steps():
            for piece in template.generate(values):
                length += len(piece)
                if length > MOST_CHARACTERS:
                    raise TemplateError(f"it makes a text of more than {MOST_CHARACTERS:,} characters")
                pieces.append(piece)
        return "".join(pieces)

    def bound_filters(self) -> None:
        """Bounds what the filters take and make; called when all of them are there."""
        self.filters = {
            name: _bounded_filter(function, FILTERS.get(name)) for name, function in self.filters.items()
        }

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """What a block, a macro or {% set %} makes of its pieces."""
        parts = list(parts)
        _check_length(sum(map(len, parts)))
        return str(_bounded("".join(parts)))

    def joined(self, parts: tuple[Any, ...]) -> str:
        """The operator ~."""
        return self.concat(str(_printable(part)) for part in parts)

    def sliced(self, value: Any, part: slice) -> Any:
        """`value[first:last:step]`."""
        return _bounded(value[part])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator of `intercepted_binops`."""
        is_whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and is_whole and left.bit_length() * right > MOST_BITS:
            raise TemplateError(f"it makes a number of more than {MOST_BITS:,} bits")
        if operator == "*":
            for what, times in ((left, right), (right, left)):
                if isinstance(times, int) and hasattr(what, "__len__"):
                    _check_length(len(what) * times)
        if operator == "%" and isinstance(left, (str, bytes)):
            _check_length(percent_length(left, right, MOST_CHARACTERS))
        return _bounded(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` and `format_map`, which Jinja replaces by its own."""
        format = super().wrap_str_format(value)
        if format is None:
            return None

        @functools.wraps(format)
        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_length(format_length(value.__self__, args, kwargs, MOST_CHARACTERS))
            return format(*args, **kwargs)

        return bounded

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """A call of a function or method in a template."""
        _check_arguments(args, kwargs)
        text, name = getattr(function, "__self__", None), getattr(function, "__name__", None)
        if isinstance(text, (str, bytes)) and name in METHODS:
            args = _with_lists(args)
            _check_length(METHODS[name](MOST_CHARACTERS, text, *args, **kwargs))
        return _bounded(super().call(context, function, *args, **kwargs))


def _bounded_filter(function: Callable[..., Any], length: Callable[..., int] | None) -> Callable[..., Any]:
    """A filter with its arguments, and what it makes, within the bounds. length: of its text, if it makes one."""
    passed = (
        getattr(function, "jinja_pass_arg", None) is not None
    )  # the context or the environment comes first

    @functools.wraps(function)  # with Jinja's mark of what is passed first
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(args, kwargs)
        if length is not None:
            args = _with_lists(args)
            _check_length(length(MOST_CHARACTERS, *args[passed:], **kwargs))
        return _bounded(function(*args, **kwargs))

    return bounded


def _with_lists(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with lists in place of iterators, which could be counted only once."""
    return tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)


def _check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > MOST_CHARACTERS:
            raise TemplateError(f"it gives a function a number above {MOST_CHARACTERS:,}")


def _bounded(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise TemplateError(f"it makes a number of more than {MOST_BITS:,} bits")
    if isinstance(value, (str, bytes, list, tuple, dict)):
        _check_length(len(value))
        _made.bytes += sys.getsizeof(value)
        if _made.bytes > MOST_BYTES:
            raise TemplateError(f"its texts and lists take more than {MOST_BYTES:,} bytes")
    return value


def _printable(value: Any) -> Any:
    """A value that becomes a text, if that is not too long: a list may hold one text many times."""
    if not isinstance(value, (str, int)):
        _check_length(printed_length(value, MOST_CHARACTERS))
    return value


def _check_length(length: int) -> None:
    if length > MOST_CHARACTERS:
        raise TemplateError(f"it makes a text or list of more than {MOST_CHARACTERS:,} characters or items")


@contextmanager
def _counted_steps() -> Iterator[None]:
    """TemplateError after MOST_STEPS lines of a template, or calls, in this thread."""
    steps = 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > MOST_STEPS:
            raise TemplateError(f"it does not end within {MOST_STEPS:,} steps")
        return count if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)
