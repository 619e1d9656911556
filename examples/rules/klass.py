"""KLASS (arXiv 2511.05664): a token is committed when it is sure and its prediction is stable.

Stable is a position whose distribution moved by less than a divergence since the last step. Of the
stable ones the library's `threshold` commits those that are sure; in a step with too few of them
the surest of all keep the pace. Where the paper looks back over several steps, this looks back over
one: passes are few.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from common import Step

from codd_hf import CoDDSchedulerOutput
from codd_hf.schedulers.strategies import best_scored


@dataclass
class Klass:
    """KL(now || before) of stable positions is less than `divergence` nats."""

    divergence: float

    def __call__(self, step: Step) -> CoDDSchedulerOutput:
        now, text = step.marginals(), step.draw.text
        keys = [*zip(text.rows.tolist(), text.position[:, 0].tolist(), strict=True)]
        unknown = torch.full_like(now[0], torch.nan)
        before = torch.stack([step.memory.get(key, unknown) for key in keys])
        step.memory.update(zip(keys, now, strict=True))
        moved = torch.special.xlogy(now, now) - torch.special.xlogy(now, before.clamp(min=1e-30))
        stable = step.committable & (moved.sum(-1) < self.divergence)  # not of NaN
        surest = best_scored(now.amax(-1), step.committable, step.at_least)
        return step.drawn(stable | surest)
