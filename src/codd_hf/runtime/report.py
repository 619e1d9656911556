"""Figures as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows by column name as a table in Markdown; its columns stand in the order they first occur.

    A float has three significant digits, and `-` stands where there is nothing.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, ["---"] * len(columns)]
    cells += [[cell(row.get(column)) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def listed(facts: Mapping[str, Any]) -> str:
    """Facts and their values in one line."""
    return ", ".join(f"{name} {cell(value)}" for name, value in facts.items())
