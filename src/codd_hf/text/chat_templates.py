"""Chat templates that come with a tokenizer, rendered in bounded time and memory.

A template is a program: it may loop for ever, or ask for all memory at once. transformers renders
it in jinja2's sandbox, which bounds neither. Here that sandbox gets bounds: the clock is looked at
in every step of a loop and at every call, and no value becomes larger than any prompt is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

SECONDS = 5.0
MOST_CHARACTERS = 1 << 22
"""Of a template and of any value in it: as text, or as elements of lists and what they hold."""
MOST_WORK = 1 << 27
"""Characters that one method or filter may have to make."""
MOST_BITS = 1 << 12
SIZED_FILTERS = {
    *("batch", "center", "format", "indent", "join", "pprint", "replace", "round", "slice"),
    *("tojson", "urlize", "wordwrap", "xmlattr"),
}
"""Those whose result may be much larger than what they are given."""
WIDE_FIELD = re.compile(r"[%{][^%{}]*(\d{6}|\*)")
_end: ContextVar[float | None] = ContextVar("end of the time of a template", default=None)


@contextmanager
def bounded_templates() -> Iterator[None]:
    """Inside, transformers renders chat templates within bounds; beyond, jinja2's `TemplateError`.

    Outside they are as they always are, for others too who render the same template meanwhile.
    """
    chat_template_utils._compile_jinja_template = _compiled
    token = _end.set(monotonic() + SECONDS)
    try:
        yield
    finally:
        _end.reset(token)


class _Sandbox(ImmutableSandboxedEnvironment):
    """transformers' environment for templates, with bounds."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    @classmethod
    def of(cls, environment: ImmutableSandboxedEnvironment) -> _Sandbox:
        """An environment with the same filters, globals and extensions."""
        bounded = environment.overlay()
        bounded.__class__ = cls
        bounded.filters = {name: _bounded(name, f) for name, f in environment.filters.items()}
        bounded.filters |= {"_steps": _steps, "_checked": _checked}
        bounded.globals = {k: v for k, v in environment.globals.items() if k != "lipsum"}
        bounded.finalize = _checked
        return bounded

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Bounds().visit(super()._parse(source, name, filename))

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        kept, number = [], 0
        for piece in pieces:
            kept.append(piece)
            number += len(piece)
            _look(number)
        return "".join(kept)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "*" and numbers:
            _look_at_bits(left.bit_length() + right.bit_length())
        elif operator == "*":
            factors = [
                value if isinstance(value, int | float) else size(value) for value in (left, right)
            ]
            _look(factors[0] * factors[1])
        elif operator == "**" and numbers:
            _look_at_bits(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str) and WIDE_FIELD.search(left):
            _refuse()
        return _checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | int | float | list | tuple | dict):
            _look_at_work(owner, *args, *kwargs.values())
            if method.__name__.startswith("format") and WIDE_FIELD.search(owner):
                _refuse()
        _look()
        return _checked(super().call(__context, __obj, *args, **kwargs))


class _Bounds(NodeTransformer):
    """Puts looks at the clock into loops, and at sizes where text is joined."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_steps")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        node.nodes = [_filtered(part, "_checked") for part in node.nodes]
        return _filtered(node, "_checked")


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    made = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
    return made.set_environment(node.environment)


@functools.lru_cache
def _compiled(template: str) -> Any:
    """What transformers' function of this purpose gives, with bounds."""
    if _end.get() is not None:
        _look(len(template))
    environment = chat_template_utils._cached_compile_jinja_template("").environment
    return _Sandbox.of(environment).from_string(template)


def size(value: Any) -> int:
    """Characters and elements of a value and of what it holds; counted as far as is allowed."""
    number, todo = 0, [value]
    while todo and number <= MOST_CHARACTERS:
        value = todo.pop()
        number += 1
        if isinstance(value, str | bytes):
            number += len(value)
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            todo += value
    return number


def _look(number: int = 0) -> None:
    """Raises where a number of characters is too large, or the time is over."""
    end = _end.get()
    if end is None:
        return
    if number > MOST_CHARACTERS:
        _refuse()
    if monotonic() > end:
        raise TemplateError(f"it takes longer than {SECONDS:g} seconds")


def _refuse() -> None:
    if _end.get() is not None:
        raise TemplateError(f"it makes more than {MOST_CHARACTERS:,} characters")


def _look_at_bits(number: int) -> None:
    if number > MOST_BITS:
        _refuse()


def _look_at_work(*values: Any) -> None:
    numbers = [abs(value) for value in values if isinstance(value, int)]
    sizes = sorted([1, 1, *(size(value) for value in values if not isinstance(value, int))])
    if sizes[-1] * max(sizes[-2], *numbers, 1) > MOST_WORK:
        _refuse()


def _checked(value: Any) -> Any:
    _look(size(value) if isinstance(value, str | bytes | list | tuple | set | dict) else 0)
    return value


def _steps(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _look()
        yield value


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at its arguments and its result."""

    @functools.wraps(function)
    def look_and_call(*args: Any, **kwargs: Any) -> Any:
        given = [*args[hasattr(function, "jinja_pass_arg") :], *kwargs.values()]
        if name in SIZED_FILTERS:
            _look_at_work(*given)
            if name == "format" and isinstance(given[0], str) and WIDE_FIELD.search(given[0]):
                _refuse()
        _checked(given[:1])
        return _checked(function(*args, **kwargs))

    return look_and_call
