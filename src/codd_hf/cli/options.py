"""Flags from the fields of a dataclass, and a dataclass from flags."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection
from dataclasses import fields
from typing import TypeVar

KINDS = {"int": int, "float": float, "str": str}

Settings = TypeVar("Settings")


def add_fields(
    parser: argparse.ArgumentParser, settings: type, required: Collection[str] = ()
) -> None:
    """A flag for each field; its help is the field's entry among the docstring's `Attributes`."""
    helps: dict[str, str] = {}
    for base in reversed(settings.__mro__):
        entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", base.__doc__ or "", re.MULTILINE)
        helps |= {name: " ".join(text.split()).rstrip(".") for name, text in entries}
    for field in fields(settings):
        kind, default, text = field.type.split(" |")[0], field.default, helps[field.name]
        options = {"default": default, "required": field.name in required}
        if kind == "bool":
            options["action"] = argparse.BooleanOptionalAction
        elif kind.startswith("Sequence"):
            options |= {"nargs": "*", "type": KINDS[kind[9:-1]]}
        else:
            options["type"] = KINDS[kind]
        if default and "default" not in text:
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            text += f" (default {shown})"
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, help=text.replace("%", "%%"), **options)


def settings_of(args: argparse.Namespace, settings: type[Settings]) -> Settings:
    """The dataclass of parsed flags; a value that cannot be is bad usage."""
    try:
        return settings(**{field.name: getattr(args, field.name) for field in fields(settings)})
    except (TypeError, ValueError) as error:
        return args.usage_error(str(error))
