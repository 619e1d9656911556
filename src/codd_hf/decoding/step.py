"""One step of the denoising loop: from the backbone's states to tokens on the canvas."""

from __future__ import annotations

import torch

from ..backbones import BackboneStates
from ..checks.arguments import numbered
from ..circuits.factorized import without_tokens
from ..circuits.random import Generators
from ..coupling.windows import CoupledBackbone
from ..schedulers import RowText
from ..schedulers.remasking import CanvasMemory
from ..schedulers.strategies import ADAPTIVE, select
from .canvas import Canvas
from .placement import Stage, positions_of, rows_alike, windows_over


def take_step(
    model: CoupledBackbone,
    canvas: Canvas,
    rows: torch.Tensor,
    states: BackboneStates,
    stage: Stage,
    number: int,
    memory: CanvasMemory | None,
    record: dict[str, torch.Tensor],
) -> bool:
    """Commits tokens of a stage to the canvas, in all rows of a pass, those that are alike at once.

    Args:
        model: the backbone, with or without a head.
        canvas: all rows.
        rows: `[n]`, those that take part.
        states: the backbone's pass over them.
        stage: the part of the canvas that is decoded.
        number: of the step in the stage, from 0.
        memory: of the stage's earlier steps, to remask.
        record: tensors `[batch, T]` by their names in the scheduler's output; they take down the
            step, in its windows.

    Returns:
        Whether a window was decoded factorized, since circuit and backbone exclude each other.
    """
    call, fallback, part = canvas.call, False, canvas.rows(rows)
    length = call.head.window_length
    states = _without_early_ends(states, part)
    num_steps, open_ = stage.num_steps[rows], part.open(call.early_stop) & stage.within[rows]
    over, eligible, at_least = stage.within[rows], open_, None
    if call.block_length is None:
        over = eligible = _chosen(model, part, rows, states, num_steps, number, open_)
        at_least = eligible.sum(-1)
    starts = windows_over(part, over)
    if call.block_length is None and call.settings.strategy in ADAPTIVE:
        # In these windows the coupled distribution decides, at least at an even pace.
        eligible = open_ & positions_of(starts, length)
        at_least = -(-open_.sum(-1) // (num_steps - number))
    for index, steps, window_start in rows_alike(starts, num_steps):
        # 1. The distribution over the windows.
        group, group_rows = part.rows(index), rows[index]
        begin = window_start.repeat_interleave(length, dim=1)
        within = torch.arange(length, device=rows.device).repeat(window_start.shape[1])
        position = begin + within
        with numbered(rows):
            distribution = model.window_distribution(
                states,
                part.tokens,
                window_start.flatten(),
                part.attention_mask,
                rows=index.repeat_interleave(window_start.shape[1]),
                temperature=call.settings.evidence_temperature,
                head=call.head,
            )

        # 2. Some of the masked tokens are committed.
        column = position.clamp(max=canvas.tokens.shape[1] - 1)
        remembered = None if memory is None else memory.read(group_rows, position, begin)
        known = group.attention_mask.bool() & (group.tokens != canvas.mask_token_id)
        with numbered(group_rows):
            output = call.scheduler.commit(
                distribution,
                group.tokens.gather(1, column),
                call.settings,
                steps - number,
                generator=_of_rows(call.generator, group_rows),
                eligible=eligible[index].gather(1, column),
                at_least=None if at_least is None else at_least[index],
                mask_token_id=canvas.mask_token_id,
                logits_processor=call.logits_processor,
                text=RowText(group.tokens, known, position),
                memory=remembered,
            )
        if memory is not None:
            memory.write(group_rows, position, begin, remembered, canvas.tokens)
        fallback = fallback or bool(output.fallback.any())

        # 3. They go onto the canvas.
        row, at = (output.transfer_index | output.remasked).nonzero(as_tuple=True)
        canvas.tokens[group_rows[row], position[row, at]] = output.prev_sample[row, at]
        row, at = distribution.present.view_as(position).nonzero(as_tuple=True)
        for name, kept in record.items():
            kept[group_rows[row], position[row, at]] = output[name][row, at].to(kept.dtype)
    return fallback


def _without_early_ends(states: BackboneStates, part: Canvas) -> BackboneStates:
    """The states of the rows in `part`, whose logits rule out end tokens that come too early."""
    if not len(part.end_ids) or not bool((part.no_end_before > part.start).any()):
        return states

    def read_logits(index: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        logits = states.logits(index)
        too_early = (index[1] < part.no_end_before[index[0]])[:, None]
        ends = logits[:, part.end_ids].masked_fill(too_early, -torch.inf)
        return logits.index_copy(-1, part.end_ids, ends)

    return BackboneStates(states.last_hidden_state, read_logits)


def _chosen(
    model: CoupledBackbone,
    part: Canvas,
    rows: torch.Tensor,
    states: BackboneStates,
    num_steps: torch.Tensor,
    number: int,
    open_: torch.Tensor,
) -> torch.Tensor:
    """`[n, T]` bool: the open positions that the backbone's prediction would commit in a step."""
    call, chosen = part.call, torch.zeros_like(open_)
    last = part.generated.shape[1] - part.generated.flip(1).long().argmax(-1)
    alike = torch.stack((num_steps, last - part.start), dim=-1)
    never = model.config.forbidden_token_ids or []
    never = model.mask_token_id, [*never, *(call.settings.forbidden_token_ids or [])]
    for steps, span in alike.unique(dim=0).tolist():
        index = (alike == alike.new_tensor((steps, span))).all(-1).nonzero()[:, 0]
        column = part.start[index, None] + torch.arange(span, device=rows.device)
        eligible = open_[index].gather(1, column)
        at = eligible.nonzero(as_tuple=True)
        logits = without_tokens(states.logits((index[at[0]], column[at])), *never)
        logits = logits.new_zeros(*column.shape, logits.shape[-1]).index_put_(at, logits)
        log_probs, generator = logits.float().log_softmax(-1), _of_rows(call.generator, rows[index])
        chosen[index[:, None], column] = select(
            call.settings, log_probs, eligible, steps - number, generator
        )
    return chosen


def _of_rows(generator: Generators, rows: torch.Tensor) -> Generators:
    """Of a list of generators those of some rows."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    return [generator[row] for row in rows.tolist()]
