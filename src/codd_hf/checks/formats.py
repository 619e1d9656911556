"""Fields of a saved configuration that earlier versions of codd-hf wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def upgraded(
    fields: Mapping[str, Any],
    renamed: Mapping[str, str],
    dropped: Mapping[str, tuple[Any, ...] | None],
) -> dict[str, Any]:
    """An earlier version's fields as this version names them.

    Args:
        fields: the fields as they were saved; one that has its new name already wins.
        renamed: the new name of each renamed field.
        dropped: the fields that are no more, each with the values that ask for nothing; None where
            no value by itself asks for anything.

    Raises:
        ValueError: a field that is no more asks for something.
    """
    result = {name: value for name, value in fields.items() if name not in {**renamed, **dropped}}
    for old, new in renamed.items():
        if old in fields:
            result.setdefault(new, fields[old])
    for name, harmless in dropped.items():
        if name in fields and harmless is not None and fields[name] not in harmless:
            raise ValueError(
                f"`{name}` was {fields[name]!r:.100} when this was saved, which codd-hf no longer "
                "has: train or save it again without, or load it with codd-hf 0.1."
            )
    return result
