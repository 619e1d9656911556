"""The denoising loop: from prompts to tokens, shared by `CoDDPipeline` and `CoDDModel.generate`.

A canvas is filled stage by stage, a stage in a number of steps, each one pass of the backbone over
the whole canvas `[prompt][generated][padding]`. In the block paradigm (semi-autoregressive) the
stages are blocks, filled from left to right, each under all the windows of the circuit that overlap
it; in the full paradigm there is one stage, everything, and each step places its windows. Instead
of a prompt, a row can be a template, whose gaps are generated given the text on both sides
(infilling).

Nothing that happens in a row depends on the others. Rows have their own lengths and numbers of
steps. The number of steps is a ceiling: a row whose block is full costs no more passes in that
block, and steps that are not needed there are not passed on to later blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils import logging

from ..checks.arguments import as_tensor, check_callable, check_tokens
from ..coupling.windows import CoupledBackbone
from ..schedulers.remasking import CommitMemory
from .call import DecodingCall
from .canvas import Canvas, Stage
from .step import CanvasReader, take_step

logger = logging.get_logger(__name__)

OnStep = Callable[[int, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor | None]


@dataclass
class DecodingOutput:
    """Output of the denoising loop.

    Attributes:
        sequences: `[batch, n]`, the generated tokens or, with `infill`, the whole templates. Behind
            an end-of-text token, or a row that is shorter than others, is padding.
        is_text: `[batch, n]` bool, the tokens that are text: not an end-of-text token that was
            generated, nor anything behind it.
        num_passes: passes of the backbone that were run, each over the rows that needed it. Rows
            begin their blocks together, so that it may exceed the steps of each of them where they
            share their steps over their blocks differently.
        passes_per_row: `[batch]`, the passes that each row took part in.
    """

    sequences: torch.Tensor
    is_text: torch.Tensor
    num_passes: int
    passes_per_row: torch.Tensor


def lay_out(
    model: CoupledBackbone,
    call: DecodingCall,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> tuple[Canvas, list[Stage]]:
    """The canvas of a call and the stages of its decoding, before anything expensive is done.

    Raises:
        ValueError: as `denoise`.
    """
    canvas = Canvas.lay_out(model, call, input_ids, attention_mask)
    is_block_causal = getattr(model.config.text_config, "block_length", None) is not None
    return canvas, canvas.stages(from_position_0=is_block_causal)


@torch.no_grad()
def denoise(
    model: CoupledBackbone,
    call: DecodingCall,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    on_step: OnStep | None = None,
    progress: Callable[[int], Any] | None = None,
) -> DecodingOutput:
    """Generates tokens after each prompt, or in the gaps of each template.

    Args:
        model: the backbone, with or without a head.
        call: the choices of the call (`DecodingCall.of`).
        input_ids: `[batch, prompt_length]`, padded on any side.
        attention_mask: `[batch, prompt_length]`, 0 at padding; default no padding.
        on_step: called after each step with its number, its timestep (of the row with the most
            steps), and a dict with `canvas` (`[batch, length]`, all the tokens of all the rows),
            `generated` (bool, the positions to generate), `transfer_index` (bool, committed in this
            step), `sampled_tokens` and `sampled_probs` (the candidates; mask token and 0 where
            there was none), all of the same shape. A tensor that it returns becomes the canvas.
        progress: called once with the most steps that there can be; gives a progress bar.

    Raises:
        ValueError: a prompt holds the mask token, a template has none, a row has fewer steps than
            blocks, or the canvas exceeds the positions that the backbone has.
        TypeError: `on_step` cannot be called.
    """
    check_callable("on_step", on_step, "a function of the step, its timestep and its state")
    call = replace(call, head=call.head.frozen())
    canvas, stages = lay_out(model, call, input_ids, attention_mask)
    reader, shape = CanvasReader(model, canvas), canvas.tokens.shape
    passes_per_row, num_passes, fallback = torch.zeros_like(canvas.start), 0, False
    most_passes = int(sum((stage.num_steps for stage in stages), passes_per_row).max())
    bar = None if progress is None else progress(most_passes)
    for stage in stages:
        memory, device = None, canvas.tokens.device
        if call.scheduler.settings.remask_threshold:
            memory = CommitMemory(shape[0], shape[1] + call.head.window_length, device)
        most_steps = int(stage.num_steps.max())
        reader.open_block(stage.within)
        for number in range(most_steps):
            is_open = (canvas.open() & stage.within).any(-1)
            rows = (is_open & (number < stage.num_steps)).nonzero()[:, 0]
            if len(rows) == 0:
                break
            record = {}
            if on_step is not None:
                record = {
                    "transfer_index": torch.zeros_like(canvas.generated),
                    "sampled_tokens": torch.full_like(canvas.tokens, call.mask_token_id),
                    "sampled_probs": torch.zeros(shape, device=device),
                }
            with model.heads.adapter_of_call(call.head):
                fallback |= take_step(
                    model, canvas, rows, reader.read(rows), stage, number, memory, record
                )
            passes_per_row[rows] += 1
            if on_step is not None:
                state = {"canvas": canvas.tokens.clone(), "generated": canvas.generated, **record}
                returned = on_step(num_passes, torch.tensor(1 - number / most_steps), state)
                if returned is not None:
                    canvas.tokens = as_tensor("canvas", returned, int, shape, device).clone()
                    check_tokens("canvas", canvas.tokens, model.config.vocab_size)
            if bar is not None:
                bar.update()
            num_passes += 1
            canvas.close()
    if bar is not None:
        bar.update(most_passes - num_passes)
    if fallback:
        logger.warning(
            "The circuit and the backbone share no completion of a window (`log_partition` is "
            "-inf), so the rows concerned are decoded factorized."
        )
    canvas.close()
    return DecodingOutput(*canvas.result(), num_passes, passes_per_row)
