"""Lays out the canvas of a call: its rows, and the stages in which they are decoded."""

from collections import Counter

import torch

from ..backbones import block_length_of, shifts_logits
from ..checks.arguments import check_unmasked
from ..coupling.windows import CoupledBackbone, check_size
from ..schedulers.scheduling_codd import uniform_tokens
from ..schedulers.strategies import ADAPTIVE
from .call import DecodingCall
from .step import Canvas, Stage, generators_of, rows_alike


def lay_out(
    model: CoupledBackbone,
    call: DecodingCall,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
) -> Canvas:
    """The canvas of prompts or templates, however they were padded.

    Windows begin where a prompt ends. In a template, as many windows as the span from the first
    gap to the last needs are centred over it, so that they cover text on both sides.

    Args:
        model: the backbone.
        call: the choices of the call.
        input_ids: `[batch, length]`, padded on any side.
        attention_mask: `[batch, length]`, 0 at padding.

    Raises:
        ValueError: a prompt holds the mask token, a template has none, a row exceeds the positions
            of the backbone, or has fewer steps than blocks.
    """
    device, real = input_ids.device, attention_mask.bool()
    given = size = no_end_before = real.sum(-1)
    if not call.infill:
        rows = (ids[mask] for ids, mask in zip(input_ids, real, strict=True))
        check_unmasked("input_ids", rows, call.mask_token_id)
        size = given + torch.tensor(call.gen_length, device=device)
        no_end_before = given + torch.tensor(call.min_new_tokens, device=device)
    longest = int(size.max())
    what = f"The {longest} tokens of a row (`input_ids` and `gen_length`)"
    check_size(model.max_positions, longest, what)

    # The rows, with noise where tokens are to be found.
    column = torch.arange(longest, device=device)
    attended = column < size[:, None]
    filler = call.behind if call.mask_token_id is None else call.mask_token_id
    tokens = torch.where(attended, filler, call.behind)
    tokens[column < given[:, None]] = input_ids[real].long()
    generated = attended & (tokens == call.mask_token_id)
    if call.is_uniform:
        generated = attended & (column >= given[:, None])
        for index in rows_alike(size - given):  # a row's draws do not depend on the others
            shape = len(index), int(size[index[0]] - given[index[0]])
            noise = uniform_tokens(
                shape, model.config.vocab_size, generators_of(call.generator, index), device
            )
            tokens[index] = tokens[index].masked_scatter(generated[index], noise)
    for row in (~generated.any(-1)).nonzero()[:, 0].tolist():
        raise ValueError(
            f"`infill` fills mask tokens, of which there is none in row {row}: put one (id "
            f"{call.mask_token_id}) wherever a token is to be found."
        )
    start = window_origin = generated.long().argmax(-1)
    end_ids, padding = call.eos_token_id, model.config.pad_token_id
    if call.infill:
        span = torch.where(generated, column, 0).amax(-1) + 1 - start
        room = -span % call.head.window_length
        window_origin = start - torch.minimum(room // 2, start)
        end_ids = end_ids if padding is None else [*end_ids, padding]
    causal = block_length_of(model.config.text_config)
    if causal is not None and call.head.window_length % causal == 0:
        window_origin = window_origin - window_origin % causal  # whole blocks are in a window
    noisy = generated.clone() if call.is_uniform else None
    for row, forced in enumerate(call.forced_tokens):
        for place, token in forced.items():
            tokens[row, start[row] + place] = token
            if noisy is not None:
                noisy[row, start[row] + place] = False
    parts = (tokens, attended.long(), generated, start, window_origin, no_end_before)
    canvas = Canvas(call, *parts, end_ids, torch.zeros_like(start), noisy=noisy)

    # The blocks, in order, and what is read for each.
    block, end = torch.zeros_like(tokens), torch.full_like(column, longest)
    if causal is not None:
        # A block-causal backbone counts blocks from the beginning of the row.
        block = block + column.div(call.block_length or causal, rounding_mode="floor")
        end = (column - column % causal + causal).clamp(max=longest)
        if shifts_logits(model.config.text_config):
            # The first token of a block is predicted by the block before, whatever is in it.
            is_first = (column % causal == 0) & (column > 0)
            block, end = 2 * block + ~is_first, torch.where(is_first, column + 1, end)
    elif call.block_length is not None:
        block = (column - start[:, None]).div(call.block_length, rounding_mode="floor")
    canvas.stages = _stages(canvas, block, end, causal is not None)
    return canvas


def _stages(canvas: Canvas, block: torch.Tensor, end: torch.Tensor, is_causal: bool) -> list[Stage]:
    """Shares the steps of a row over those of its blocks `[batch, T]` in which masks are.

    `end` `[T]` says for each position what is read for it. Where the backbone counts the blocks
    (`is_causal`), those that nobody can know of beforehand take a step beyond the given ones.
    """
    masked, stages = canvas.open_positions(), list[Stage]()
    length = canvas.call.block_length or masked.shape[1]
    is_adaptive = canvas.call.scheduler.settings.strategy in ADAPTIVE
    for row, steps in enumerate(canvas.call.num_inference_steps):
        found, counts = block[row, masked[row]].unique(return_counts=True)
        blocks, number = found.tolist(), int(masked[row].sum())
        needed = -(-number // length) if is_causal else len(blocks)
        if steps is None:
            steps = -(-number // (1 if is_adaptive else 4))
        elif steps < needed:
            raise ValueError(
                f"`num_inference_steps` must be at least the number of blocks that are decoded, "
                f"{needed} in row {row} with `block_length={canvas.call.block_length}`, got "
                f"{steps}: take more steps or longer blocks."
            )
        steps = max(steps, len(blocks))
        # In turns, from the first block on, and no more than a block has masks.
        turns = ((turn, i) for i, count in enumerate(counts.tolist()) for turn in range(count))
        share = Counter(number for _, number in sorted(turns)[:steps])
        for number, index in enumerate(blocks):
            if number == len(stages):
                zeros = torch.zeros_like(canvas.start)
                stages.append(Stage(torch.zeros_like(masked), zeros, zeros.clone()))
            within = canvas.generated[row] & (block[row] == index)
            stages[number].num_steps[row] = share[number]
            stages[number].within[row] = within
            stages[number].end[row] = end[within].max()
    return stages
