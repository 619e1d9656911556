"""Figures as tables for people and as JSON for programs, and the machine that they are of."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any


@dataclass
class Report:
    """Figures, and the facts on which they depend.

    Attributes:
        facts: sizes and settings.
        tables: rows by title, from column to value; a column names its unit.
    """

    facts: dict[str, Any]
    tables: dict[str, list[dict[str, Any]]]

    def markdown(self) -> str:
        """The tables, under their titles where there are several, and the facts."""
        tables = {title: table(rows) for title, rows in self.tables.items() if rows}
        if len(tables) > 1:
            tables = {title: f"### {title}\n\n{text}" for title, text in tables.items()}
        return "\n\n".join([*tables.values(), listed(self.facts)])

    def as_dict(self) -> dict[str, Any]:
        """Facts and tables by their titles."""
        return {"facts": self.facts, **self.tables}


def as_json(value: Any) -> str:
    """A value as indented JSON; what JSON has not is asked for itself `as_dict`."""
    return json.dumps(value, indent=2, default=lambda part: part.as_dict()) + "\n"


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
    if isinstance(value, dict) and value.keys() == {"value", "error"}:  # an estimate read as JSON
        return " ± ".join(cell(part) for part in value.values() if part is not None)
    return str(value)


def listed(facts: Mapping[str, Any]) -> str:
    """Facts and their values in one line."""
    return ", ".join(f"{name} {cell(value)}" for name, value in facts.items())


def environment() -> dict[str, Any]:
    """The device, the threads, and the versions of what computes."""
    import torch

    packages = ("torch", "transformers", "diffusers", "codd-hf")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    facts = {"device": device, "threads": torch.get_num_threads()}
    versions = {name: version(name) for name in packages}
    return {**facts, "python": platform.python_version(), **versions}
