"""What settings may be: one of a few words, or numbers of a range."""

from __future__ import annotations

import math
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

LOSSES = ("elbo", "token")
PRECISIONS = ("auto", "no", "bf16")
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-6, 1e6  # what circuits take


def check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises unless a setting has one of the values that are known.

    Raises:
        ValueError: it has another; the message names the setting and the values.
    """
    if value not in known:
        choices = " or ".join(repr(choice) for choice in known)
        raise ValueError(f"`{name}` must be {choices}, got {value!r}.")


def check_numbers(config: Any, most: dict[str, float] | None = None, **least: float) -> None:
    """Raises unless all numbers among a configuration's settings are in their range.

    Args:
        config: a dataclass, whose numbers become Python's own (numpy's are not JSON).
        most: the largest value of a setting that has one.
        **least: the smallest value of a setting; usually 1 of whole numbers and 0 of others.

    Raises:
        ValueError: one is not; the message names it and its value.
    """
    for field in fields(config):
        kind, _, optional = field.type.partition(" | ")
        value = getattr(config, field.name)
        if kind not in ("int", "float") or (optional and value is None):
            continue
        whole = kind == "int"
        low = least.get(field.name, 1 if whole else 0)
        number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
        if not number or not -math.inf < value < math.inf:
            noun = "a whole number" if whole else "a finite number"
            raise ValueError(f"`{field.name}` must be {noun}, got {value!r}.")
        if value < low:
            raise ValueError(f"`{field.name}` must be at least {low}, got {value!r}.")
        if value > (most or {}).get(field.name, math.inf):
            raise ValueError(f"`{field.name}` must be at most {most[field.name]}, got {value!r}.")
        setattr(config, field.name, int(value) if whole else float(value))
