"""A head step against a plain reading of the paper, and as its sizes grow."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from .head_case import EVIDENCE, LLADA_8B, QUICK, HeadCase, mean_entropy
from .report import Options, Report
from .timing import RateProbes, median_seconds

SWEEPS = {
    "batch": (1, 2, 4),
    "window": (8, 64),
    "latents": (256, 512),
    "vocab": (8_192, 32_768),
}
QUICK_SWEEPS = {"batch": (1, 2), "window": (4,), "latents": (8,), "vocab": (384,)}


def measure(options: Options) -> Report:
    """Median seconds of a step in each form of evidence and of the plain one, and their ratio."""
    shape = QUICK if options.quick else LLADA_8B
    repeats = options.repeats_or(5)
    probes = RateProbes(options.device, options.quick)
    case, rows, measured = None, [], {}
    for batch in options.batches_or(1, 8):
        case = HeadCase(replace(shape, batch=batch), options, case and case.head)
        sides = probes.sides | {"plain": case.plain_step}
        sides |= {mode: partial(case.step, mode) for mode in EVIDENCE}
        seconds = median_seconds(sides, repeats, options.device)
        rates = probes.rates(seconds)
        measured |= {f"{name}, batch {batch}": v for name, v in rates.as_dict().items()}
        for mode in EVIDENCE:
            least = case.limit(rates, mode)
            rows.append(
                {
                    "batch": batch,
                    "evidence": mode,
                    "tokens read": case.num_listed(mode),
                    "plain paper, ms": 1e3 * seconds["plain"],
                    "head step, ms": 1e3 * seconds[mode],
                    "times faster": seconds["plain"] / seconds[mode],
                    "limit, ms": 1e3 * least,
                    "times the limit": seconds[mode] / least,
                }
            )
    sizes = shape.as_dict() | {"batch": None, "dtype": "float32", "repeats": repeats}
    sizes |= {"entropy of a prediction, nats": mean_entropy(case.logits[:1])}
    return Report("head-step", sizes, rows, measured)


def measure_scaling(options: Options) -> Report:
    """Median seconds of a step with one size changed at a time, against the physical limit."""
    base = replace(QUICK if options.quick else LLADA_8B, batch=options.batch_size or 1)
    repeats = options.repeats_or(3)
    probes, rows = RateProbes(options.device, options.quick), []
    for name, values in (QUICK_SWEEPS if options.quick else SWEEPS).items():
        for value in values:
            case = HeadCase(replace(base, **{name: value}), options)
            sides = {mode: partial(case.step, mode) for mode in EVIDENCE}
            seconds = median_seconds(sides | probes.sides, repeats, options.device, warmups=1)
            limit = case.limit(probes.rates(seconds))
            row = {"changed": name} | case.shape.as_dict()
            row |= {f"{mode}, ms": 1e3 * seconds[mode] for mode in EVIDENCE}
            rows.append(row | {"exact / limit": seconds["exact"] / limit, "limit, ms": 1e3 * limit})
    return Report("scaling", {"dtype": "float32", "repeats": repeats}, rows)
