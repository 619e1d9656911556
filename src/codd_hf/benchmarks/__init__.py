"""Speed and memory: functions of `Options` that give a `Report`.

Every speed is a ratio of medians within one process, the sides running in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Literal

from ..checks.settings import Count, Range, Seed, Settings
from ..runtime.report import Report

BENCHMARKS = {
    "overhead": "head step over a backbone's forward pass, at LLaDA-8B's shape",
    "head-step": "head step against a plain reading of the paper",
    "fitting": "EM against hmmlearn",
    "end-to-end": "CoDDPipeline against diffusers' LLaDA2Pipeline on one backbone",
    "memory": "peak extra memory of a head step",
    "scaling": "head step against batch, window, states and vocabulary",
}


@dataclass
class Options(Settings):
    """How a benchmark is run."""

    quick: bool = False
    """Tiny sizes, to see that it works; their figures mean nothing."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the head and the backbone are."""
    threads: Annotated[int, Range(1, 4096)] | None = None
    """The threads of torch; default: its choice."""
    batch_size: Count | None = None
    """Rows at once; default: each benchmark's."""
    repeats: Count = 5
    """Timed runs of each side."""
    seed: Seed = 0
    """The seed of weights, logits and draws."""
    output: str | None = None
    """JSON file; default: none is written."""

    def batches_or(self, *usual: int) -> list[int]:
        """The batch sizes: as asked, or `usual`."""
        return [self.batch_size] if self.batch_size else list(usual)


def run_benchmark(name: str, options: Options) -> Report:
    """Runs one of `BENCHMARKS`, a function of its name, of this room's modules."""
    name = name.replace("-", "_")
    module = name if name in ("fitting", "end_to_end") else "head"
    measure: Callable[[Options], Report] = getattr(import_module(f".{module}", __name__), name)
    return measure(options)


__all__ = ["BENCHMARKS", "Options", "Report", "run_benchmark"]
