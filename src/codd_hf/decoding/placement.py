"""Where the next windows are placed: which positions are decoded when, and under which windows.

A *stage* is a part of every row that is decoded before the next one is begun: a block or, in the
full paradigm, everything. The windows of a row lie on a grid. In a step of a stage they are those
that hold a position of the block or, in the full paradigm, a position chosen by the backbone's
prediction (dynamic windowing): the smallest cover of these by the grid.

Rows have different numbers of steps and of windows. Those that agree in both are stepped together:
shapes, and so a row's random draws, do not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .canvas import Canvas


class Stage(NamedTuple):
    """A part of every row.

    Attributes:
        within: `[batch, T]` bool, the positions that are decoded.
        num_steps: `[batch]`, the most steps that each row may take; 0 for rows that are done.
    """

    within: torch.Tensor
    num_steps: torch.Tensor


def plan_stages(canvas: Canvas, from_position_0: bool = False) -> list[Stage]:
    """Cuts the rows into blocks and shares the steps of a row over those in which masks are.

    Args:
        canvas: before the first step.
        from_position_0: whether blocks are counted from the beginning of the row, as a block-causal
            backbone counts them, so that the first one may be shorter.

    Raises:
        ValueError: a row has fewer steps than blocks.
    """
    masked, block = canvas.open(), torch.zeros_like(canvas.tokens)
    block_length = canvas.call.block_length
    if block_length is not None:
        column = torch.arange(block.shape[1], device=block.device).expand_as(block)
        column = column if from_position_0 else column - canvas.start[:, None]
        block = column.div(block_length, rounding_mode="floor")
    stages: list[Stage] = []
    for row, steps in enumerate(canvas.call.num_inference_steps):
        blocks = block[row, masked[row]].unique().tolist()
        if steps is None:
            steps = max(-(-int(masked[row].sum()) // 4), len(blocks))
        if steps < len(blocks):
            raise ValueError(
                f"`num_inference_steps` must be at least the number of blocks that are decoded, "
                f"{len(blocks)} in row {row} with `block_length={block_length}`, got {steps}: "
                "take more steps or longer blocks."
            )
        for number, index in enumerate(blocks):
            if number == len(stages):
                stages.append(Stage(torch.zeros_like(masked), torch.zeros_like(canvas.start)))
            # Shared evenly; the remainder goes to the first blocks.
            share = steps // len(blocks) + (number < steps % len(blocks))
            stages[number].num_steps[row] = share
            stages[number].within[row] = canvas.generated[row] & (block[row] == index)
    return stages


def windows_over(canvas: Canvas, chosen: torch.Tensor) -> torch.Tensor:
    """`[n, T]` bool: where the windows of the grid begin that hold a chosen `[n, T]` position."""
    rows, columns = chosen.nonzero(as_tuple=True)
    starts = torch.zeros_like(chosen)
    length = canvas.call.head.window_length
    starts[rows, columns - (columns - canvas.window_origin[rows]) % length] = True
    return starts


def positions_of(starts: torch.Tensor, length: int) -> torch.Tensor:
    """`[n, T]` bool: the positions in windows that begin at `starts` `[n, T]`, on one grid."""
    begun = starts.long().cumsum(-1)
    return begun > torch.nn.functional.pad(begun, (length, 0))[:, : begun.shape[1]]


def rows_alike(
    starts: torch.Tensor, num_steps: torch.Tensor
) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """Groups the rows that have equal numbers of windows and of steps.

    Yields:
        The numbers of the rows `[n]`, their steps, and where their windows begin `[n, W]`.
    """
    number = starts.sum(-1)
    for windows, steps in sorted(set(zip(number.tolist(), num_steps.tolist(), strict=True))):
        index = ((number == windows) & (num_steps == steps)).nonzero()[:, 0]
        yield index, steps, starts[index].nonzero()[:, 1].view(len(index), windows)
