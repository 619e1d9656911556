"""The work of a step: candidates are drawn, some are committed, and improbable ones go back."""

from __future__ import annotations

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from ..circuits import CoupledCategorical
from ..circuits.random import Generators
from .drawing import Drawing
from .draws import draw_in_any_order, draw_independently
from .remasking import CommitMemory, take_back
from .row_text import RowText
from .scheduler_output import CoDDSchedulerOutput
from .settings import DrawSettings
from .strategies import even_pace


@torch.no_grad()
def commit(
    distribution: CoupledCategorical,
    sample: torch.Tensor,
    settings: DrawSettings,
    steps_left: int,
    *,
    generator: Generators = None,
    eligible: torch.Tensor | None = None,
    at_least: torch.Tensor | None = None,
    mask_token_id: int | None = None,
    logits_processor: LogitsProcessor | LogitsProcessorList | None = None,
    text: RowText | None = None,
    memory: CommitMemory | None = None,
    output_logits: bool = False,
) -> CoDDSchedulerOutput:
    """[`CoDDScheduler.step`] for loops whose arguments and settings are checked already.

    The arguments are those of `step`, with the `settings` of the call and the number of steps that
    are left, this one included, in place of overrides and a timestep.
    """
    # 1. The distribution, and where a token may be committed.
    draw = draw_in_any_order if settings.sampling == "any_order" else draw_independently
    processors = [logits_processor] if logits_processor else []
    if settings.repetition_penalty != 1:
        penalty = RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty))
        processors.insert(0, penalty)
    drawing = Drawing(distribution, sample, settings, generator, processors, text, output_logits)
    committable = drawing.masked if eligible is None else drawing.masked & eligible
    if at_least is None:
        at_least = even_pace(committable, steps_left)

    # 2. Candidates, and those of them that are committed.
    output = draw(drawing, committable, at_least)

    # 3. Tokens that the others make improbable go back.
    if settings.remask_threshold and steps_left > 1:
        if mask_token_id is None:
            raise ValueError(
                "`mask_token_id` must be given here or in the scheduler's config to remask."
            )
        back = take_back(drawing, output, CommitMemory() if memory is None else memory)
        output.prev_sample = output.prev_sample.masked_fill(back, mask_token_id)
        output.remasked = back & ~output.transfer_index
        output.transfer_index = output.transfer_index & ~back
    return output
