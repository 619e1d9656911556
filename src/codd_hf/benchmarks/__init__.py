"""Speed: a benchmark is a module with a function `measure(options)` that gives a `Report`.

Every speed is a ratio of medians within one process, the sides running in turns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ..checks.settings import Count, Range, Seed, Settings

BENCHMARKS = {
    "overhead": "head step over a backbone's forward pass, at LLaDA-8B's shape",
    "head-step": "head step against a plain reading of the paper",
    "end-to-end": "CoDDPipeline against diffusers' LLaDA2Pipeline on one backbone",
}
"""By name, of which a module is called; a minus is an underscore there."""


@dataclass
class Options(Settings):
    """How a benchmark is run."""

    quick: bool = False
    """Tiny sizes, to see that it works; their figures mean nothing."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the head and the backbone are."""
    batch_size: Count | None = None
    """Rows at once; default: each benchmark's."""
    vocabularies: list[Annotated[int, Range(128)]] = field(default_factory=list)
    """Vocabulary sizes of overhead and head-step; default: LLaDA-8B's 126,464."""
    repeats: Count = 5
    """Timed runs of each side."""
    seed: Seed = 0
    """The seed of weights, logits and draws."""
    output: str | None = None
    """JSON file; default: none is written."""

    def batches_or(self, *usual: int) -> list[int]:
        """The batch sizes: as asked, or `usual`."""
        return [self.batch_size] if self.batch_size else list(usual)
