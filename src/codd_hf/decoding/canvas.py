"""The canvas that decoding fills: what is decoded when, and under which windows.

The windows of a row lie on a grid; a step has those that hold a position of the block or, in the
full paradigm, a position chosen by the backbone's prediction.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..checks.arguments import check_unmasked
from ..coupling.windows import CoupledBackbone, check_size
from .call import DecodingCall


class Stage(NamedTuple):
    """A part of every row, decoded before the next one is begun.

    Attributes:
        within: `[batch, T]` bool, the positions that are decoded.
        num_steps: `[batch]`, the most steps that each row may take; 0 for rows that are done.
    """

    within: torch.Tensor
    num_steps: torch.Tensor


class Canvas:
    """Rows of tokens, `[batch, T]`, some of which are still the mask token.

    A row is `[prompt][masks][padding]` or, to infill, `[template][padding]`, however its prompt was
    padded. Windows begin where a prompt ends. In a template, as many windows as the span from the
    first gap to the last needs are centred over it, so that they cover text on both sides.

    Args:
        model: the backbone.
        call: the choices of the call.
        input_ids: `[batch, length]`, padded on any side.
        attention_mask: `[batch, length]`, 0 at padding, or None.

    Attributes:
        tokens: `[batch, T]`.
        attention_mask: `[batch, T]`, 0 at padding.
        generated: `[batch, T]` bool, the positions to generate.
        start: `[batch]`, the first generated position; forced tokens and blocks count from here.
        window_origin: `[batch]`, where the grid of windows begins.
        no_end_before: `[batch]`, positions before this one hold no end token.
        end_ids: the end tokens; in a gap of a template none of them is drawn.
        stages: those of the decoding, in order.
        most_passes: of the backbone.

    Raises:
        ValueError: a prompt holds the mask token, a template has none, a row exceeds the positions
            of the backbone, or has fewer steps than blocks.
    """

    def __init__(
        self,
        model: CoupledBackbone,
        call: DecodingCall,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> None:
        self.call, device = call, input_ids.device
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = real.bool()
        given = size = self.no_end_before = real.sum(-1)
        what = f"The {int(given.max())} tokens of a template"
        if not call.infill:
            rows = (ids[mask] for ids, mask in zip(input_ids, real, strict=True))
            check_unmasked("input_ids", rows, call.mask_token_id)
            size = given + torch.tensor(call.gen_length, device=device)
            self.no_end_before = given + torch.tensor(call.min_new_tokens, device=device)
            longest = int(size.argmax())
            what = f"A prompt of {int(given[longest])} tokens and "
            what += f"`gen_length={call.gen_length[longest]}`"
        check_size(model.max_positions, int(size.max()), what)
        column = torch.arange(int(size.max()), device=device)
        attended = column < size[:, None]
        self.attention_mask = attended.long()
        self.tokens = torch.where(attended, call.mask_token_id, call.behind)
        self.tokens[column < given[:, None]] = input_ids[real].long()
        self.generated = attended & (self.tokens == call.mask_token_id)
        for row in (~self.generated.any(-1)).nonzero()[:, 0].tolist():
            raise ValueError(
                f"`infill` fills mask tokens, of which there is none in row {row}: put one (id "
                f"{call.mask_token_id}) wherever a token is to be found."
            )
        self.start = self.window_origin = self.generated.long().argmax(-1)
        self.end_ids, padding = call.eos_token_id, model.config.pad_token_id
        if call.infill:
            span = torch.where(self.generated, column, 0).amax(-1) + 1 - self.start
            room = -span % call.head.window_length
            self.window_origin = self.start - torch.minimum(room // 2, self.start)
            self.end_ids = self.end_ids if padding is None else [*self.end_ids, padding]
        for row, forced in enumerate(call.forced_tokens):
            for place, token in forced.items():
                self.tokens[row, self.start[row] + place] = token
        block = torch.zeros_like(self.tokens)
        if call.block_length is not None:
            # A block-causal backbone counts blocks from the beginning of the row.
            is_block_causal = getattr(model.config.text_config, "block_length", None) is not None
            block = block + column - (0 if is_block_causal else self.start[:, None])
            block = block.div(call.block_length, rounding_mode="floor")
        self.stages = self._stages(block)
        steps = (stage.num_steps for stage in self.stages)
        self.most_passes = int(sum(steps, torch.zeros_like(self.start)).max())

    def _stages(self, block: torch.Tensor) -> list[Stage]:
        """Shares the steps of a row over those of its blocks `[batch, T]` in which masks are."""
        masked, stages = self.open(), list[Stage]()
        for row, steps in enumerate(self.call.num_inference_steps):
            blocks = block[row, masked[row]].unique().tolist()
            if steps is None:
                steps = max(-(-int(masked[row].sum()) // 4), len(blocks))
            if steps < len(blocks):
                raise ValueError(
                    f"`num_inference_steps` must be at least the number of blocks that are "
                    f"decoded, {len(blocks)} in row {row} with `block_length="
                    f"{self.call.block_length}`, got {steps}: take more steps or longer blocks."
                )
            for number, index in enumerate(blocks):
                if number == len(stages):
                    stages.append(Stage(torch.zeros_like(masked), torch.zeros_like(self.start)))
                # Shared evenly; the remainder goes to the first blocks.
                share = steps // len(blocks) + (number < steps % len(blocks))
                stages[number].num_steps[row] = share
                stages[number].within[row] = self.generated[row] & (block[row] == index)
        return stages

    def rows(self, index: torch.Tensor) -> Canvas:
        """A canvas of some rows, by ascending numbers `[n]`; of all of them, this one."""
        if len(index) == len(self.tokens):
            return self
        part = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(part, name, value[index])
        return part

    def open(self) -> torch.Tensor:
        """`[batch, T]` bool, where a token is to be committed: nowhere behind an end token."""
        return self.generated & (self.tokens == self.call.mask_token_id) & ~self._ends()[1]

    def close(self) -> None:
        """Makes what follows an end token padding, in the rows where nothing before is open."""
        end, after = self._ends()
        closed = end.any(-1) & ~self.open().any(-1)
        self.tokens = self.tokens.masked_fill(after & closed[:, None], self.call.behind)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts behind the prompts, or whole templates: tokens `[batch, n]`, and which are text.

        An end token is not text, nor is anything behind it.
        """
        begin = torch.zeros_like(self.start) if self.call.infill else self.start
        size = self.attention_mask.sum(-1) - begin
        number = torch.arange(int(size.max()), device=begin.device)
        inside = number < size[:, None]
        place = (begin[:, None] + number).clamp(max=self.tokens.shape[1] - 1)
        end, after = self._ends()
        is_text = inside & ~(end | after).gather(1, place)
        return torch.where(inside, self.tokens.gather(1, place), self.call.behind), is_text

    def _ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[batch, T]` bool twice: the first end token of each text, and all that follows it."""
        is_end = self.generated & torch.isin(self.tokens, self.tokens.new_tensor(self.end_ids))
        after = self.generated & (is_end.cumsum(-1) > is_end.long())
        return is_end & ~after, after

    def windows_over(self, chosen: torch.Tensor) -> torch.Tensor:
        """`[n, T]` bool: where the windows begin that hold a chosen position of `[n, T]`."""
        rows, columns = chosen.nonzero(as_tuple=True)
        starts = torch.zeros_like(chosen)
        length = self.call.head.window_length
        starts[rows, columns - (columns - self.window_origin[rows]) % length] = True
        return starts

    def positions_of(self, starts: torch.Tensor) -> torch.Tensor:
        """`[n, T]` bool: the positions in the windows that begin at `starts` `[n, T]`."""
        begun = starts.long().cumsum(-1)
        return begun > F.pad(begun, (self.call.head.window_length, 0))[:, : begun.shape[1]]


def rows_alike(*numbers: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows `[n]` that agree in all of some numbers `[batch]`, group by group.

    They are stepped together: shapes, and so a row's random draws, do not depend on the other rows.
    """
    keys = torch.stack(numbers, dim=-1)
    for key in keys.unique(dim=0):
        yield (keys == key).all(-1).nonzero()[:, 0]
