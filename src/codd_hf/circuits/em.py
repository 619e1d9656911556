"""Expectation-maximisation for circuits (the generative fit).

Expected counts are gradients: with `ll = sum log p_w(x)`, the expected number of uses of a
parameter `theta` is `d ll / d log theta` (Darwiche, 2003). One differentiated forward pass of the
chain is therefore a whole E-step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .chain import Chain, forward_filter
from .evidence import hard_evidence
from .potentials import Potentials


@dataclass
class Counts:
    """Expected counts, shaped as the potentials."""

    initial: torch.Tensor
    transition: torch.Tensor
    emission: torch.Tensor

    def mixed_with(self, other: Counts, share: float) -> Counts:
        """`(1 - share) * self + share * other`."""
        return Counts(*(torch.lerp(getattr(self, n), getattr(other, n), share) for n in _FIELDS))

    def scaled(self, factor: float) -> Counts:
        return Counts(*(getattr(self, n) * factor for n in _FIELDS))


_FIELDS = ("initial", "transition", "emission")


def log_likelihood(
    potentials: Potentials, tokens: torch.Tensor, present: torch.Tensor | None = None
) -> torch.Tensor:
    """`log p_w(x)`, `[B]`, of tokens `[B, L]`; absent positions are skipped."""
    if present is None:
        present = torch.ones_like(tokens, dtype=torch.bool)
    evidence = hard_evidence(potentials, tokens)
    chain = Chain(potentials.initial, potentials.transition, evidence, present)
    return forward_filter(chain).log_partition


def expected_counts(
    potentials: Potentials, tokens: torch.Tensor, present: torch.Tensor | None = None
) -> tuple[Counts, torch.Tensor]:
    """E-step: expected counts summed over the batch, and the log-likelihoods `[B]`."""
    leaves = [getattr(potentials, n).detach().requires_grad_() for n in _FIELDS]
    with torch.enable_grad():
        scores = log_likelihood(Potentials(*leaves), tokens, present)
        return Counts(*torch.autograd.grad(scores.sum(), leaves)), scores.detach()


def maximise(counts: Counts, prior: Counts) -> Potentials:
    """M-step: the normalised circuit with these counts.

    Args:
        counts: expected counts.
        prior: pseudo-counts (broadcast), so that nothing becomes impossible for ever.
    """
    return Potentials(
        *(
            (getattr(counts, n) + getattr(prior, n)).clamp(min=0).log().log_softmax(-1)
            for n in _FIELDS
        )
    )
