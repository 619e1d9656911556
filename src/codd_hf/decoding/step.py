"""One step of the denoising loop: from the backbone's states to tokens on the canvas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers.utils import logging

from ..backbones import BackboneStates
from ..checks.arguments import numbered
from ..circuits.factorized import forbidden_tokens
from ..circuits.random import Generators
from ..coupling.windows import CoupledBackbone
from ..schedulers import RowText
from ..schedulers.remasking import CanvasMemory
from ..schedulers.settings import ADAPTIVE
from .call import DecodingCall
from .canvas import Canvas
from .placement import Placement, Stage, place_on_block, place_on_chosen

logger = logging.get_logger(__name__)


@dataclass
class StepRecord:
    """The work of a step, on the whole canvas `[batch, T]`.

    Attributes:
        transfer_index: bool, where tokens were committed.
        sampled_tokens: the candidates, and the known tokens in the windows; elsewhere the mask
            token.
        sampled_probs: their probabilities; elsewhere 0.
    """

    transfer_index: torch.Tensor
    sampled_tokens: torch.Tensor
    sampled_probs: torch.Tensor

    @classmethod
    def of(cls, canvas: Canvas) -> StepRecord:
        """An empty one."""
        return cls(
            torch.zeros_like(canvas.generated),
            torch.full_like(canvas.tokens, canvas.mask_token_id),
            torch.zeros(canvas.tokens.shape, device=canvas.tokens.device),
        )


class DecodingStep:
    """Commits tokens in all the rows of a pass, those that are alike at once.

    Args:
        model: the backbone, with or without a head.
        call: the choices of the call.
        canvas: all rows.
    """

    def __init__(self, model: CoupledBackbone, call: DecodingCall, canvas: Canvas) -> None:
        self.model, self.call, self.canvas = model, call, canvas
        self.scheduler, self.settings = call.scheduler, vars(call.settings)
        config, self.never = model.config, None
        if call.block_length is None:
            ids = config.mask_token_id, config.forbidden_token_ids
            self.never = forbidden_tokens(config.vocab_size, *ids, canvas.tokens.device)
        self._warned = False

    def run(
        self,
        rows: torch.Tensor,
        states: BackboneStates,
        stage: Stage,
        number: int,
        wanted: torch.Tensor,
        memory: CanvasMemory,
        record: StepRecord | None,
    ) -> None:
        """Writes the tokens of a step onto the canvas.

        Args:
            rows: `[n]`, those that take part.
            states: the backbone's pass over them.
            stage: the part of the canvas that is decoded.
            number: of the step in the stage, from 0.
            wanted: `[batch, T]` bool, where tokens may be committed.
            memory: of the stage's earlier steps.
            record: takes down the step, if anyone asks.
        """
        call, canvas, part = self.call, self.canvas, self.canvas.rows(rows)
        length = call.head.window_length
        for place in self._placements(part, rows, states, stage, number, wanted[rows]):
            # 1. The distribution over the windows.
            group, group_rows = part.rows(place.index), rows[place.index]
            window_start = place.window_start.repeat_interleave(length, dim=1)
            within = torch.arange(length, device=rows.device)
            position = window_start + within.repeat(place.window_start.shape[1])
            with numbered(rows):
                distribution = self.model.window_distribution(
                    states,
                    part.tokens,
                    place.window_start.flatten(),
                    part.attention_mask,
                    rows=place.index.repeat_interleave(place.window_start.shape[1]),
                    temperature=call.settings.evidence_temperature,
                    head=call.head,
                )
            too_early = position < group.no_end_before[:, None]
            if len(canvas.end_ids) and bool(too_early.any()):
                distribution = distribution.without(
                    canvas.end_ids, too_early.view_as(distribution.present)
                )

            # 2. Some of the masked tokens are committed.
            column = position.clamp(max=part.tokens.shape[1] - 1)
            remembered = memory.read(group_rows, position, window_start)
            known = group.attention_mask.bool() & (group.tokens != canvas.mask_token_id)
            self.scheduler.set_timesteps(place.num_steps, device=rows.device)
            with numbered(group_rows):
                output = self.scheduler.step(
                    distribution,
                    self.scheduler.timesteps[number],
                    group.tokens.gather(1, column),
                    generator=_of_rows(call.generator, group_rows),
                    eligible=place.eligible.gather(1, column),
                    at_least=place.at_least,
                    mask_token_id=canvas.mask_token_id,
                    logits_processor=call.logits_processor,
                    text=RowText(group.tokens, known, position),
                    memory=remembered,
                    output_logits=False,
                    **self.settings,
                )
            memory.write(group_rows, position, window_start, remembered, canvas.tokens)
            if not self._warned and bool(output.fallback.any()):
                self._warned = True
                logger.warning(
                    "The circuit and the backbone share no completion of a window "
                    "(`log_partition` is -inf), so the rows concerned are decoded factorized."
                )

            # 3. They go onto the canvas.
            at, values = _places(group_rows, position, output.transfer_index | output.remasked)
            canvas.tokens[at] = output.prev_sample[values]
            if record is not None:
                present = distribution.present.view_as(position)
                at, values = _places(group_rows, position, present)
                record.transfer_index[at] = output.transfer_index[values]
                record.sampled_tokens[at] = output.sampled_tokens[values]
                record.sampled_probs[at] = output.sampled_probs[values].float()

    def _placements(
        self,
        part: Canvas,
        rows: torch.Tensor,
        states: BackboneStates,
        stage: Stage,
        number: int,
        wanted: torch.Tensor,
    ) -> Iterator[Placement]:
        """The windows of the rows in `part`, and where in them tokens may be committed."""
        stage, length = Stage(*(value[rows] for value in stage)), self.call.head.window_length
        if self.never is None:
            return place_on_block(part, stage, wanted, length)
        chosen = torch.zeros_like(wanted)
        alike = torch.stack((stage.num_steps, part.length), dim=-1)
        for num_steps, span in alike.unique(dim=0).tolist():
            index = (alike == alike.new_tensor((num_steps, span))).all(-1).nonzero()[:, 0]
            column = part.start[index, None] + torch.arange(span, device=rows.device)
            eligible = wanted[index].gather(1, column)
            at = eligible.nonzero(as_tuple=True)
            where = index[at[0]], column[at]
            too_early = where[1] < part.no_end_before[where[0]]
            is_end = torch.zeros_like(self.never).index_fill(0, part.end_ids, True)
            never = self.never | (too_early[:, None] & is_end)
            logits = states.logits(where).masked_fill(never, -torch.inf)
            logits = logits.new_zeros(*column.shape, logits.shape[-1]).index_put_(at, logits)
            self.scheduler.set_timesteps(num_steps, device=rows.device)
            chosen[index[:, None], column] = self.scheduler.select_positions(
                logits,
                self.scheduler.timesteps[number],
                eligible,
                generator=_of_rows(self.call.generator, rows[index]),
                **self.settings,
            )
        adaptive = self.call.settings.strategy in ADAPTIVE
        return place_on_chosen(part, stage, wanted, chosen, number, length, adaptive)


def _places(
    rows: torch.Tensor, position: torch.Tensor, where: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Indices of a canvas, and the same places in its windows, where those are `where`.

    Args:
        rows: `[n]`, of the canvas.
        position: `[n, length]`, of the windows' positions on it.
        where: `[n, length]` bool.
    """
    row, column = where.nonzero(as_tuple=True)
    return (rows[row], position[row, column]), (row, column)


def _of_rows(generator: Generators, rows: torch.Tensor) -> Generators:
    """Of a list of generators those of some rows."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    return [generator[row] for row in rows.tolist()]
