"""A head step against a plain reading of the paper, `circuits.reference`."""

from __future__ import annotations

from typing import Any

from ..runtime.report import Report
from . import Options
from .head_case import head_cases
from .timing import Side, median_seconds


def measure(options: Options) -> Report:
    """`codd-hf bench head-step`: a row for each form of evidence."""
    rows: list[dict[str, Any]] = []
    for case in head_cases(options, 1, 8):
        steps = case.steps()
        sides: dict[str, Side] = steps | {"plain": case.plain_step}
        seconds = median_seconds(sides, options.repeats, options.device)
        rows += [
            {
                **case.sizes,
                "evidence": name,
                "tokens read": case.num_read(name),
                "plain paper, ms": 1e3 * seconds["plain"],
                "head step, ms": 1e3 * seconds[name],
                "times faster": seconds["plain"] / seconds[name],
            }
            for name in steps
        ]
    return Report({"dtype": "float32", "repeats": options.repeats}, {"rows": rows})
