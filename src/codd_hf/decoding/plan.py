"""What is decoded when, and under which windows of the circuit.

A *stage* is a part of every row that is decoded before the next one is begun: a block or, in the
full paradigm, everything. In a step of a stage, the windows of a row are

- in the block paradigm those of its grid that hold a position of the block;
- in the full paradigm those that hold the positions which the backbone's prediction chooses
  (dynamic windowing), which is the smallest such cover of the grid.

Rows have different numbers of steps and of windows. Those that agree in both are stepped together;
no number of one row enters the shapes, and so the random draws, of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .canvas import Canvas


@dataclass
class Stage:
    """A part of every row.

    Attributes:
        within: `[batch, T]` bool, the positions that are decoded.
        num_steps: `[batch]`, the most steps that each row may take; 0 for rows that are done.
    """

    within: torch.Tensor
    num_steps: torch.Tensor

    def rows(self, index: torch.Tensor) -> Stage:
        """The stage of some rows `[n]`."""
        return Stage(self.within[index], self.num_steps[index])


@dataclass
class WindowPlan:
    """Rows of a step that are alike, their windows, and where those may commit tokens.

    Attributes:
        rows: `[n]`, which rows.
        num_steps: the steps of each of these rows in the stage.
        window_start: `[n, W]`, positions on the canvas.
        eligible: `[n, T]` bool.
        at_least: `[n]`, the fewest tokens that each row commits; None for an even pace.
    """

    rows: torch.Tensor
    num_steps: int
    window_start: torch.Tensor
    eligible: torch.Tensor
    at_least: torch.Tensor | None

    def position(self, window_length: int) -> torch.Tensor:
        """`[n, W * window_length]`: where the windows' positions are; some may be past the end."""
        within = torch.arange(window_length, device=self.rows.device)
        return (self.window_start[:, :, None] + within).flatten(1)


def plan_stages(
    canvas: Canvas,
    num_inference_steps: Sequence[int | None],
    block_length: int | None,
    from_position_0: bool = False,
) -> list[Stage]:
    """Cuts the rows into blocks and shares the steps of a row over those in which masks are.

    Args:
        canvas: before the first step.
        num_inference_steps: of each row; None for one for four masks and at least one a block.
        block_length: positions in a block; None for one stage.
        from_position_0: whether blocks are counted from the beginning of the row, as a block-causal
            backbone counts them, so that the first one may be shorter.

    Raises:
        ValueError: a row has fewer steps than blocks.
    """
    column = torch.arange(canvas.tokens.shape[1], device=canvas.tokens.device)
    block = torch.zeros_like(canvas.tokens)
    if block_length is not None:
        first = torch.zeros_like(canvas.start) if from_position_0 else canvas.start
        block = (column - first[:, None]).div(block_length, rounding_mode="floor")
    masked = canvas.open(early_stop=False)
    shares = []
    for row in range(len(masked)):
        blocks = block[row, masked[row]].unique().tolist()
        steps = num_inference_steps[row]
        if steps is None:
            steps = max(-(-int(masked[row].sum()) // 4), len(blocks))
        if steps < len(blocks):
            raise ValueError(
                f"`num_inference_steps` must be at least the number of blocks that are decoded, "
                f"{len(blocks)} in row {row} with `block_length={block_length}`, got {steps}: take "
                "more steps or longer blocks."
            )
        shares.append(list(zip(blocks, share_steps(steps, len(blocks)), strict=True)))
    stages = []
    for number in range(max(map(len, shares))):
        stage = Stage(torch.zeros_like(masked), torch.zeros_like(canvas.start))
        for row, share in enumerate(shares):
            if number < len(share):
                index, stage.num_steps[row] = share[number]
                stage.within[row] = canvas.generated[row] & (block[row] == index)
        stages.append(stage)
    return stages


def share_steps(num_inference_steps: int, num_blocks: int) -> list[int]:
    """Shares steps evenly; the remainder goes to the first blocks."""
    return [
        num_inference_steps // num_blocks + (block < num_inference_steps % num_blocks)
        for block in range(num_blocks)
    ]


def block_windows(
    canvas: Canvas, stage: Stage, wanted: torch.Tensor, window_length: int
) -> Iterator[WindowPlan]:
    """The windows of the block paradigm: those of the grid that hold a position of the block.

    Args:
        canvas: the rows of a step.
        stage: of these rows.
        wanted: `[n, T]` bool, where tokens may be committed.
        window_length: of the circuit.
    """
    starts = _grid_starts(canvas, stage.within, window_length)
    return _rows_alike(starts, wanted, stage.num_steps, None)


def windows_end(canvas: Canvas, stage: Stage, window_length: int) -> int:
    """The column after the last window of `block_windows`, or after the canvas."""
    starts = _grid_starts(canvas, stage.within, window_length)
    columns = starts.any(0).nonzero()
    last = int(columns.max()) if len(columns) else 0
    return min(last + window_length, starts.shape[1])


def dynamic_windows(
    canvas: Canvas,
    stage: Stage,
    wanted: torch.Tensor,
    selected: torch.Tensor,
    step: int,
    window_length: int,
    adaptive: bool,
) -> Iterator[WindowPlan]:
    """The windows of the full paradigm, placed over the positions of a step.

    Args:
        canvas: the rows of a step.
        stage: of these rows.
        wanted: `[n, T]` bool, where tokens may be committed.
        selected: `[n, T]` bool, those of them that the backbone's prediction chose.
        step: the number of the step, from 0.
        window_length: of the circuit.
        adaptive: whether the coupled distribution decides what is committed in the windows, at
            least at an even pace; otherwise that is what was selected.
    """
    starts = _grid_starts(canvas, selected, window_length)
    covered = starts.long().cumsum(-1)
    ended = torch.nn.functional.pad(covered, (window_length, 0))[:, : covered.shape[1]]
    covered = covered > ended
    if adaptive:
        eligible = wanted & covered
        at_least = -(-wanted.sum(-1) // (stage.num_steps - step))
    else:
        eligible = selected & covered
        at_least = eligible.sum(-1)
    return _rows_alike(starts, eligible, stage.num_steps, at_least)


def _grid_starts(canvas: Canvas, wanted: torch.Tensor, window_length: int) -> torch.Tensor:
    """`[n, T]` bool: where the windows of the grid begin that hold a wanted `[n, T]` position."""
    rows, columns = wanted.nonzero(as_tuple=True)
    origin = canvas.window_origin[rows]
    starts = torch.zeros_like(wanted)
    starts[rows, columns - (columns - origin) % window_length] = True
    return starts


def _rows_alike(
    starts: torch.Tensor,
    eligible: torch.Tensor,
    num_steps: torch.Tensor,
    at_least: torch.Tensor | None,
) -> Iterator[WindowPlan]:
    """Plans for the rows that have equal numbers of windows and of steps."""
    number = starts.sum(-1)
    for windows, steps in sorted(set(zip(number.tolist(), num_steps.tolist(), strict=True))):
        rows = ((number == windows) & (num_steps == steps)).nonzero()[:, 0]
        yield WindowPlan(
            rows,
            steps,
            starts[rows].nonzero()[:, 1].view(len(rows), windows),
            eligible[rows],
            None if at_least is None else at_least[rows],
        )
