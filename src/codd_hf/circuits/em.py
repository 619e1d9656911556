"""Expectation-maximisation for circuits (the generative fit).

Expected counts are gradients: with `ll = sum log p_w(x)`, the expected number of uses of a
parameter `theta` is `d ll / d log theta` (Darwiche, 2003). One differentiated forward pass of the
chain is therefore a whole E-step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .potentials.circuit import Potentials
from .recursions.chain import Chain


@dataclass
class Counts:
    """Expected counts, shaped as the potentials' leaves: initial, transitions, emissions."""

    leaves: tuple[torch.Tensor, ...]

    def mixed_with(self, other: Counts, share: float) -> Counts:
        """`(1 - share) * self + share * other`."""
        pairs = zip(self.leaves, other.leaves, strict=True)
        return Counts(tuple(torch.lerp(mine, theirs, share) for mine, theirs in pairs))

    def scaled(self, factor: float) -> Counts:
        """`factor * self`."""
        return Counts(tuple(leaf * factor for leaf in self.leaves))


def log_likelihood(potentials: Potentials, tokens: torch.Tensor) -> torch.Tensor:
    """`log p_w(x)`, `[B]`, of tokens `[B, L]`."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    evidence = potentials.emission.columns(tokens, positions)
    chain = Chain(potentials.transition, evidence).started(potentials.initial)
    return chain.filter().log_partition


def expected_counts(potentials: Potentials, tokens: torch.Tensor) -> tuple[Counts, torch.Tensor]:
    """E-step: expected counts summed over the batch, and the log-likelihoods `[B]`."""
    leaves = [leaf.detach().requires_grad_() for leaf in potentials.leaves()]
    with torch.enable_grad():
        scores = log_likelihood(potentials.with_leaves(leaves), tokens)
        # Windows of one token have no transitions: their counts are zero.
        counts = torch.autograd.grad(scores.sum(), leaves, materialize_grads=True)
    return Counts(counts), scores.detach()


def maximise(potentials: Potentials, counts: Counts, prior: Counts) -> Potentials:
    """M-step: the normalised circuit with these counts, and pseudo-counts `prior` (broadcast)."""
    pairs = zip(counts.leaves, prior.leaves, strict=True)
    return potentials.with_leaves(
        [(mine + extra).clamp(min=0).log().log_softmax(-1) for mine, extra in pairs]
    )
