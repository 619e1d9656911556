"""Dataclasses whose annotations say which values a setting takes, and whose strings explain it."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin
from typing import get_type_hints as type_hints


class Range(NamedTuple):
    """Bounds of a number, both included."""

    low: float
    high: float = math.inf


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**40)]  # what is added to it leaves torch's range open
Positive = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
NOUNS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}


@dataclass(frozen=True)
class Setting:
    """One field of a settings class.

    Attributes:
        kind: `int`, `float`, `bool`, `str`, `list`, or a settings class.
        entry: of a list.
        choices: the words that it may be; any if empty.
        bounds: of a number.
        optional: whether None is a value.
        default: its value if it is not set; `MISSING` if it must be.
        doc: what it means.
    """

    kind: type
    entry: Setting | None
    choices: tuple[str, ...]
    bounds: Range
    optional: bool
    default: Any
    doc: str

    def checked(self, name: str, value: Any) -> Any:
        """A value as it is kept: numpy's numbers become Python's.

        Raises:
            ValueError: it is none of this setting's; the message names the setting.
        """

        def refuse(wanted: str) -> NoReturn:
            from .arguments import shown  # imports torch, for which no help waits

            raise ValueError(f"`{name}` must be {wanted}, got {shown(value)}.")

        if value is None and self.optional:
            return None
        if self.kind in (int, float):
            number = isinstance(value, Integral if self.kind is int else Real)
            if not number or isinstance(value, bool) or not -math.inf < value < math.inf:
                refuse(NOUNS[self.kind])
            if value < self.bounds.low:
                refuse(f"at least {self.bounds.low}")
            if value > self.bounds.high:
                refuse(f"at most {self.bounds.high}")
            return self.kind(value)
        if not isinstance(value, (list, tuple) if self.kind is list else self.kind):
            refuse(
                "a list" if self.kind is list else NOUNS.get(self.kind, f"a {self.kind.__name__}")
            )
        if self.kind is list:
            return [self.entry.checked(name, entry) for entry in value]
        if self.choices and value not in self.choices:
            refuse(f"one of {', '.join(self.choices)}")
        return value


class Settings:
    """A dataclass with this base checks its values when it is made."""

    def __post_init__(self) -> None:
        for name, setting in settings_of(type(self)).items():
            # Of frozen dataclasses too.
            object.__setattr__(self, name, setting.checked(name, getattr(self, name)))


@cache
def settings_of(kind: type) -> dict[str, Setting]:
    """The settings of a settings class by name."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base):
            docs |= _field_docs(base)
    hints = type_hints(kind, include_extras=True)
    return {
        field.name: _setting(
            hints[field.name],
            field.default if field.default_factory is MISSING else field.default_factory(),
            docs.get(field.name, ""),
        )
        for field in fields(kind)
    }


def _setting(hint: Any, default: Any = MISSING, doc: str = "") -> Setting:
    optional = get_origin(hint) in (Union, UnionType)
    if optional:
        hint = next(part for part in get_args(hint) if part is not NoneType)
    entry, choices, bounds = None, (), Range(-math.inf)
    if get_origin(hint) is Annotated:
        hint, bounds = get_args(hint)
    if get_origin(hint) is list:
        entry, hint = _setting(*get_args(hint)), list
    elif get_origin(hint) is Literal:
        choices, hint = get_args(hint), str
    return Setting(hint, entry, choices, bounds, optional, default, doc)


def _field_docs(kind: type) -> dict[str, str]:
    """The strings below the fields of a class."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    docs = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            docs[field.target.id] = " ".join(below.value.value.split())
    return docs
