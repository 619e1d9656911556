"""A head step against a plain reading of the paper, per batch size."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from .head_case import EVIDENCE, LLADA_8B, QUICK, HeadCase, mean_entropy
from .report import Options, Report
from .timing import RateProbes, median_seconds


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
    sizes = shape.as_dict() | {"dtype": "float32", "repeats": repeats}
    sizes |= {"entropy of a prediction, nats": mean_entropy(case.logits[:1])}
    del sizes["batch"]
    return Report("head-step", sizes, rows, measured)
