"""Speed and memory: functions of `Options` that give a `Report`.

Every speed is a ratio of medians within one process, the sides running in turns.
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
    if name == "scaling":
        return import_module(".head_step", __name__).measure_scaling(options)
    return import_module(f".{name.replace('-', '_')}", __name__).measure(options)


__all__ = ["BENCHMARKS", "Options", "Report", "run_benchmark"]
