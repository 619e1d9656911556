r"""Remasking: committed tokens that the others make improbable go back to being masked.

After a step has committed its tokens, each token of the present block is judged by its exact
leave-one-out conditional `p(x_i | all other known tokens)`. A backbone predicts what is masked, so
the token's own factor `phi_i` is that of the pass in which it was committed; the circuit and the
other positions are those of the present pass. One forward-backward over the chain gives all of
them. Of the tokens below the threshold the least probable of each window goes back, and the others
are judged again without it, until none is left.

A token goes back at most once, and the last step of a block takes none back: decoding ends. It is
judged only under the states that it was committed under: those of a window at the same place, with
the same text to copy from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..circuits import CoupledCategorical
from ..circuits.distribution.conditionals import leave_one_out
from .drawing import Drawing
from .scheduler_output import CoDDSchedulerOutput


@dataclass
class CommitMemory:
    """What is remembered of the tokens that were committed in a block; a fresh one for each block.

    All are None until a step has written to it.

    Attributes:
        tokens: `[batch, length]`, the tokens after the last step.
        held: `[batch, length]` bool, committed while the circuit was applied.
        returned: `[batch, length]` bool, positions that went back once.
        log_probs: `[batch, length]`, the backbone's log-probability of the token in the pass that
            committed it.
        soft_evidence: `[batch, length, H + J]`, what the prediction of that pass gave to the
            latents.
        states: `[batch, length]`, a fingerprint of the copy states of the window then.
    """

    tokens: torch.Tensor | None = None
    held: torch.Tensor | None = None
    returned: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    soft_evidence: torch.Tensor | None = None
    states: torch.Tensor | None = None


class CanvasMemory:
    """A memory by position on a canvas `[batch, T]`, on which windows may lie anew in each step."""

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
        memory = CommitMemory(*(tensor[at] for tensor in vars(self.memory).values()))
        memory.held &= (position <= last) & (self.window_start[at] == window_start)
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
            new = {n: t.new_zeros(*canvas.shape, *t.shape[2:]) for n, t in vars(memory).items()}
            self.memory = CommitMemory(**new)
        row, column = (position < canvas.shape[1]).nonzero(as_tuple=True)
        at = rows[row], position[row, column]
        self.window_start[at] = window_start[row, column]
        for name, tensor in vars(memory).items():
            kept = getattr(self.memory, name)
            if tensor.ndim == 3:
                width = max(kept.shape[-1], tensor.shape[-1])
                kept, tensor = _of_width(kept, width), _of_width(tensor, width)
                self.memory.soft_evidence = kept
            kept[at] = tensor[row, column]


def _of_width(evidence: torch.Tensor, width: int) -> torch.Tensor:
    """Evidence `[..., width]`; what is cut off or added belongs to copy states that are absent."""
    return F.pad(evidence, (0, width - evidence.shape[-1]), value=-torch.inf)


def _fingerprint(plain: CoupledCategorical) -> torch.Tensor:
    """`[batch * W, L]`: equal where the copy states of the windows emit the same."""
    states = torch.zeros_like(plain.tokens)
    if plain.context.copies is None:
        return states
    copies = plain.context.copies
    emitted = torch.where(copies.start[:, 0] > -torch.inf, copies.tokens + 1, 0)
    powers = torch.full_like(emitted[0], 6364136223846793005).cumprod(0)  # modulo 2**64
    return states + (emitted * powers).sum(-1, keepdim=True)


def take_back(drawing: Drawing, output: CoDDSchedulerOutput, memory: CommitMemory) -> torch.Tensor:
    """`[batch, length]` bool: the tokens that go back, those of this step among them.

    Args:
        drawing: of the step.
        output: its tokens.
        memory: of earlier steps; it is brought up to date.
    """
    plain, split, join = drawing.plain, drawing.split, drawing.join
    active = plain.active[:, None].expand_as(plain.masked)
    tokens, committed = split(output.prev_sample), split(output.transfer_index)
    held, returned = torch.zeros_like(committed), torch.zeros_like(committed)
    evidence = plain.latents.evidence
    log_probs = plain.prediction.log_prob_of(torch.where(plain.masked, tokens, 0))
    states = _fingerprint(plain)
    if memory.held is not None:
        returned = split(memory.returned)
        # What the caller has changed since is not ours to take back.
        same = (split(memory.tokens) == tokens) & (split(memory.states) == states)
        held = split(memory.held) & same & ~committed
        past = _of_width(memory.soft_evidence, evidence.shape[-1]).view_as(evidence)
        evidence = torch.where(held[..., None], past, evidence)
        log_probs = torch.where(held, split(memory.log_probs), log_probs)
    held = held | (committed & active)
    known = plain.observed | committed
    back = torch.zeros_like(held)
    judged, threshold = held & ~returned & active, drawing.settings.remask_threshold
    while bool(judged.any()):
        probs = leave_one_out(plain, tokens, known, evidence, log_probs)
        least, place = probs.masked_fill(~judged, torch.inf).min(-1)
        goes = F.one_hot(place, held.shape[1]).bool() & (least < threshold)[:, None]
        back, known, judged = back | goes, known & ~goes, judged & ~goes
        judged = judged & goes.any(-1, keepdim=True)  # nothing changed in the other windows
    memory.tokens, memory.held = join(tokens), join(held & ~back)
    memory.returned, memory.log_probs = join(returned | back), join(log_probs)
    memory.soft_evidence, memory.states = join(evidence), join(states)
    return join(back)
