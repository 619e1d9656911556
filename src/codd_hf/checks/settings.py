"""Dataclasses whose annotations say which values a setting takes, and whose strings explain it."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from .arguments import choice, flag, number, plain, shown


class Range(NamedTuple):
    """Bounds of a number, both included."""

    low: float
    high: float = math.inf


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**40)]  # what is added to it leaves torch's range open
Positive = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class Setting:
    """One field of a settings class: a number, a flag, a text, a list or settings of their own."""

    kind: type
    entry: Setting | None  # of a list
    choices: tuple[str, ...]  # the words that it may be; any if empty
    bounds: Range
    optional: bool  # whether None is a value
    default: Any  # MISSING if it must be set
    doc: str

    def checked(self, name: str, value: Any) -> Any:
        """A value as it is kept, numpy's numbers as Python's; raises a ValueError for any other."""
        if value is None and self.optional:
            return None
        value = plain(value)
        try:
            if self.kind in (int, float):
                return self.kind(number(name, value, *self.bounds, self.kind))
            if self.kind is bool:
                return flag(name, value)
            if self.entry is not None and isinstance(value, (list, tuple)):
                return [self.entry.checked(name, entry) for entry in value]
            if self.choices:
                choice(name, value, self.choices)
            elif not isinstance(value, self.kind):
                wanted = "text" if self.kind is str else self.kind.__name__
                raise ValueError(f"`{name}` must be a {wanted}, got {shown(value)}.")
        except TypeError as error:
            raise ValueError(str(error)) from None
        return value


class Settings:
    """A dataclass with this base checks its values when it is made."""

    def __post_init__(self) -> None:
        for name, setting in settings_of(type(self)).items():
            # Of frozen dataclasses too.
            object.__setattr__(self, name, setting.checked(name, getattr(self, name)))


def settings_of(kind: type) -> dict[str, Setting]:
    """The settings of a settings class by name."""
    return _settings_of(kind)


@cache
def _settings_of(kind: type) -> dict[str, Setting]:
    docs: dict[str, str] = {}
    for base in filter(is_dataclass, reversed(kind.__mro__)):
        docs |= _field_docs(base)
    hints, found = get_type_hints(kind, include_extras=True), {}
    for field in fields(kind):
        makes = field.default_factory
        default = field.default if makes is MISSING else makes()
        found[field.name] = _setting(hints[field.name], default, docs.get(field.name, ""))
    return found


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
    docs = {}
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    for pair in pairwise(ast.iter_child_nodes(definition)):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(str(doc))):
                docs[name] = " ".join(doc.split())
    return docs
