"""Exact conditionals of single tokens: drawn one by one, or each given all the others."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..numerics import logsumexp, normalised_exp
from ..recursions.sweep import sweep
from .coupled import CoupledCategorical

Draw = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""`draw(position, probs, rows)` draws tokens `[n]` from `probs` `[n, V]` for the rows `[n]`."""


@torch.no_grad()
def draw_left_to_right(
    distribution: CoupledCategorical, where: torch.Tensor, draw: Draw
) -> torch.Tensor:
    """Draws tokens one by one, each given those before it, in one pass for all.

    At every position of `where`, from left to right, `draw` gets the exact distribution of the
    token given what is observed and what was drawn before; other positions are summed out.

    Args:
        distribution: of the tokens.
        where: `[B, L]` bool, the positions to draw; masked ones.
        draw: see [`Draw`]. It must draw the same token for a row when it is asked again.

    Returns:
        `[B, L]` tokens; 0 outside of `where`.
    """
    latents, tokens = distribution.latents, torch.zeros_like(distribution.tokens)
    chain = latents.chain(latents.evidence)

    def visit(i: int, around: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        evidence, chosen = chain.evidence[rows, i], where[rows, i]
        rows = rows[chosen]
        if len(rows) == 0:
            return evidence
        at, posterior = (
            (rows, torch.full_like(rows, i)),
            normalised_exp((around + evidence)[chosen]),
        )
        tokens[at] = draw(i, latents.token_probs(at, posterior), rows)
        drawn = latents.hard_evidence(tokens[at], at)
        return evidence.index_put((chosen,), drawn + latents.prior[at])

    sweep(chain, visit)
    return tokens


@torch.no_grad()
def leave_one_out(
    distribution: CoupledCategorical,
    tokens: torch.Tensor,
    known: torch.Tensor,
    soft_evidence: torch.Tensor,
    log_probs: torch.Tensor,
) -> torch.Tensor:
    r"""Probability `[B, L]` of each known token given all other known ones, in one pass.

        p(x_i | x_{known \ i})
            = phi_i(x_i) \sum_z around_i(z) E(z, x_i) / \sum_z around_i(z) s_i(z)

    Here `around_i(z)` is what the rest of the chain gives to the latent: the product of the
    messages from both sides. The sum over the vocabulary is the soft evidence `s_i`.

    A backbone predicts what is masked. For tokens that were masked in an earlier pass,
    `soft_evidence` and `log_probs` may be those of that pass.

    Args:
        distribution: of the tokens.
        tokens: `[B, L]`; used where `known`.
        known: `[B, L]` bool.
        soft_evidence: `[B, L, H + J]`, log of `s_i`: `latents.evidence` of this or an earlier
            distribution over the window.
        log_probs: `[B, L]`, `log phi_i(x_i)` of the known tokens.
    """
    latents = distribution.latents
    hard = latents.hard_evidence(torch.where(known, tokens, 0))
    chain = latents.chain(torch.where(known[..., None], hard, soft_evidence))
    # No state gives a token more than it gives to all; copy states may have changed since.
    of_token = torch.minimum(log_probs[..., None] + hard, soft_evidence)
    result = torch.zeros_like(log_probs)

    def visit(i: int, around: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        around = around + latents.prior[rows, i]
        of_all = logsumexp(around + soft_evidence[rows, i], -1)
        of_one = logsumexp(around + of_token[rows, i], -1)
        result[rows, i] = torch.where(of_all == -torch.inf, 0, (of_one - of_all).exp())
        return chain.evidence[rows, i]

    sweep(chain, visit)
    return result
