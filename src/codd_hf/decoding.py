"""The denoising loop: from prompts to tokens, shared by `CoDDPipeline` and `CoDDModel.generate`.

Decoding is semi-autoregressive. The generated part of a row is cut into blocks, which are filled
from left to right; a block is filled in a number of steps, each one pass of the backbone over the
whole canvas `[prompt][generated][padding]`. The circuit's windows tile the generated part as well:
they start at the row's first generated token, whatever the length of its prompt, and a block is
decoded under all the windows that overlap it. Nothing that happens in a row depends on the others.

The number of steps is a ceiling. A row whose block is full costs no more passes in that block;
steps that are not needed there are not passed on to later blocks, whose share stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging
from transformers import LogitsProcessor, LogitsProcessorList

from .circuits.random import Generators
from .decoding_arguments import (
    ForcedTokens,
    check_decoding_arguments,
    for_each_row,
    steps_per_block,
)
from .schedulers import CoDDScheduler, CommitMemory, RowText

if TYPE_CHECKING:
    from .modeling_codd import CoDDModel

logger = logging.get_logger(__name__)

OnStep = Callable[[int, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor | None]


@dataclass
class DecodingOutput:
    """What the denoising loop returns.

    Attributes:
        sequences: `[batch, gen_length]`, the generated tokens; after the end of a row's text, its
            end-of-text token.
        num_passes: passes of the backbone that were run, each over the rows that needed it.
        finished: `[batch]` bool, the rows that ended with an end-of-text token.
        passes_per_row: `[batch]`, the passes that each row took part in.
    """

    sequences: torch.Tensor
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
    gen_length: int,
    block_length: int,
    num_inference_steps: int,
    generator: Generators = None,
    eos_token_id: int | list[int] | None = None,
    early_stop: bool = True,
    min_new_tokens: int | Sequence[int] | None = None,
    forced_tokens: ForcedTokens | None = None,
    logits_processor: LogitsProcessor | LogitsProcessorList | None = None,
    on_step: OnStep | None = None,
    **settings: Any,
) -> DecodingOutput:
    """Generates `gen_length` tokens after each prompt.

    Args:
        model: the backbone, with or without a head.
        scheduler: decides what is committed; its timesteps are set here, block by block.
        input_ids: `[batch, prompt_length]`, padded on any side.
        attention_mask: `[batch, prompt_length]`, 0 at padding; default no padding.
        gen_length: number of tokens to generate in each row.
        block_length: number of tokens in a block (fewer in the last one).
        num_inference_steps: the most passes of the backbone for the whole generation, shared evenly
            by the blocks, the remainder by the first ones. Steps that a block does not need, since
            it has fewer tokens or the strategy commits more at once, are not run.
        generator: one for all rows, or a list with one per row: a row's tokens then do not depend
            on the rest of the batch.
        eos_token_id: the end-of-text token, or several.
        early_stop: whether a row that holds an end-of-text token once a block is complete is
            finished: the rest of it becomes that token, and no more passes are spent on it.
        min_new_tokens: how many generated tokens come before the first end-of-text token, for all
            rows or one number for each; `gen_length` means that there is none. The backbone's
            prediction rules it out before the circuit sees it.
        forced_tokens: tokens by their place among the generated ones (from 0), for all rows or one
            mapping for each. They stand on the canvas from the start, so that everything else is
            predicted given them, and are never remasked.
        logits_processor: transformers' processors of the scores that candidates are drawn from;
            what they see is said at `CoDDScheduler.step`.
        on_step: called after each step with its number, its timestep, and a dict with `canvas`
            (`[batch, length]`, all the tokens of all the rows), `generated` (bool, which of them
            are not prompt or padding), `transfer_index` (bool, committed in this step),
            `sampled_tokens` and `sampled_probs` (the candidates; mask token and 0 where there was
            none), all of the same shape. A tensor that it returns becomes the canvas.
        **settings: the scheduler's settings for this call (`strategy`, `sampling`, ...).

    Raises:
        ValueError: an argument is out of range (see `check_decoding_arguments`), a prompt is empty,
            or prompt and generated tokens exceed the positions that the backbone has.
    """
    check_decoding_arguments(
        scheduler,
        len(input_ids),
        gen_length,
        block_length,
        num_inference_steps,
        generator,
        settings,
        min_new_tokens,
        forced_tokens,
        model.config,
    )
    batch, device = len(input_ids), input_ids.device
    mask_token_id, window_length = model.config.mask_token_id, model.window_length
    canvas, canvas_mask, start = pack_canvas(model, input_ids, attention_mask, gen_length)
    length = canvas.shape[1]
    offset = torch.arange(length, device=device) - start[:, None]  # [batch, length]
    generated = (offset >= 0) & (offset < gen_length)
    eos_ids = torch.tensor(
        [] if eos_token_id is None else eos_token_id, dtype=torch.long, device=device
    ).reshape(-1)

    for row, tokens in enumerate(for_each_row(forced_tokens, batch)):
        for place, token in tokens.items():
            canvas[row, start[row] + place] = token
    fewest = torch.as_tensor(min_new_tokens or 0, device=device).expand(batch)

    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    passes_per_row = torch.zeros(batch, dtype=torch.long, device=device)
    num_passes, warned = 0, False
    block_steps = steps_per_block(num_inference_steps, gen_length, block_length)
    for block, num_steps in enumerate(block_steps):
        if bool(finished.all()):
            break

        # 1. The windows that overlap the block, and where they lie on the canvas.
        block_start, block_end = block * block_length, min((block + 1) * block_length, gen_length)
        first = block_start // window_length * window_length
        num_windows = -(-(block_end - first) // window_length)
        column = torch.arange(first, first + num_windows * window_length, device=device)
        in_block = (column >= block_start) & (column < block_end)
        memory = CommitMemory()

        scheduler.set_timesteps(num_steps, device=device)
        for timestep in scheduler.timesteps:
            place = start[:, None] + column  # [batch, num_windows * window_length]
            tokens = canvas.gather(1, place.clamp(max=length - 1))
            unfilled = ((tokens == mask_token_id) & in_block).any(-1) & ~finished
            rows = unfilled.nonzero()[:, 0]
            if len(rows) == 0:
                break
            current, sample, position = canvas[rows], tokens[rows], place[rows]
            row_generator = generator
            if generator is not None and not isinstance(generator, torch.Generator):
                row_generator = [generator[row] for row in rows.tolist()]

            # 2. One pass of the backbone, and the distribution over the windows.
            states = model.backbone_states(current, canvas_mask[rows])
            distribution = model.window_distribution(
                states,
                current,
                position[:, ::window_length].reshape(-1),
                attention_mask=canvas_mask[rows],
                rows=torch.arange(len(rows), device=device).repeat_interleave(num_windows),
                temperature=scheduler.draw_settings(**settings).evidence_temperature,
            )
            too_early = column < fewest[rows, None]
            if len(eos_ids) and bool(too_early.any()):
                distribution = distribution.without(
                    eos_ids, too_early.view_as(distribution.present)
                )

            # 3. Some of the masked tokens are committed.
            undecided = (current == mask_token_id) & generated[rows]
            known = canvas_mask[rows].bool() & (current != mask_token_id)
            memory_of_rows = memory.of_rows(rows)
            step = scheduler.step(
                distribution,
                timestep,
                sample,
                generator=row_generator,
                eligible=in_block.expand_as(sample),
                mask_ratio=undecided.sum(-1) / gen_length,
                mask_token_id=mask_token_id,
                logits_processor=logits_processor,
                text=RowText(current, known, position),
                memory=memory_of_rows,
                **settings,
            )
            memory.write(rows, memory_of_rows, batch)
            passes_per_row[rows] += 1
            committed_row, committed_column = step.transfer_index.nonzero(as_tuple=True)
            committed = rows[committed_row], position[committed_row, committed_column]
            canvas[committed] = step.prev_sample[committed_row, committed_column]
            back_row, back_column = step.remasked.nonzero(as_tuple=True)
            canvas[rows[back_row], position[back_row, back_column]] = mask_token_id
            if not warned and bool(step.fallback.any()):
                warned = True
                logger.warning(
                    "The circuit and the backbone share no completion of a window "
                    "(`log_partition` is -inf), so the rows concerned are decoded factorized."
                )

            if on_step is not None:
                on_canvas = torch.zeros_like(canvas, dtype=torch.bool)
                on_canvas[committed] = True
                tokens = torch.full_like(canvas, mask_token_id)
                probs = torch.zeros(canvas.shape, device=device)
                known_row, known_column = distribution.present.view_as(sample).nonzero(
                    as_tuple=True
                )
                known = rows[known_row], position[known_row, known_column]
                tokens[known] = step.sampled_tokens[known_row, known_column]
                probs[known] = step.sampled_probs[known_row, known_column].to(probs.dtype)
                state = {
                    "canvas": canvas.clone(),
                    "generated": generated,
                    "transfer_index": on_canvas,
                    "sampled_tokens": tokens,
                    "sampled_probs": probs,
                }
                returned = on_step(num_passes, timestep, state)
                if returned is not None:
                    if returned.shape != canvas.shape:
                        raise ValueError(
                            f"`canvas` returned by the callback must keep its shape "
                            f"{tuple(canvas.shape)}, got {tuple(returned.shape)}."
                        )
                    canvas = returned.clone()
            num_passes += 1

        # 4. Rows whose text has ended are frozen.
        if early_stop:
            ends = generated & torch.isin(canvas, eos_ids)
            finished = ends.any(-1)
            first_end = ends.long().argmax(-1, keepdim=True)
            after = generated & (torch.arange(length, device=device) > first_end)
            canvas = torch.where(after & finished[:, None], canvas.gather(1, first_end), canvas)

    sequences = canvas.gather(1, start[:, None] + torch.arange(gen_length, device=device))
    return DecodingOutput(sequences, num_passes, finished, passes_per_row)


def pack_canvas(
    model: CoDDModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    gen_length: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lays each row out as `[prompt][gen_length masks][padding]`.

    With its padding at the end, a row meets the same absolute positions however it was padded.

    Args:
        model: gives the token ids and the number of positions.
        input_ids: `[batch, prompt_length]`.
        attention_mask: `[batch, prompt_length]`, 0 at padding, or None.
        gen_length: number of tokens to generate.

    Returns:
        The canvas and its attention mask, both `[batch, length]`, and the start of each row's
        generated part, `[batch]`.

    Raises:
        ValueError: a prompt is empty, or the canvas exceeds the positions of the backbone.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    is_prompt = attention_mask.bool()
    start = is_prompt.sum(-1)
    if not bool((start > 0).all()):
        raise ValueError(
            "`input_ids` must hold at least one token that is not padding in each row."
        )
    length = int(start.max()) + gen_length
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and length > most:
        raise ValueError(
            f"A prompt of {int(start.max())} tokens and `gen_length={gen_length}` exceed the "
            f"{most} positions of the backbone: shorten one of them."
        )
    pad_token_id = model.config.pad_token_id
    filler = model.config.mask_token_id if pad_token_id is None else pad_token_id
    column = torch.arange(length, device=input_ids.device)
    canvas = torch.full((len(input_ids), length), filler, device=input_ids.device)
    canvas[column < start[:, None]] = input_ids[is_prompt].long()
    end = start[:, None] + gen_length
    canvas[(column >= start[:, None]) & (column < end)] = model.config.mask_token_id
    return canvas, (column < end).long(), start
