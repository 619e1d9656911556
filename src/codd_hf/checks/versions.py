"""Fields that an earlier version saved and this one no longer has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .arguments import shown


def without_left_fields(
    saved: Mapping[str, Any], left: Mapping[str, Any], what: str
) -> dict[str, Any]:
    """What was saved, without the fields that left; these must hold the value that changes nothing.

    Args:
        saved: fields by name.
        left: the fields that left, each with that value.
        what: was saved, for the error.

    Raises:
        ValueError: one of them holds another value.
    """
    for name, default in left.items():
        if saved.get(name, default) != default:
            raise ValueError(
                f"`{name}={shown(saved[name])}` in {what} is no longer supported: remove it, or "
                f"use codd-hf 0.1."
            )
    return {name: value for name, value in saved.items() if name not in left}
