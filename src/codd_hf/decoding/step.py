"""One step of the denoising loop: from the backbone's states to tokens on the canvas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging
from transformers import LogitsProcessor, LogitsProcessorList

from ..backbones import BackboneStates
from ..checks.arguments import numbered
from ..circuits.factorized import forbidden_tokens
from ..circuits.random import Generators
from ..schedulers import CoDDScheduler, RowText
from ..schedulers.remasking import CanvasMemory
from ..schedulers.settings import ADAPTIVE
from .canvas import Canvas
from .plan import Stage, WindowPlan, block_windows, dynamic_windows

if TYPE_CHECKING:
    from ..coupling.heads import CallHead
    from ..modeling_codd import CoDDModel

logger = logging.get_logger(__name__)


@dataclass
class StepRecord:
    """What a step did, on the whole canvas `[batch, T]`.

    Attributes:
        transfer_index: bool, where tokens were committed.
        sampled_tokens: the candidates, and what is known in the windows; elsewhere the mask token.
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

    def state(self, canvas: Canvas) -> dict[str, torch.Tensor]:
        """What a callback is shown after the step."""
        return {"canvas": canvas.tokens.clone(), "generated": canvas.generated, **vars(self)}


class DecodingStep:
    """Commits tokens in all the rows of a pass, those that are alike at once.

    Args:
        model: the backbone, with or without a head.
        head: of the call.
        scheduler: of this call alone: its timesteps are set here.
        paradigm: `block` or `full`.
        logits_processor: transformers' processors.
        settings: the scheduler's settings of the call.
    """

    def __init__(
        self,
        model: CoDDModel,
        head: CallHead,
        scheduler: CoDDScheduler,
        paradigm: str,
        logits_processor: LogitsProcessor | LogitsProcessorList | None,
        settings: dict[str, Any],
    ) -> None:
        self.model = model
        self.head = head
        self.scheduler = scheduler
        self.paradigm = paradigm
        self.logits_processor = logits_processor
        self.settings = settings
        self.drawing = scheduler.draw_settings(**settings)
        self._warned = False

    def run(
        self,
        canvas: Canvas,
        rows: torch.Tensor,
        states: BackboneStates,
        stage: Stage,
        number: int,
        wanted: torch.Tensor,
        generator: Generators,
        memory: CanvasMemory,
        record: StepRecord | None,
    ) -> None:
        """Writes the tokens of a step onto the canvas.

        Args:
            canvas: all rows.
            rows: `[n]`, those that take part.
            states: the backbone's pass over them.
            stage: what is decoded.
            number: of the step in the stage, from 0.
            wanted: `[batch, T]` bool, where tokens may be committed.
            generator: one, or one for each row of the canvas.
            memory: of the stage's earlier steps.
            record: takes down what was done, if anyone asks.
        """
        part, generator = canvas.rows(rows), _of_rows(generator, rows)
        length = self.head.window_length
        for plan in self._plans(part, states, stage.rows(rows), number, wanted[rows], generator):
            # 1. The distribution over the windows.
            group, group_rows = part.rows(plan.rows), rows[plan.rows]
            position = plan.position(length)
            with numbered(rows):
                distribution = self.model.window_distribution(
                    states,
                    part.tokens,
                    plan.window_start.flatten(),
                    attention_mask=part.attention_mask,
                    rows=plan.rows.repeat_interleave(plan.window_start.shape[1]),
                    temperature=self.drawing.evidence_temperature,
                    head=self.head,
                )
            too_early = position < group.no_end_before[:, None]
            if len(canvas.end_ids) and bool(too_early.any()):
                distribution = distribution.without(
                    canvas.end_ids, too_early.view_as(distribution.present)
                )

            # 2. Some of the masked tokens are committed.
            place = position.clamp(max=part.tokens.shape[1] - 1)
            window_start = plan.window_start.repeat_interleave(length, dim=1)
            remembered = memory.read(group_rows, position, window_start)
            known = group.attention_mask.bool() & (group.tokens != canvas.mask_token_id)
            self.scheduler.set_timesteps(plan.num_steps, device=rows.device)
            with numbered(group_rows):
                output = self.scheduler.step(
                    distribution,
                    self.scheduler.timesteps[number],
                    group.tokens.gather(1, place),
                    generator=_of_rows(generator, plan.rows),
                    eligible=plan.eligible.gather(1, place),
                    at_least=plan.at_least,
                    mask_token_id=canvas.mask_token_id,
                    logits_processor=self.logits_processor,
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
            if record is None:
                continue
            present = distribution.present.view_as(position)
            at, values = _places(group_rows, position, present)
            record.transfer_index[at] = output.transfer_index[values]
            record.sampled_tokens[at] = output.sampled_tokens[values]
            record.sampled_probs[at] = output.sampled_probs[values].to(record.sampled_probs.dtype)

    def _plans(
        self,
        part: Canvas,
        states: BackboneStates,
        stage: Stage,
        number: int,
        wanted: torch.Tensor,
        generator: Generators,
    ) -> Iterator[WindowPlan]:
        """Where the windows lie, and where in them tokens may be committed."""
        length = self.head.window_length
        if self.paradigm == "block":
            return block_windows(part, stage, wanted, length)
        selected = self._select(part, states, stage, number, wanted, generator)
        return dynamic_windows(
            part,
            stage,
            wanted,
            selected,
            number,
            length,
            adaptive=self.drawing.strategy in ADAPTIVE,
        )

    def _select(
        self,
        part: Canvas,
        states: BackboneStates,
        stage: Stage,
        number: int,
        wanted: torch.Tensor,
        generator: Generators,
    ) -> torch.Tensor:
        """`[n, T]` bool: what the backbone's prediction would commit in this step."""
        selected = torch.zeros_like(wanted)
        alike = torch.stack((stage.num_steps, part.length), dim=-1)
        for num_steps, length in alike.unique(dim=0).tolist():
            rows = (alike == alike.new_tensor((num_steps, length))).all(-1).nonzero()[:, 0]
            column = part.start[rows, None] + torch.arange(length, device=rows.device)
            eligible = wanted[rows].gather(1, column)
            at = eligible.nonzero(as_tuple=True)
            where = rows[at[0]], column[at]
            logits = self._allowed(
                states.logits(where), where[1] < part.no_end_before[where[0]], part
            )
            logits = logits.new_zeros(*column.shape, logits.shape[-1]).index_put_(at, logits)
            self.scheduler.set_timesteps(num_steps, device=rows.device)
            selected[rows[:, None], column] = self.scheduler.select_positions(
                logits,
                self.scheduler.timesteps[number],
                eligible,
                generator=_of_rows(generator, rows),
                **self.settings,
            )
        return selected

    def _allowed(self, logits: torch.Tensor, too_early: torch.Tensor, part: Canvas) -> torch.Tensor:
        """Logits `[m, vocab]` without what the model never generates and ends that come too early.

        Args:
            logits: `[m, vocab]`.
            too_early: `[m]` bool, where no end token may stand.
            part: says which these are.
        """
        config, vocab_size = self.model.config, logits.shape[-1]
        never = forbidden_tokens(
            vocab_size, config.mask_token_id, config.forbidden_token_ids, logits.device
        )
        is_end = torch.zeros_like(never).index_fill(0, part.end_ids, True)
        return logits.masked_fill(never | (too_early[:, None] & is_end), -torch.inf)


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
