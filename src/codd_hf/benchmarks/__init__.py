"""Speed and memory, each measure a module with `measure(options) -> Report`.

Every speed is a ratio of medians within one process, the sides running in turns, and stands beside
the least time that the machine's own measured rates allow.
"""

from __future__ import annotations

from importlib import import_module

from .report import Options, Report

BENCHMARKS = {
    "overhead": "head step over a backbone's forward pass, at LLaDA-8B's shape",
    "head-step": "head step against a plain reading of the paper",
    "fitting": "EM against hmmlearn; a conditional step against the backbone",
    "end-to-end": "CoDDPipeline against diffusers' LLaDA2Pipeline on one backbone",
    "memory": "peak extra memory of a head step",
    "scaling": "head step against batch, window, states and vocabulary",
}


def run_benchmark(name: str, options: Options) -> Report:
    """Runs one of `BENCHMARKS`."""
    module = import_module(f".{name.replace('-', '_')}", __name__)
    return module.measure(options)


__all__ = ["BENCHMARKS", "Options", "Report", "run_benchmark"]
