"""Flags from the fields of a settings class, and the settings from flags."""

from __future__ import annotations

import argparse
from dataclasses import MISSING
from typing import Any, TypeVar

from ..checks.settings import Setting, Settings, settings_of

Kind = TypeVar("Kind", bound=Settings)


def add_flag(parser: argparse.ArgumentParser, flag: str, setting: Setting, **options: Any) -> None:
    """A flag for one setting, with its explanation and its default as help."""
    text, shown = setting.doc.replace("%", "%%"), setting.default
    if shown not in (MISSING, None, [], False):
        text += f" (default {' '.join(map(str, shown)) if isinstance(shown, list) else shown})"
    if setting.kind is bool:
        options |= {"action": argparse.BooleanOptionalAction, "type": None, "metavar": None}
    elif setting.kind is list:
        options |= {"nargs": "*", "action": "extend"}
    options = {name: value for name, value in options.items() if value is not None}
    parser.add_argument(flag, help=text, **options)


def add_flags(parser: argparse.ArgumentParser, kind: type[Settings]) -> None:
    """A flag for each setting of a settings class."""
    for name, setting in settings_of(kind).items():
        required = True if setting.default is MISSING else None
        options = {"type": (setting.entry or setting).kind, "default": argparse.SUPPRESS}
        add_flag(parser, f"--{name.replace('_', '-')}", setting, required=required, **options)


def settings_from(args: argparse.Namespace, kind: type[Kind]) -> Kind:
    """The settings that flags give; one that cannot be is bad usage."""
    try:
        return kind(
            **{name: getattr(args, name) for name in settings_of(kind) if hasattr(args, name)}
        )
    except ValueError as error:
        return args.usage_error(str(error))
