r"""Remasking: committed tokens that the others make improbable go back to being masked.

After a step has committed its tokens, each token of the present block is judged by its exact
leave-one-out conditional `p(x_i | all other known tokens)`. A backbone predicts what is masked, so
the token's own factor `phi_i` is that of the pass in which it was committed; the circuit and the
other positions are those of the present pass. One forward-backward over the chain gives all of
them. Of the tokens below the threshold the least probable of each window goes back, and the others
are judged again without it, until none is left.

A token goes back at most once, and the last step of a block takes none back: decoding ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .candidates import CoupledWindows


@dataclass
class CommitMemory:
    """What is remembered of the tokens that were committed in a block; a fresh one for each block.

    All are None until a step has written to it.

    Attributes:
        tokens: `[batch, length]`, the tokens after the last step.
        held: `[batch, length]` bool, committed while the circuit was applied.
        returned: `[batch, length]` bool, positions that went back once.
        soft_evidence: `[batch, length, H + J]`, what the prediction of the pass that committed the
            token gave to the latents.
        log_probs: `[batch, length]`, the backbone's log-probability of the token in that pass.
    """

    tokens: torch.Tensor | None = None
    held: torch.Tensor | None = None
    returned: torch.Tensor | None = None
    soft_evidence: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None

    def _remember(self, tokens, held, returned, soft_evidence, log_probs) -> None:
        self.tokens, self.held, self.returned = tokens, held, returned
        self.soft_evidence, self.log_probs = soft_evidence, log_probs

    @property
    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.tokens, self.held, self.returned, self.soft_evidence, self.log_probs


class CanvasMemory:
    """A memory by position on a canvas `[batch, T]`, on which windows may lie anew in each step.

    What a prediction gave to the latents of one window says nothing about those of another, so that
    a token is judged again only under the window that it was committed under.
    """

    def __init__(self) -> None:
        self.memory = CommitMemory()
        self.window_start: torch.Tensor | None = None

    def read(
        self, rows: torch.Tensor, position: torch.Tensor, window_start: torch.Tensor
    ) -> CommitMemory:
        """The memory of some windows.

        Args:
            rows: `[n]`, of the canvas.
            position: `[n, length]`, of the windows' positions; those past the end are absent.
            window_start: `[n, length]`, where the window of each position begins.
        """
        if self.window_start is None:
            return CommitMemory()
        last = self.window_start.shape[1] - 1
        at = rows[:, None], position.clamp(max=last)
        memory = CommitMemory(*(t[at] for t in self.memory._tensors))
        same = (position <= last) & (self.window_start[at] == window_start)
        memory.held = memory.held & same
        return memory

    def write(
        self,
        rows: torch.Tensor,
        position: torch.Tensor,
        window_start: torch.Tensor,
        memory: CommitMemory,
        canvas: torch.Tensor,
    ) -> None:
        """Takes over what the memory of some windows of a `canvas` `[batch, T]` has become."""
        if memory.held is None:
            return
        if self.window_start is None:
            self.window_start = torch.full_like(canvas, -1)
            empty = (t.new_zeros(*canvas.shape, *t.shape[2:]) for t in memory._tensors)
            self.memory._remember(*empty)
        row, column = (position < canvas.shape[1]).nonzero(as_tuple=True)
        at = rows[row], position[row, column]
        self.window_start[at] = window_start[row, column]
        for own, new in zip(self.memory._tensors, memory._tensors, strict=True):
            own[at] = new[row, column]


def take_back(
    windows: CoupledWindows,
    tokens: torch.Tensor,
    committed: torch.Tensor,
    threshold: float,
    memory: CommitMemory,
) -> torch.Tensor:
    """`[batch, length]` bool: the tokens that go back, those of this step among them.

    Args:
        windows: the distribution of the pass, before the step.
        tokens: `[batch, length]`, after the step.
        committed: `[batch, length]` bool, the tokens of this step.
        threshold: tokens below this probability go back.
        memory: of earlier steps; it is brought up to date.
    """
    plain = windows.plain
    active = plain.active[:, None].expand_as(plain.masked)
    tokens, committed = windows.windows(tokens), windows.windows(committed)
    of_now = plain.soft_evidence, plain.factorized_log_prob_of(tokens)
    if memory.held is None:
        held, returned = torch.zeros_like(committed), torch.zeros_like(committed)
        evidence, log_probs = of_now
    else:
        held, returned = windows.windows(memory.held), windows.windows(memory.returned)
        # What the caller has changed since is not ours to take back.
        held = held & (windows.windows(memory.tokens) == tokens) & ~committed
        evidence = torch.where(held[..., None], memory.soft_evidence.view_as(of_now[0]), of_now[0])
        log_probs = torch.where(held, windows.windows(memory.log_probs), of_now[1])
    held = held | (committed & active)
    known = plain.observed | committed
    back = torch.zeros_like(held)
    judged = held & ~returned & active
    while bool(judged.any()):
        probs = plain.leave_one_out(tokens, known, evidence, log_probs)
        least, place = probs.masked_fill(~judged, torch.inf).min(-1)
        goes = (
            torch.nn.functional.one_hot(place, held.shape[1]).bool() & (least < threshold)[:, None]
        )
        back, known, judged = back | goes, known & ~goes, judged & ~goes
        judged = judged & goes.any(-1, keepdim=True)  # nothing changed in the other windows
    rows = windows.rows
    memory._remember(*map(rows, (tokens, held & ~back, returned | back, evidence, log_probs)))
    return rows(back)
