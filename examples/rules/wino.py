"""WINO (arXiv 2507.18578): commit widely, and take back what the other tokens make improbable.

The library's `threshold` commits every token that is sure enough by a low threshold. A later pass
judges a committed token by its probability given all others: by the backbone, which reads mask
tokens behind the text (the paper's shadow block) that stand at the positions of the committed ones
and see all but these; and, coupled, by the exact leave-one-out conditional

    p(x_i | x_known \\ i) = phi_i(x_i) sum_z around_i(z) E(z, x_i) / sum_z around_i(z) s_i(z)

where `phi` is that prediction, `s_i` its evidence, and `around_i` what the rest of the chain gives
to the latent. A step takes back fewer tokens than it commits, so that decoding ends. As in the
paper, the judging is no pass of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from common import Step

from codd_hf import CoDDSchedulerOutput
from codd_hf.circuits import CoupledCategorical, DenseEvidence
from codd_hf.schedulers.strategies import best_scored


@dataclass
class Wino:
    """Committed tokens that the others give less than `least` are masked again."""

    least: float

    def __call__(self, step: Step) -> CoDDSchedulerOutput:
        draw, output = step.draw, step.drawn()
        known = draw.join(draw.plain.observed)
        if step.steps_left == 1 or not bool(known.any()):
            return output
        prediction = draw.split(shadow_logits(step).movedim(-1, 0)).movedim(0, -1)
        probs = draw.join(leave_one_out(draw.plain, prediction))
        number = (output.transfer_index.sum(-1) - 1).clamp(min=0)
        back = best_scored(-probs, known & (probs < self.least), number)
        mask = step.scheduler.config.mask_token_id
        output.prev_sample = output.prev_sample.masked_fill(back, mask)
        return output


def shadow_logits(step: Step) -> torch.Tensor:
    """`[batch, length, vocab]`: each token of the windows as it is read from all others."""
    text, model, mask = step.draw.text, step.scheduler.model, step.scheduler.config.mask_token_id
    tokens, position = text.tokens, text.position
    (batch, size), number = tokens.shape, position.shape[1]
    shadows, every = torch.full_like(position, mask), torch.arange(size)
    sees = torch.zeros(batch, size + number, size + number, dtype=torch.bool)
    sees[:, :, :size] = (text.known | (tokens == mask))[:, None]
    sees[:, size:, :size] &= position[:, :, None] != every
    sees[:, size:, size:] = torch.eye(number, dtype=torch.bool)
    blind = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    places = torch.cat((every.expand(batch, -1), position), 1)
    all_tokens = torch.cat((tokens, shadows), 1)
    states = model.family.states(model.backbone, all_tokens, blind[:, None], places)
    columns = torch.arange(size, size + number).expand(batch, -1)
    return states.logits((torch.arange(batch)[:, None].expand_as(columns), columns))


def leave_one_out(law: CoupledCategorical, logits: torch.Tensor) -> torch.Tensor:
    """`[B, L]`: of each known token given all other known ones; 1 where none is known.

    Args:
        law: over windows.
        logits: `[B, L, vocab]`, predictions of the known tokens that have not seen them.
    """
    prediction = DenseEvidence.from_logits(logits, 1.0, law.forbidden)
    latents = law.latents
    everywhere = replace(latents, prediction=prediction, masked=law.observed)
    soft, chain = everywhere.evidence, latents.own_chain
    log_probs = prediction.log_prob_of(law.tokens)
    # No state gives a token more than it gives to all.
    of_token = torch.minimum(log_probs[..., None] + latents.evidence, soft)
    logs, pasts = chain.algebra.logs, [chain.one, *(message for message, _ in chain.forward())]
    futures = [*chain.backward()][::-1]
    arriving = [pasts[0], *(chain.algebra.step(pasts[i], i) for i in range(1, len(futures)))]
    around = torch.stack([logs(p) + logs(f) for p, f in zip(arriving, futures, strict=True)], 1)
    around = around.to(soft.dtype) + latents.prior
    share = ((around + of_token).logsumexp(-1) - (around + soft).logsumexp(-1)).exp()
    return torch.where(law.observed, share.nan_to_num(0), 1)
