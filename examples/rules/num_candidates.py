"""The best of several joint draws by exact joint probability.

The positions are those of the library's strategy, and so is the first candidate; the others are
joint samples of the law. Of independent tokens the most probable ones are together the most
probable too, so that factorized decoding at temperature 0 has nothing to gain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from common import Step

from codd_hf import CoDDSchedulerOutput


@dataclass
class NumCandidates:
    """The best of `number` candidates."""

    number: int

    def __call__(self, step: Step) -> CoDDSchedulerOutput:
        draw, output = step.draw, step.drawn()
        where, generator = draw.split(output.transfer_index), draw.generator
        if isinstance(generator, list):  # a row's for each of its windows
            generator = [g for g in generator for _ in range(len(where) // len(generator))]
        others = draw.sharpened.sample((self.number - 1,), generator)
        first = torch.where(output.transfer_index, output.prev_sample, 0)
        candidates = torch.cat((draw.split(first)[None], others))
        probs = torch.stack([draw.plain.partial_log_prob(c, where) for c in candidates])
        best = candidates.gather(0, probs.argmax(0)[None, :, None].expand(1, *where.shape))[0]
        kept = torch.where(output.transfer_index, draw.join(best), draw.sample)
        return CoDDSchedulerOutput(
            kept, output.transfer_index, draw.join(best), output.sampled_probs
        )
