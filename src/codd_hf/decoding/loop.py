"""The denoising loop: from prompts to tokens, shared by `CoDDPipeline` and `CoDDModel.generate`.

A canvas is filled stage by stage, a stage in a number of steps, each one pass of the backbone over
the whole canvas `[prompt][generated][padding]`. In the block paradigm (semi-autoregressive) the
stages are blocks, filled from left to right; in the full paradigm there is one stage, everything.
A block is decoded under all the windows of the circuit that overlap it; in the full paradigm the
windows are placed in each step (`decoding_plan.py`). Windows lie on a grid that begins at the row's
first generated token, whatever the length of its prompt. Instead of a prompt, a row can be a
template, whose gaps are generated given the text on both sides (infilling).

Nothing that happens in a row depends on the others. Rows have their own lengths and numbers of
steps. The number of steps is a ceiling: a row whose block is full costs no more passes in that
block, and steps that are not needed there are not passed on to later blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ..checks.arguments import as_tensor, check_callable, check_tokens, end_tokens, flag
from ..circuits.random import Generators
from ..configuration_codd import CoDDConfig
from ..schedulers import CoDDScheduler
from ..schedulers.controls import PROCESSOR
from ..schedulers.remasking import CanvasMemory
from .arguments import DecodingArguments, ForcedTokens, PerRow
from .canvas import Canvas, filler
from .plan import Stage, plan_stages, windows_end
from .reader import CanvasReader
from .step import DecodingStep, StepRecord

if TYPE_CHECKING:
    from ..coupling.heads import CallHead, HeadName
    from ..modeling_codd import CoDDModel

OnStep = Callable[[int, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor | None]


@dataclass
class DecodingOutput:
    """What the denoising loop returns.

    Attributes:
        sequences: `[batch, n]`, the generated tokens or, with `infill`, the whole templates. What
            stands behind an end-of-text token, or a row that is shorter than others, is padding.
        is_text: `[batch, n]` bool, the tokens that are text: not an end-of-text token that was
            generated, nor what follows it.
        num_passes: passes of the backbone that were run, each over the rows that needed it. Rows
            begin their blocks together, so that it may exceed the steps of each of them where they
            share their steps over their blocks differently.
        finished: `[batch]` bool, the rows that ended with an end-of-text token.
        passes_per_row: `[batch]`, the passes that each row took part in.
    """

    sequences: torch.Tensor
    is_text: torch.Tensor
    num_passes: int
    finished: torch.Tensor
    passes_per_row: torch.Tensor


@torch.no_grad()
def denoise(
    model: CoDDModel,
    scheduler: CoDDScheduler,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    gen_length: PerRow,
    block_length: int,
    num_inference_steps: PerRow | None = None,
    paradigm: str = "block",
    infill: bool = False,
    generator: Generators = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    early_stop: bool = True,
    min_new_tokens: PerRow | None = None,
    forced_tokens: ForcedTokens | None = None,
    logits_processor: LogitsProcessor | LogitsProcessorList | None = None,
    on_step: OnStep | None = None,
    progress: Callable[[int], Any] | None = None,
    cache: str | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    head: HeadName | CallHead = None,
    **settings: Any,
) -> DecodingOutput:
    """Generates tokens after each prompt, or in the gaps of each template.

    Args:
        model: the backbone, with or without a head.
        scheduler: decides what is committed; a copy of it is used, whose timesteps are set here.
        input_ids: `[batch, prompt_length]`, padded on any side.
        attention_mask: `[batch, prompt_length]`, 0 at padding; default no padding.
        gen_length: number of tokens to generate in each row, or one number for each; not used with
            `infill`.
        block_length: number of tokens in a block (fewer in the last one). The blocks of a
            block-causal backbone are counted from the beginning of the row, as its attention counts
            them, so that the first one may be shorter; `block_length` divides its own.
        num_inference_steps: the most passes of the backbone for the whole generation, for all rows
            or for each, shared evenly by a row's blocks that hold masks, the remainder by the first
            ones. Steps that a block does not need, since it has fewer tokens or the strategy
            commits more at once, are not run. Default: one for four masks, and at least one for
            each block.
        paradigm: `block`, or `full` for no block order (`block_length` then has no effect).
        infill: whether the rows of `input_ids` are templates, in which every mask token is a
            position to fill. No end-of-text or padding token is drawn there.
        generator: one for all rows, or a list with one per row: a row's tokens then do not depend
            on the rest of the batch.
        eos_token_id: the end-of-text token, or several.
        pad_token_id: what stands behind it; default the model's, or else the first end-of-text one.
        early_stop: whether nothing more is decoded behind an end-of-text token: once all before it
            is decided, the rest becomes padding, and the row costs no more passes.
        min_new_tokens: how many generated tokens come before the first end-of-text token, for all
            rows or one number for each; `gen_length` means that there is none. The backbone's
            prediction rules it out before the circuit sees it.
        forced_tokens: tokens by their place among the generated ones (from 0), for all rows or one
            mapping for each. They stand on the canvas from the start, so that everything else is
            predicted given them, and are never remasked.
        logits_processor: transformers' processors of the scores that candidates are drawn from;
            what they see is said at `CoDDScheduler.step`.
        on_step: called after each step with its number, its timestep (of the row with the most
            steps), and a dict with `canvas` (`[batch, length]`, all the tokens of all the rows),
            `generated` (bool, which of them are not given or padding), `transfer_index` (bool,
            committed in this step), `sampled_tokens` and `sampled_probs` (the candidates; mask
            token and 0 where there was none), all of the same shape. A tensor that it returns
            becomes the canvas.
        progress: called once with the most steps that there can be; gives a progress bar.
        cache: `"prefix"` or `"dual"`: after the first step of a block (or of the whole, in the full
            paradigm) the backbone computes only the block and what follows it, or only the block,
            and reuses the keys and values of the rest; see `canvas_reader`. An approximation, for
            decoders that transformers runs. A pass over a part counts as one pass.
        guidance_scale: strength of classifier-free guidance, for all rows or for each, as LLaDA
            counts it: 0 or None is off, and `s` here is `s + 1` for those of transformers'
            and diffusers' models whose scale 1 is off. A guided pass is one over twice the rows.
        head: the name of the head that couples this call; None, the model's default; False, none.
        **settings: the scheduler's settings for this call (`strategy`, `sampling`, ...).

    Raises:
        ValueError: an argument is out of range (see `DecodingArguments`; `CanvasReader` for `cache`
            and `guidance_scale`), a prompt holds the mask token, a template
            has none, a row has fewer
            steps than blocks, or the canvas exceeds the positions that the backbone has.
    """
    check_callable("logits_processor", logits_processor, PROCESSOR)
    check_callable("on_step", on_step, "a function of the step, its timestep and its state")
    arguments = DecodingArguments.check(
        scheduler,
        model.config,
        len(input_ids),
        gen_length=gen_length,
        block_length=block_length,
        num_inference_steps=num_inference_steps,
        paradigm=paradigm,
        infill=infill,
        generator=generator,
        min_new_tokens=min_new_tokens,
        forced_tokens=forced_tokens,
        settings=settings,
    )
    ends = end_tokens("eos_token_id", eos_token_id, model.config.vocab_size)
    if model.config.mask_token_id in ends:
        raise ValueError(
            f"`eos_token_id` must not hold the mask token ({model.config.mask_token_id}), which "
            "stands wherever nothing is decoded yet: give the tokens that end a text."
        )
    early_stop = flag("early_stop", early_stop)
    head = model.head_of_call(head)
    canvas, stages = lay_out(
        model.config,
        input_ids,
        attention_mask,
        ends,
        filler(model.config, ends, pad_token_id),
        arguments,
        head.window_length,
        model.max_positions,
    )
    scheduler = copy.copy(scheduler)  # its timesteps are this call's, and threads may share it
    decoding_step = DecodingStep(model, head, scheduler, paradigm, logits_processor, settings)
    reader = CanvasReader(model, canvas.attention_mask, canvas.generated, cache, guidance_scale)
    passes_per_row = torch.zeros_like(canvas.start)
    steps = [stage.num_steps for stage in stages]
    num_passes, most_passes = 0, int(sum(steps, torch.zeros_like(passes_per_row)).max())
    bar = None if progress is None else progress(most_passes)
    for stage in stages:
        memory = CanvasMemory()
        reader.open_block(stage.within, windows_end(canvas, stage, head.window_length))
        most_steps = int(stage.num_steps.max())
        for number in range(most_steps):
            wanted = canvas.open(early_stop) & stage.within
            rows = (wanted.any(-1) & (number < stage.num_steps)).nonzero()[:, 0]
            if len(rows) == 0:
                break
            record = None if on_step is None else StepRecord.of(canvas)
            with model.adapter_of_call(head):
                states = reader.read(rows, canvas.tokens[rows])
                decoding_step.run(
                    canvas, rows, states, stage, number, wanted, generator, memory, record
                )
            passes_per_row[rows] += 1
            if record is not None:
                timestep = torch.tensor(1 - number / most_steps)
                returned = on_step(num_passes, timestep, record.state(canvas))
                if returned is not None:
                    returned = as_tensor("canvas", returned, int, device=canvas.tokens.device)
                    if returned.shape != canvas.tokens.shape:
                        raise ValueError(
                            f"`canvas` returned by the callback must keep its shape "
                            f"{tuple(canvas.tokens.shape)}, got {tuple(returned.shape)}."
                        )
                    check_tokens("canvas", returned, model.config.vocab_size)
                    canvas.tokens = returned.clone()
            if bar is not None:
                bar.update()
            num_passes += 1
            if early_stop:
                canvas.close()

    if bar is not None:
        bar.update(most_passes - num_passes)
    finished = canvas.close() if early_stop else torch.zeros_like(passes_per_row, dtype=torch.bool)
    begin = torch.zeros_like(canvas.start) if infill else canvas.start
    sequences, is_text = canvas.result(begin)
    return DecodingOutput(sequences, is_text, num_passes, finished, passes_per_row)


def lay_out(
    config: CoDDConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    end_ids: list[int],
    behind: int,
    arguments: DecodingArguments,
    window_length: int,
    max_positions: int | None,
) -> tuple[Canvas, list[Stage]]:
    """What will be decoded, before anything is.

    Args:
        config: gives the token ids.
        input_ids: `[batch, prompt_length]`, padded on any side.
        attention_mask: `[batch, prompt_length]`, 0 at padding, or None.
        end_ids: end-of-text tokens.
        behind: what stands behind them.
        arguments: of the call.
        window_length: of the circuit.
        max_positions: of the backbone; None where nothing bounds them.

    Raises:
        ValueError: as `denoise` says of prompts, templates, steps and positions.
    """
    if arguments.infill:
        canvas = Canvas.of_templates(
            config,
            input_ids,
            attention_mask,
            end_ids,
            behind,
            window_length,
            max_positions,
        )
    else:
        canvas = Canvas.of_prompts(
            config,
            input_ids,
            attention_mask,
            end_ids,
            behind,
            arguments.gen_length,
            arguments.min_new_tokens,
            arguments.forced_tokens,
            max_positions,
        )
    stages = plan_stages(
        canvas,
        arguments.num_inference_steps,
        None if arguments.paradigm == "full" else arguments.block_length,
        from_position_0=getattr(config.text_config, "block_length", None) is not None,
    )
    return canvas, stages
