"""Measure 10: how a head step grows with batch, window, states and vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .head_step import (
    EVIDENCE,
    LLADA_8B,
    QUICK,
    Shape,
    head_step,
    head_step_limit,
    random_head,
    random_window,
)
from .report import Options, Report
from .timing import measure_rates, median_seconds

SWEEPS = {
    "batch": (1, 2, 4),
    "window": (8, 64),
    "latents": (256, 512),
    "vocab": (8_192, 32_768),
}
QUICK_SWEEPS = {"batch": (1, 2), "window": (4,), "latents": (8,), "vocab": (384,)}


def shapes(base: Shape, sweeps: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Shape]]:
    """The base with one size changed at a time, and the name of that size."""
    for name, values in sweeps.items():
        for value in values:
            yield name, replace(base, **{name: value})


def measure(options: Options) -> Report:
    """Median seconds of a head step at every shape, against the physical limit."""
    base = QUICK if options.quick else LLADA_8B
    base = replace(base, batch=options.batch_size or 1)
    repeats = options.repeats_or(3)
    rates = measure_rates(options.device, options.quick)
    rows = []
    head = None
    for name, shape in shapes(base, QUICK_SWEEPS if options.quick else SWEEPS):
        if head is None or sizes_of(head) != (shape.vocab, shape.latents, shape.window):
            head = None
            head = random_head(shape, options)
        window = random_window(shape, options)
        given = (window.logits, window.tokens, window.observed)
        sides = {
            mode: lambda head=head, given=given, mode=mode: head_step(head, *given, evidence=mode)
            for mode in EVIDENCE
        }
        seconds = median_seconds(sides, repeats, options.device, warmups=1)
        del sides
        limit = head_step_limit(shape, rates, window.num_listed("exact"))
        row = {"changed": name} | shape.as_dict()
        row |= {f"{mode}, ms": 1e3 * value for mode, value in seconds.items()}
        row |= {"exact / limit": seconds["exact"] / limit, "limit, ms": 1e3 * limit}
        rows.append(row)
    sizes = {"dtype": "float32", "repeats": repeats}
    return Report("scaling", sizes, rows, rates.as_dict())


def sizes_of(head) -> tuple[int, int, int]:
    config = head.config
    return config.vocab_size, config.num_latents, config.window_length
