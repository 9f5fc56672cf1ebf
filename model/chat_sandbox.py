"""A sandbox for chat templates, which are programs from downloaded folders: what it renders ends, and is no larger than
memory.

Jinja's own sandbox keeps a template from Python's internals, and bounds `range`. It bounds neither loops within loops,
nor what operators, filters and methods make: `{{ 'a' * 10 ** 10 }}`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import TemplateError
from jinja2.compiler import CodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_STEPS = 1_000_000  # lines and calls, about 1 s; a conversation of 1,000 messages takes some 20,000
MOST_CHARACTERS = (
    1 << 24
)  # of a text, or items of a list; also the largest number that a filter or method is given
MOST_BITS = 1 << 16  # of a whole number


class _Generator(CodeGenerator):
    def visit_Concat(self, node: Any, frame: Any) -> None:
        """`a ~ b`, through `Sandbox.joined`."""
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's environment for templates that nobody has read. Beyond a bound they raise TemplateError."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    code_generator_class = _Generator

    def render(self, template: Any, values: dict[str, Any]) -> str:
        """The text of a template of this environment."""
        pieces, length = [], 0
        with _counted_steps():
            for piece in template.generate(values):
                length += len(piece)
                if length > MOST_CHARACTERS:
                    raise TemplateError(f"it makes a text of more than {MOST_CHARACTERS:,} characters")
                pieces.append(piece)
        return "".join(pieces)

    def bound_filters(self) -> None:
        """Bounds what the filters take and make; called when all of them are there."""
        self.filters = {name: _bounded_function(function) for name, function in self.filters.items()}

    def joined(self, parts: tuple[Any, ...]) -> str:
        """The operator ~."""
        return str(_bounded("".join(map(str, parts))))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator of `intercepted_binops`."""
        is_whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and is_whole and left.bit_length() * right > MOST_BITS:
            raise TemplateError(f"it makes a number of more than {MOST_BITS:,} bits")
        if operator == "*":
            for what, times in ((left, right), (right, left)):
                if isinstance(times, int) and hasattr(what, "__len__"):
                    _check_length(len(what) * times)
        return _bounded(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """A call of a function or method in a template."""
        _check_arguments(args, kwargs)
        return _bounded(super().call(context, function, *args, **kwargs))


def _bounded_function(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # with Jinja's mark of what is passed first
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(args, kwargs)
        return _bounded(function(*args, **kwargs))

    return bounded


def _check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > MOST_CHARACTERS:
            raise TemplateError(f"it gives a function a number above {MOST_CHARACTERS:,}")


def _bounded(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise TemplateError(f"it makes a number of more than {MOST_BITS:,} bits")
    if isinstance(value, (str, bytes, list, tuple, dict)):
        _check_length(len(value))
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
