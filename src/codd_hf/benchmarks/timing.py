"""Timing on machines that are shared: sides alternate, and medians are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

Side = Callable[[], object]


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
