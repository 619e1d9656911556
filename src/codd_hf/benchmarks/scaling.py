"""How a head step grows with batch, window, states and vocabulary."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from .head_case import EVIDENCE, LLADA_8B, QUICK, HeadCase
from .report import Options, Report
from .timing import measure_rates, median_seconds

SWEEPS = {
    "batch": (1, 2, 4),
    "window": (8, 64),
    "latents": (256, 512),
    "vocab": (8_192, 32_768),
}
QUICK_SWEEPS = {"batch": (1, 2), "window": (4,), "latents": (8,), "vocab": (384,)}


def measure(options: Options) -> Report:
    """Median seconds of a step with one size changed at a time, against the physical limit."""
    base = replace(QUICK if options.quick else LLADA_8B, batch=options.batch_size or 1)
    repeats = options.repeats_or(3)
    rates = measure_rates(options.device, options.quick)
    rows, head = [], None
    for name, values in (QUICK_SWEEPS if options.quick else SWEEPS).items():
        head = head if name == "batch" else None  # of the same sizes
        for value in values:
            case = HeadCase(replace(base, **{name: value}), options, head)
            head = case.head if name == "batch" else None
            sides = {mode: partial(case.step, mode) for mode in EVIDENCE}
            seconds = median_seconds(sides, repeats, options.device, warmups=1)
            limit = case.limit(rates)
            row = {"changed": name} | case.shape.as_dict()
            row |= {f"{mode}, ms": 1e3 * seconds[mode] for mode in EVIDENCE}
            row |= {"exact / limit": seconds["exact"] / limit, "limit, ms": 1e3 * limit}
            rows.append(row)
    return Report("scaling", {"dtype": "float32", "repeats": repeats}, rows, rates.as_dict())
