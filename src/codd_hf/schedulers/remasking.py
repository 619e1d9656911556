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

import torch
from torch.nn import functional as F

from ..circuits import CoupledCategorical
from .drawing import CoDDSchedulerOutput, StepDraw


class CommitMemory:
    """What is remembered of the tokens that were committed in a block; a fresh one for each block.

    Attributes:
        tokens: `[batch_size, length]`, committed while the circuit was applied; -1 for others. The
            last window may go past the end of the text.
        returned: bool, positions that went back once.
        log_probs: of the token by the backbone, in the pass that committed it.
        evidence: `[batch_size, length, H + J]`, what that pass's prediction gave to the latents.
        windows: a fingerprint of the window in that pass: its place and its copy states.
    """

    def __init__(
        self, batch_size: int, length: int, device: torch.device | str | None = None
    ) -> None:
        shape = batch_size, length
        self.tokens = torch.full(shape, -1, device=device)
        self.returned = torch.zeros(shape, dtype=torch.bool, device=device)
        self.log_probs = torch.zeros(shape, device=device)
        self.evidence = torch.zeros(*shape, 0, device=device)
        self.windows = torch.zeros(shape, dtype=torch.long, device=device)


def take_back(
    draw: StepDraw, output: CoDDSchedulerOutput, memory: CommitMemory, threshold: float
) -> torch.Tensor:
    """`[batch, length]` bool: the tokens that go back, those of this step among them.

    `memory`, of earlier steps, is brought up to date with the `output` of the step.
    """
    plain, split, join = draw.plain, draw.split, draw.join
    at = draw.text.rows[:, None], draw.text.position
    active = plain.active[:, None]
    tokens, committed = split(output.prev_sample), split(output.transfer_index)
    evidence, returned = plain.latents.evidence, split(memory.returned[at])
    log_probs = plain.prediction.log_prob_of(torch.where(plain.masked, tokens, 0))
    windows = (split(draw.text.position)[:, :1] + _copied(plain)).expand_as(tokens)
    # What was committed in another window, or changed by the caller, is not ours to take back.
    held = (split(memory.tokens[at]) == tokens) & (split(memory.windows[at]) == windows)
    held = held & ~committed
    past = _of_width(memory.evidence[at], evidence.shape[-1]).view_as(evidence)
    evidence = torch.where(held[..., None], past.to(evidence.dtype), evidence)
    log_probs = torch.where(held, split(memory.log_probs[at]).to(log_probs.dtype), log_probs)
    held = held | (committed & active)
    known, back = plain.observed | committed, torch.zeros_like(held)
    judged = held & ~returned & active
    while bool(judged.any()):
        probs = plain.latents.leave_one_out(tokens, known, evidence, log_probs)
        least, place = probs.masked_fill(~judged, torch.inf).min(-1)
        goes = F.one_hot(place, held.shape[1]).bool() & (least < threshold)[:, None]
        back, known, judged = back | goes, known & ~goes, judged & ~goes
        judged = judged & goes.any(-1, keepdim=True)  # nothing changed in the other windows
    width = max(memory.evidence.shape[-1], evidence.shape[-1])
    memory.evidence = _of_width(memory.evidence, width).to(evidence.dtype)
    memory.log_probs = memory.log_probs.to(log_probs.dtype)
    memory.evidence[at] = _of_width(join(evidence), width)
    memory.log_probs[at], memory.windows[at] = join(log_probs), join(windows)
    memory.tokens[at] = join(torch.where(held & ~back, tokens, -1))
    memory.returned[at] = join(returned | back)
    return join(back)


def _of_width(evidence: torch.Tensor, width: int) -> torch.Tensor:
    """Evidence `[..., width]`; what is cut off or added belongs to copy states that are absent."""
    return F.pad(evidence, (0, width - evidence.shape[-1]), value=-torch.inf)


def _copied(plain: CoupledCategorical) -> torch.Tensor:
    """`[batch * W, 1]`: equal where the copy states of the windows emit the same."""
    copies = plain.context.copies
    if copies is None:
        return torch.zeros_like(plain.tokens[:, :1])
    emitted = torch.where(copies.start[:, 0] > -torch.inf, copies.tokens + 1, 0)
    powers = torch.full_like(emitted[0], 6364136223846793005).cumprod(0)  # modulo 2**64
    return (emitted * powers).sum(-1, keepdim=True)
