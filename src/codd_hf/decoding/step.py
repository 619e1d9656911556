"""One step of the denoising loop: the backbone reads the canvas, the scheduler commits tokens.

| attention | `cache` | computed in the first step of a block | in its other steps |
| --- | --- | --- | --- |
| full | None, False | the whole canvas | the whole canvas |
| | `"prefix"` | the whole canvas | the block and what follows it |
| | `"dual"` | the whole canvas | the block |
| block-causal | False | the attention's blocks up to this one | the same |
| | None | those of them that are not kept | the attention's block |
| | `"prefix"` | those of them that are not kept | the block and what follows it in there |
| | `"dual"` | those of them that are not kept | the block |

Under block-causal attention neither the backbone nor windows see anything beyond the attention's
block at hand. What is kept of the blocks before it is exact: each was read after it was complete.
`"prefix"` and `"dual"` keep the rest from the block's first step, when the block and what follows
it were masked (Fast-dLLM, arXiv 2505.22618, which calls the second `DualCache`): an approximation,
as tokens committed in the block change the others' keys and values a little.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from ..backbones import BackboneStates, block_length_of, shifts_logits
from ..backbones.canvas_cache import CanvasCache
from ..checks.arguments import numbered
from ..circuits import Generators, without_tokens
from ..coupling.windows import CoupledBackbone, positions_of, windows_over
from ..schedulers.drawing import RowText
from ..schedulers.strategies import ADAPTIVE, fewest, kept_pace
from .call import DecodingCall


class Stage(NamedTuple):
    """A part of every row, decoded before the next one is begun.

    Attributes:
        within: `[batch, T]` bool, the positions that are decoded.
        num_steps: `[batch]`, the most steps that each row may take; 0 for rows that are done.
        end: `[batch]`, the column from which on nothing is read, nor in a window.
    """

    within: torch.Tensor
    num_steps: torch.Tensor
    end: torch.Tensor


@dataclass
class Canvas:
    """Rows of tokens, `[batch, T]`, some of which are still noise, in one call.

    A row is `[prompt][masks][padding]` or, to infill, `[template][padding]`.

    Attributes:
        call: the choices of the call.
        tokens: `[batch, T]`.
        attention_mask: `[batch, T]`, 0 at padding.
        generated: `[batch, T]` bool, the positions to generate.
        start: `[batch]`, the first generated position; forced tokens and blocks count from here.
        window_origin: `[batch]`, where the grid of windows begins.
        no_end_before: `[batch]`, positions before this one hold no end token.
        end_ids: the end tokens; in a gap of a template none of them is drawn.
        passes_per_row: `[batch]`, the passes of the backbone that each row took part in so far.
        num_passes: those that there were. Rows begin their blocks together, so that there may be
            more than the steps of each of them.
        stages: those of the decoding, in order.
        noisy: `[batch, T]` bool, the tokens that are not decided yet, where no mask token says it.
    """

    call: DecodingCall
    tokens: torch.Tensor
    attention_mask: torch.Tensor
    generated: torch.Tensor
    start: torch.Tensor
    window_origin: torch.Tensor
    no_end_before: torch.Tensor
    end_ids: Sequence[int]
    passes_per_row: torch.Tensor
    num_passes: int = 0
    stages: list[Stage] = field(default_factory=list)
    noisy: torch.Tensor | None = None

    @property
    def most_passes(self) -> int:
        """The most passes of the backbone that there can be."""
        steps = (stage.num_steps for stage in self.stages)
        return int(sum(steps, torch.zeros_like(self.start)).max())

    def rows(self, index: torch.Tensor) -> Canvas:
        """A canvas of some rows, by ascending numbers `[n]`; of all of them, this one."""
        if len(index) == len(self.tokens):
            return self
        part = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(part, name, value[index])
        return part

    def is_noise(self) -> torch.Tensor:
        """`[batch, T]` bool: the tokens that nothing has decided yet."""
        mask: Any = self.call.mask_token_id
        return self.tokens.eq(mask) if self.noisy is None else self.noisy

    def open_positions(self) -> torch.Tensor:
        """`[batch, T]` bool, where a token is to be committed: nowhere behind an end token."""
        return self.generated & self.is_noise() & ~self.ends()[1]

    def pad_after_ends(self) -> None:
        """Makes what follows an end token padding, in the rows where nothing before is open."""
        end, after = self.ends()
        closed = end.any(-1) & ~self.open_positions().any(-1)
        self.tokens = self.tokens.masked_fill(after & closed[:, None], self.call.behind)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts behind the prompts, or whole templates: tokens `[batch, n]`, and which are text.

        An end token is not text, nor is anything behind it.
        """
        end, after = self.ends()
        return self.answers(self.tokens, self.call.behind), self.answers(~(end | after), False)

    def answers(self, values: torch.Tensor, beyond: int | bool) -> torch.Tensor:
        """Of values `[batch, T]` those of the result, `[batch, n]`; `beyond` where it has none."""
        begin = torch.zeros_like(self.start) if self.call.infill else self.start
        size = self.attention_mask.sum(-1) - begin
        number = torch.arange(int(size.max()), device=begin.device)
        place = (begin[:, None] + number).clamp(max=self.tokens.shape[1] - 1)
        return torch.where(number < size[:, None], values.gather(1, place), beyond)

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[batch, T]` bool twice: the first end token of each text, and all that follows it."""
        is_end = torch.isin(self.tokens, self.tokens.new_tensor(self.end_ids))
        is_end &= self.generated & ~self.is_noise()
        after = self.generated & (is_end.cumsum(-1) > is_end.long())
        return is_end & ~after, after


class CanvasReader:
    """Runs the backbone for one call; nothing read for a row depends on the others."""

    def __init__(self, model: CoupledBackbone, canvas: Canvas) -> None:
        self.canvas, self.family, self.backbone = canvas, model.family, model.backbone
        self.block_length = block_length_of(self.backbone.config)
        self.shift = int(shifts_logits(self.backbone.config))
        self.cache, asked = None, canvas.call.cache
        refusal = self.family.why_no_cache(self.backbone)
        if isinstance(asked, str) and refusal is not None:
            raise ValueError(refusal)
        is_exact = asked is None and self.block_length is not None and refusal is None
        if is_exact or isinstance(asked, str):
            self.cache = CanvasCache(*canvas.tokens.shape)
        self.kept = torch.zeros_like(canvas.start)  # columns of complete blocks, from the left
        self.is_new = torch.ones_like(canvas.start, dtype=torch.bool)

    def begin_stage(self, stage: Stage) -> None:
        """Says where the next steps commit tokens; the first reads all that is not kept."""
        self.stage, kind, block = stage, self.canvas.call.cache, stage.within
        if self.cache is None:
            return
        self.is_new.fill_(True)
        self.column = torch.arange(block.shape[1], device=block.device)
        self.complete, self.end = torch.zeros_like(stage.end), stage.end
        if self.block_length is not None:
            first, last = block.long().argmax(1), stage.end - self.shift
            self.complete = first - first % self.block_length
            self.end = last + -last % self.block_length
        self.again = self.column >= self.complete[:, None]
        if kind is not None:
            if self.shift:
                block = block | F.pad(block[:, 1:], (0, 1))  # where the first of them is predicted
            is_behind = (block.long().cumsum(1) > 0) & self.canvas.attention_mask.bool()
            self.again = is_behind if kind == "prefix" else block

    def forget(self, rows: torch.Tensor) -> None:
        """Says of which rows, `[batch]` bool, tokens have changed anywhere."""
        self.is_new |= rows
        self.kept[rows] = 0

    def read(self, rows: torch.Tensor) -> BackboneStates:
        """Predicts the tokens of some rows `[n]`, up to where the block needs it.

        The result is valid until the next call.
        """
        end = int(self.stage.end[rows].max())
        tokens, mask = self.canvas.tokens[rows, :end], self.canvas.attention_mask[rows, :end]
        if self.cache is None:
            return self.family.states(self.backbone, tokens, mask)
        unknown = self.column >= self.kept[rows, None]
        wanted = torch.where(self.is_new[rows, None], unknown, self.again[rows])
        wanted &= self.column < self.end[rows, None]
        self.kept[rows], self.is_new[rows] = self.complete[rows], False
        # A row with fewer columns than others computes its last one more than once.
        count = wanted.sum(-1, keepdim=True)
        order = wanted.logical_not().long().argsort(dim=1, stable=True)
        nth = self.column[: int(count.max())]
        columns = order.gather(1, torch.minimum(nth, (count - 1).clamp(min=0)))
        self.cache.begin(rows, columns, end)
        return self.family.states(self.backbone, tokens, mask, cache=self.cache)


def take_step(
    model: CoupledBackbone,
    canvas: Canvas,
    rows: torch.Tensor,
    states: BackboneStates,
    stage: Stage,
    number: int,
) -> None:
    """Commits tokens of a stage to the canvas, in all rows of a pass, those that are alike at once.

    `states` are of a pass over the `rows` `[n]`; `number` counts the steps of the stage from 0.
    """
    call, part = canvas.call, canvas.rows(rows)
    scheduler, length = call.scheduler, call.head.window_length
    states, num_steps = without_early_ends(states, part), stage.num_steps[rows]
    covered = stage.within[rows]  # by windows
    is_open = part.open_positions()
    eligible = open_ = is_open & covered
    at_least = fewest(scheduler.settings, open_, (num_steps - number).clamp(min=1))
    chooses = call.block_length is None and not call.is_uniform
    if call.is_uniform:
        at_least = kept_pace(open_, number + 1, num_steps.clamp(min=1))
    if chooses:
        covered = eligible = _chosen(model, part, rows, states, num_steps, number, open_)
    first_window = part.window_origin if call.infill else part.start
    starts = windows_over(covered, part.window_origin, first_window, length)
    if chooses and scheduler.settings.strategy in ADAPTIVE:
        # An adaptive strategy may commit any open position of these windows.
        eligible = open_ & positions_of(starts, length)
    read = torch.arange(states.last_hidden_state.shape[1], device=rows.device)
    present = part.attention_mask[:, : len(read)] * (read < stage.end[rows, None])
    has_masks, kept = open_.any(-1), torch.zeros_like(open_)
    for index in rows_alike(starts.sum(-1), num_steps, has_masks.long()):
        if not has_masks[index[0]]:  # tokens are edited there, and none is filled
            continue
        # 1. The distribution over the windows.
        group, group_rows = part.rows(index), rows[index]
        window_start = starts[index].nonzero()[:, 1].view(len(index), -1)
        within = torch.arange(length, device=rows.device)
        position = (window_start[..., None] + within).flatten(1)
        with numbered(rows):
            distribution = model.window_distribution(
                states,
                part.tokens[:, : len(read)],
                window_start.flatten(),
                present,
                rows=index.repeat_interleave(window_start.shape[1]),
                temperature=scheduler.settings.evidence_temperature,
                head=call.head,
                predicted=is_open[:, : len(read)],
            )

        # 2. Some of the masked tokens are committed.
        column = position.clamp(max=canvas.tokens.shape[1] - 1)
        known = group.attention_mask.bool() & ~group.is_noise()
        scheduler.set_timesteps(int(num_steps[index[0]]))
        with numbered(group_rows):
            output = scheduler.step(
                distribution,
                scheduler.timesteps[: number + 1][-1],
                group.tokens.gather(1, column),
                generator=generators_of(call.generator, group_rows),
                eligible=eligible[index].gather(1, column),
                at_least=at_least[index],
                logits_processor=call.logits_processor,
                text=RowText(group.tokens, known, position, group_rows),
            )

        # 3. They go onto the canvas.
        row, at = distribution.present.view_as(position).nonzero(as_tuple=True)
        canvas.tokens[group_rows[row], position[row, at]] = output.prev_sample[row, at]
        kept[index[row], position[row, at]] = output.transfer_index[row, at]
    if canvas.noisy is not None:  # a part is decided as a whole, in the step that keeps all of it
        decided = ~(open_ & ~kept).any(-1)
        noisy = canvas.noisy[rows] & ~(stage.within[rows] & decided[:, None])
        canvas.noisy = canvas.noisy.index_put((rows,), noisy)


def without_early_ends(states: BackboneStates, part: Canvas) -> BackboneStates:
    """The states of the rows in `part`, whose logits rule out end tokens that come too early."""
    if not part.end_ids or not bool((part.no_end_before > part.start).any()):
        return states
    end_ids = part.tokens.new_tensor(part.end_ids)

    def read_logits(index: Any) -> torch.Tensor:
        logits = states.logits(index)
        too_early = (index[1] < part.no_end_before[index[0]])[:, None]
        ends = logits[:, end_ids].masked_fill(too_early, -torch.inf)
        return logits.index_copy(-1, end_ids, ends)

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
    spans = part.generated.shape[1] - part.generated.flip(1).long().argmax(-1) - part.start
    for index in rows_alike(num_steps, spans):
        column = part.start[index, None] + torch.arange(int(spans[index[0]]), device=rows.device)
        eligible = open_[index].gather(1, column)
        at = eligible.nonzero(as_tuple=True)
        logits = states.logits((index[at[0]], column[at]))
        logits = without_tokens(logits, call.mask_token_id, model.config.forbidden_token_ids)
        logits = logits.new_zeros(*column.shape, logits.shape[-1]).index_put_(at, logits)
        call.scheduler.set_timesteps(int(num_steps[index[0]]))
        chosen[index[:, None], column] = call.scheduler.select_positions(
            logits,
            call.scheduler.timesteps[: number + 1][-1],
            eligible,
            generator=generators_of(call.generator, rows[index]),
        )
    return chosen


def generators_of(generator: Generators, rows: torch.Tensor) -> Generators:
    """The generators of some rows."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    return [generator[row] for row in rows.tolist()]


def rows_alike(*numbers: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows `[n]` that agree in all of some numbers `[batch]`, group by group.

    They are stepped together: shapes, and so a row's random draws, do not depend on the other rows.
    """
    keys = torch.stack(numbers, dim=-1)
    for key in keys.unique(dim=0):
        yield (keys == key).all(-1).nonzero()[:, 0]
