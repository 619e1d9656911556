"""What a benchmark gives back: a table for people and the same figures for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Options:
    """How a benchmark is run.

    Attributes:
        quick: small sizes that take seconds; their figures mean nothing.
        device: a torch device.
        batch_size: rows at once; None takes the benchmark's own choice.
        repeats: timed runs of each side; None takes the benchmark's own choice.
        seed: of weights, logits and draws.
    """

    quick: bool = False
    device: str = "cpu"
    batch_size: int | None = None
    repeats: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")

    def repeats_or(self, usual: int) -> int:
        """The number of timed runs: as asked, two for `quick`, or `usual`."""
        return self.repeats or (2 if self.quick else usual)


@dataclass
class Report:
    """The outcome of a benchmark.

    Attributes:
        name: of the benchmark.
        sizes: what was measured (shapes, dtypes, repeats).
        rows: the table; each row is a dict from column to value, columns name their units.
        rates: the machine's measured rates that physical limits refer to.
        notes: one sentence each, printed below the table.
    """

    name: str
    sizes: dict[str, Any]
    rows: list[dict[str, Any]]
    rates: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def markdown(self) -> str:
        """Title, sizes, table, rates and notes."""
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        lines = [f"### {self.name}", "", _listed(self.sizes), ""]
        lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        for row in self.rows:
            lines.append("| " + " | ".join(shown(row.get(c)) for c in columns) + " |")
        if self.rates:
            lines += ["", "measured on this machine: " + _listed(self.rates)]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines)


def shown(value: Any) -> str:
    """A cell: three significant digits for numbers, `-` for what there is not."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _listed(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {shown(value)}" for name, value in facts.items())
