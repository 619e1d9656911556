"""The canvas that decoding fills: what is decoded when, and under which windows.

A *stage* is a part of every row that is decoded before the next one is begun: a block or, in the
full paradigm, everything. The windows of a row lie on a grid; a step has those that hold a position
of the block or, in the full paradigm, a position chosen by the backbone's prediction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..checks.arguments import check_unmasked
from ..coupling.windows import CoupledBackbone, check_size
from .call import DecodingCall


class Stage(NamedTuple):
    """A part of every row.

    Attributes:
        within: `[batch, T]` bool, the positions that are decoded.
        num_steps: `[batch]`, the most steps that each row may take; 0 for rows that are done.
    """

    within: torch.Tensor
    num_steps: torch.Tensor


@dataclass
class Canvas:
    """Rows of tokens, `[batch, T]`, some of which are still the mask token.

    Real tokens come first in a row, so that a row meets the same absolute positions however its
    prompt was padded. The generated positions follow a prompt, or are the gaps of a template.

    Attributes:
        tokens: `[batch, T]`.
        attention_mask: `[batch, T]`, 0 at padding.
        generated: `[batch, T]` bool, the positions to generate.
        start: `[batch]`, the first generated position; forced tokens and blocks count from here.
        window_origin: `[batch]`, where the grid of windows begins.
        no_end_before: `[batch]`, positions before this one hold no end token.
        end_ids: `[k]`, the end tokens; in a gap of a template none of them is drawn.
        call: the choices of the call.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor
    generated: torch.Tensor
    start: torch.Tensor
    window_origin: torch.Tensor
    no_end_before: torch.Tensor
    end_ids: torch.Tensor
    call: DecodingCall

    @classmethod
    def lay_out(
        cls,
        model: CoupledBackbone,
        call: DecodingCall,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> Canvas:
        """Lays each row out as `[prompt][masks][padding]` or, to infill, `[template][padding]`.

        Windows begin where a prompt ends. In a template, as many windows as the span from the first
        gap to the last needs are centred over it, so that they cover text on both sides.

        Args:
            model: gives the number of positions.
            call: the choices of the call.
            input_ids: `[batch, length]`, padded on any side.
            attention_mask: `[batch, length]`, 0 at padding, or None.

        Raises:
            ValueError: a prompt holds the mask token, a template has none, or a row exceeds the
                positions.
        """
        device = input_ids.device
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = real.bool()
        given = size = no_end_before = real.sum(-1)
        what = f"The {int(given.max())} tokens of a template"
        if not call.infill:
            rows = (ids[mask] for ids, mask in zip(input_ids, real, strict=True))
            check_unmasked("input_ids", rows, call.mask_token_id)
            size = given + torch.tensor(call.gen_length, device=device)
            no_end_before = given + torch.tensor(call.min_new_tokens, device=device)
            longest = int(size.argmax())
            length = call.gen_length[longest]
            what = f"A prompt of {int(given[longest])} tokens and `gen_length={length}`"
        length = int(size.max())
        check_size(model.max_positions, length, what)
        column = torch.arange(length, device=device)
        attended = column < size[:, None]
        tokens = torch.where(attended, call.mask_token_id, call.behind)
        tokens[column < given[:, None]] = input_ids[real].long()
        generated = attended & (tokens == call.mask_token_id)
        for row in (~generated.any(-1)).nonzero()[:, 0].tolist():
            raise ValueError(
                f"`infill` fills mask tokens, of which there is none in row {row}: put one (id "
                f"{call.mask_token_id}) wherever a token is to be found."
            )
        start = origin = generated.long().argmax(-1)
        ends = call.eos_token_id
        if call.infill:
            span = torch.where(generated, column, 0).amax(-1) + 1 - start
            origin = start - torch.minimum(-span % call.head.window_length // 2, start)
            padding = model.config.pad_token_id
            ends = ends if padding is None else [*ends, padding]
        for row, forced in enumerate(call.forced_tokens):
            for place, token in forced.items():
                tokens[row, start[row] + place] = token
        return cls(
            tokens=tokens,
            attention_mask=attended.long(),
            generated=generated,
            start=start,
            window_origin=origin,
            no_end_before=no_end_before,
            end_ids=torch.tensor(ends, dtype=torch.long, device=device),
            call=call,
        )

    def rows(self, index: torch.Tensor) -> Canvas:
        """A canvas of some rows, by ascending numbers `[n]`; of all of them, this one."""
        if len(index) == len(self.tokens):
            return self
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        del tensors["end_ids"]
        return replace(self, **{name: tensor[index] for name, tensor in tensors.items()})

    def open(self) -> torch.Tensor:
        """`[batch, T]` bool, where a token is to be committed: nowhere behind an end token."""
        return self.generated & (self.tokens == self.call.mask_token_id) & ~self._ends()[1]

    def close(self) -> torch.Tensor:
        """`[batch]` bool: the rows with an end token and nothing open before.

        In these rows, tokens that follow an end token become padding.
        """
        end, after = self._ends()
        closed = end.any(-1) & ~self.open().any(-1)
        self.tokens = self.tokens.masked_fill(after & closed[:, None], self.call.behind)
        return closed

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
        if self.call.infill:  # an end token in a gap ends nothing
            return torch.zeros_like(self.generated), torch.zeros_like(self.generated)
        is_end = self.generated & torch.isin(self.tokens, self.end_ids)
        after = self.generated & (is_end.cumsum(-1) > is_end.long())
        return is_end & ~after, after

    def stages(self, from_position_0: bool = False) -> list[Stage]:
        """Cuts the rows into blocks and shares the steps of a row over those in which masks are.

        Args:
            from_position_0: whether blocks are counted from the beginning of the row, as a
                block-causal backbone counts them, so that the first one may be shorter.

        Raises:
            ValueError: a row has fewer steps than blocks.
        """
        masked, block = self.open(), torch.zeros_like(self.tokens)
        block_length = self.call.block_length
        if block_length is not None:
            column = torch.arange(block.shape[1], device=block.device).expand_as(block)
            column = column if from_position_0 else column - self.start[:, None]
            block = column.div(block_length, rounding_mode="floor")
        stages: list[Stage] = []
        for row, steps in enumerate(self.call.num_inference_steps):
            blocks = block[row, masked[row]].unique().tolist()
            if steps is None:
                steps = max(-(-int(masked[row].sum()) // 4), len(blocks))
            if steps < len(blocks):
                raise ValueError(
                    f"`num_inference_steps` must be at least the number of blocks that are "
                    f"decoded, {len(blocks)} in row {row} with `block_length={block_length}`, got "
                    f"{steps}: take more steps or longer blocks."
                )
            for number, index in enumerate(blocks):
                if number == len(stages):
                    stages.append(Stage(torch.zeros_like(masked), torch.zeros_like(self.start)))
                # Shared evenly; the remainder goes to the first blocks.
                share = steps // len(blocks) + (number < steps % len(blocks))
                stages[number].num_steps[row] = share
                stages[number].within[row] = self.generated[row] & (block[row] == index)
        return stages

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
