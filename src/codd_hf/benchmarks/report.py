"""How a benchmark is run, and its outcome: a table for people, the same figures for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..runtime.report import listed, table


@dataclass
class Options:
    """How a benchmark is run.

    Attributes:
        quick: tiny sizes, to see that it works; their figures mean nothing.
        device: a torch device.
        batch_size: rows at once; default: each benchmark's.
        repeats: timed runs of each side; default: each benchmark's.
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

    def batches_or(self, *usual: int) -> list[int]:
        """The batch sizes: as asked, or `usual`."""
        return [self.batch_size] if self.batch_size else list(usual)


@dataclass
class Report:
    """The outcome of a benchmark.

    Attributes:
        name: of the benchmark.
        sizes: shapes, dtypes and repeats.
        rows: the table, from column to value; a column names its unit.
        rates: the machine's measured rates, to which physical limits refer.
        notes: one sentence each.
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
        parts = [f"### {self.name}", listed(self.sizes), table(self.rows)]
        if self.rates:
            parts.append(f"measured on this machine: {listed(self.rates)}")
        return "\n\n".join([*parts, *self.notes])
