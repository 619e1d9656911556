"""Speed: a benchmark is a module with a function `measure(options)` that gives a `Report`.

Every speed is a ratio of medians within one process, the sides running in turns.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Literal

from ..checks.settings import Count, Range, Seed, Settings

Side = Callable[[], object]
BENCHMARKS = {
    "overhead": "head step over a backbone's forward pass, at the shapes of published models",
    "head-step": "head step against a plain reading of the paper",
    "end-to-end": "CoDDPipeline against diffusers' LLaDA2Pipeline on one backbone",
    "block-cache": "a long answer of a block-causal backbone, complete blocks kept or not",
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
    backbones: list[Literal["LLaDA-8B", "SDAR-8B", "LLaDA2-mini"]] = field(default_factory=list)
    """Shapes of overhead; default: LLaDA-8B."""
    vocabularies: list[Annotated[int, Range(128)]] = field(default_factory=list)
    """Vocabulary sizes of overhead and head-step; default: the backbone's, LLaDA-8B's 126,464."""
    repeats: Count = 5
    """Timed runs of each side."""
    seed: Seed = 0
    """The seed of weights, logits and draws."""
    output: str | None = None
    """JSON file; default: none is written."""

    def batches_or(self, *usual: int) -> list[int]:
        """The batch sizes: as asked, or `usual`."""
        return [self.batch_size] if self.batch_size else list(usual)


def median_seconds(
    sides: Mapping[str, Side],
    repeats: int,
    device: str = "cpu",
    warmups: int = 2,
) -> dict[str, float]:
    """Median wall-clock seconds of each side, run in turns (A, B, A, B, ...).

    Args:
        sides: what to time, by name.
        repeats: timed runs of each.
        device: is waited for after each run.
        warmups: runs of each that are not timed, also in turns.
    """
    import torch  # the help of the command line has no need of it

    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmups + repeats):
        for name, run in sides.items():
            synchronize()
            started = time.perf_counter()
            run()
            synchronize()
            if turn >= warmups:
                seconds[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in seconds.items()}
