"""How a benchmark is run, and its outcome: a table for people, the same figures for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..checks.settings import Count, Seed, Settings
from ..runtime.report import listed, table


@dataclass
class Options(Settings):
    """How a benchmark is run."""

    quick: bool = False
    """Tiny sizes, to see that it works; their figures mean nothing."""
    device: str = "cpu"
    """A torch device."""
    batch_size: Count | None = None
    """Rows at once; default: each benchmark's."""
    repeats: Count | None = None
    """Timed runs of each side; default: each benchmark's."""
    seed: Seed = 0
    """Of weights, logits and draws."""

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
