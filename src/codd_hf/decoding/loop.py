"""The denoising loop: from prompts to tokens, shared by `CoDDPipeline` and `CoDDModel.generate`.

A canvas is filled stage by stage, a stage in a number of steps, each one pass of the backbone. In
the block paradigm (semi-autoregressive) the stages are blocks, filled from left to right, each
under all the windows of the circuit that overlap it; in the full paradigm there is one stage, and
each step places its windows.

Nothing that happens in a row depends on the others. The number of steps is a ceiling: a row whose
block is full costs no more passes in that block, and steps that are not needed there are not passed
on to later blocks. If tokens are edited, a full block is read until nothing in it changes.
"""

from collections.abc import Callable
from itertools import count
from typing import Any

import torch

from ..checks.arguments import as_tensor, check_callable, check_tokens
from ..coupling.windows import CoupledBackbone
from .editing import MOST_PASSES, edit
from .step import Canvas, CanvasReader, take_step

OnStep = Callable[[int, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor | None]


@torch.no_grad()
def denoise(
    model: CoupledBackbone,
    canvas: Canvas,
    *,
    on_step: OnStep | None = None,
    after_step: Callable[[], Any] | None = None,
) -> None:
    """Generates the tokens of a canvas, which is changed in place.

    Args:
        model: the backbone, with or without a head.
        canvas: of the call.
        on_step: called after each step with its number, its timestep (of the row with the most
            steps), and a dict with `canvas` (`[batch, length]`, all tokens), `generated` (bool, the
            positions to generate) and `transfer_index` (bool, committed in this step; of uniform
            noise, blocks are as a whole). A tensor that it returns becomes the canvas.
        after_step: called once the canvas is as the next step finds it.
    """
    check_callable("on_step", on_step, "a function of the step, its timestep and its state")
    call = canvas.call
    call.head = call.head.frozen()
    reader = CanvasReader(model, canvas)
    for stage in canvas.stages:
        canvas.pad_after_ends()
        most_steps = int(stage.num_steps.max())
        reader.begin_stage(stage)
        passes_left = torch.full_like(stage.num_steps, MOST_PASSES)  # over a full block
        for number in count():
            is_open = (canvas.open_positions() & stage.within).any(-1)
            goes_on = is_open & (number < stage.num_steps)
            if call.editing_threshold is not None:
                has_text = (stage.within & ~canvas.ends()[1]).any(-1)
                goes_on = is_open | (has_text & (passes_left > 0))
            rows = goes_on.nonzero()[:, 0]
            if len(rows) == 0:
                break
            before, was_noise = canvas.tokens.clone(), canvas.is_noise()
            with model.adapter_of_call(call.head):
                states = reader.read(rows)
                if call.editing_threshold is not None:
                    edit(model, canvas, rows, states, stage, call.editing_threshold)
                take_step(model, canvas, rows, states, stage, number)
            canvas.passes_per_row[rows] += 1
            is_same = (canvas.tokens == before).all(-1)
            passes_left = torch.where(is_same, 0, passes_left - 1).where(~is_open, passes_left)
            if on_step is not None:
                after = canvas.tokens.clone()
                committed = was_noise & ~canvas.is_noise()
                state = {"generated": canvas.generated, "transfer_index": committed}
                timestep = torch.tensor(max(0.0, 1 - number / most_steps))
                returned = on_step(canvas.num_passes, timestep, {"canvas": after, **state})
                if returned is not None:
                    tokens = as_tensor("canvas", returned, int, after.shape, after.device).clone()
                    check_tokens("canvas", tokens, model.config.vocab_size)
                    reader.forget((tokens != canvas.tokens).any(-1))
                    canvas.tokens = tokens
            canvas.num_passes += 1
            if call.editing_threshold is None:  # an end token may be edited
                canvas.pad_after_ends()
            if after_step is not None:
                after_step()
    canvas.pad_after_ends()
