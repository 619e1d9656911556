"""Where the next windows are placed: which positions are decoded when, and under which windows.

A *stage* is a part of every row that is decoded before the next one is begun: a block or, in the
full paradigm, everything. The windows of a row lie on a grid. In a step of a stage they are

- in the block paradigm, those that hold a position of the block;
- in the full paradigm, those that hold the positions chosen by the backbone's prediction (dynamic
  windowing): the smallest cover of these by the grid.

Rows have different numbers of steps and of windows. Those that agree in both are stepped together:
shapes, and so a row's random draws, do not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .call import DecodingCall
from .canvas import Canvas


class Stage(NamedTuple):
    """A part of every row.

    Attributes:
        within: `[batch, T]` bool, the positions that are decoded.
        num_steps: `[batch]`, the most steps that each row may take; 0 for rows that are done.
    """

    within: torch.Tensor
    num_steps: torch.Tensor


class Placement(NamedTuple):
    """Rows of a step that are alike, their windows, and where those may commit tokens.

    Attributes:
        index: `[n]`, which of the step's rows.
        num_steps: the steps of each of these rows in the stage.
        window_start: `[n, W]`, positions on the canvas.
        eligible: `[n, T]` bool.
        at_least: `[n]`, the fewest tokens that each row commits; None for an even pace.
    """

    index: torch.Tensor
    num_steps: int
    window_start: torch.Tensor
    eligible: torch.Tensor
    at_least: torch.Tensor | None


def plan_stages(canvas: Canvas, call: DecodingCall, from_position_0: bool = False) -> list[Stage]:
    """Cuts the rows into blocks and shares the steps of a row over those in which masks are.

    Args:
        canvas: before the first step.
        call: gives the length of a block and the steps of each row.
        from_position_0: whether blocks are counted from the beginning of the row, as a block-causal
            backbone counts them, so that the first one may be shorter.

    Raises:
        ValueError: a row has fewer steps than blocks.
    """
    masked, block = canvas.open(early_stop=False), torch.zeros_like(canvas.tokens)
    if call.block_length is not None:
        column = torch.arange(block.shape[1], device=block.device)
        first = torch.zeros_like(canvas.start) if from_position_0 else canvas.start
        block = (column - first[:, None]).div(call.block_length, rounding_mode="floor")
    stages: list[Stage] = []
    for row, steps in enumerate(call.num_inference_steps):
        blocks = block[row, masked[row]].unique().tolist()
        if steps is None:
            steps = max(-(-int(masked[row].sum()) // 4), len(blocks))
        if steps < len(blocks):
            raise ValueError(
                f"`num_inference_steps` must be at least the number of blocks that are decoded, "
                f"{len(blocks)} in row {row} with `block_length={call.block_length}`, got {steps}: "
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


def window_starts(canvas: Canvas, chosen: torch.Tensor, window_length: int) -> torch.Tensor:
    """`[n, T]` bool: where the windows of the grid begin that hold a chosen `[n, T]` position."""
    rows, columns = chosen.nonzero(as_tuple=True)
    starts = torch.zeros_like(chosen)
    starts[rows, columns - (columns - canvas.window_origin[rows]) % window_length] = True
    return starts


def windows_end(canvas: Canvas, stage: Stage, window_length: int) -> int:
    """The column after the last window that holds a position of a stage, or after the canvas."""
    starts = window_starts(canvas, stage.within, window_length).any(0).nonzero()
    return min(int(starts.max()) + window_length, canvas.tokens.shape[1])


def place_on_block(
    canvas: Canvas, stage: Stage, wanted: torch.Tensor, window_length: int
) -> Iterator[Placement]:
    """The windows of the block paradigm.

    Args:
        canvas: the rows of a step.
        stage: of these rows.
        wanted: `[n, T]` bool, where tokens may be committed.
        window_length: of the circuit.
    """
    starts = window_starts(canvas, stage.within, window_length)
    return _alike(starts, wanted, stage.num_steps, None)


def place_on_chosen(
    canvas: Canvas,
    stage: Stage,
    wanted: torch.Tensor,
    chosen: torch.Tensor,
    steps_done: int,
    window_length: int,
    adaptive: bool,
) -> Iterator[Placement]:
    """The windows of the full paradigm, over the positions that a step chose.

    Args:
        canvas: the rows of a step.
        stage: of these rows.
        wanted: `[n, T]` bool, where tokens may be committed.
        chosen: `[n, T]` bool, those of them that the backbone's prediction chose.
        steps_done: the steps before this one.
        window_length: of the circuit.
        adaptive: whether the coupled distribution decides what is committed in the windows, at
            least at an even pace; otherwise the chosen positions are.
    """
    starts = window_starts(canvas, chosen, window_length)
    if not adaptive:
        return _alike(starts, chosen, stage.num_steps, chosen.sum(-1))
    column = torch.arange(wanted.shape[1], device=wanted.device)
    start = column - (column - canvas.window_origin[:, None]) % window_length
    covered = starts.gather(1, start.clamp(min=0))
    at_least = -(-wanted.sum(-1) // (stage.num_steps - steps_done))
    return _alike(starts, wanted & covered, stage.num_steps, at_least)


def _alike(
    starts: torch.Tensor,
    eligible: torch.Tensor,
    num_steps: torch.Tensor,
    at_least: torch.Tensor | None,
) -> Iterator[Placement]:
    """Placements of the rows that have equal numbers of windows and of steps."""
    number = starts.sum(-1)
    for windows, steps in sorted(set(zip(number.tolist(), num_steps.tolist(), strict=True))):
        index = ((number == windows) & (num_steps == steps)).nonzero()[:, 0]
        yield Placement(
            index,
            steps,
            starts[index].nonzero()[:, 1].view(len(index), windows),
            eligible[index],
            None if at_least is None else at_least[index],
        )
