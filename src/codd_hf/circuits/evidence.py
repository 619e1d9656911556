r"""Token evidence: all that inference needs to know of the vocabulary.

For a masked position the soft evidence of state `z` is `s(z) = \sum_v phi(v) E(z, v)`; for an
observed one the hard evidence is `E(z, x)`. These are the only products with the vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .chain import LOST_MASS, full_precision, logsumexp, normalised_exp
from .potentials import Potentials

UNDERFLOW = 1e-30
"""A sum of float32 products below this may lack terms that were rounded to zero."""

ELEMENTS_AT_ONCE = 1 << 26
"""Largest temporary, in numbers, of the products that cannot be a matrix product."""


def hard_evidence(potentials: Potentials, tokens: torch.Tensor) -> torch.Tensor:
    """`log E_i(z, x_i)`, `[..., L, H]`, of tokens `[..., L]`."""
    if potentials.tied_emissions:
        return F.embedding(tokens, potentials.emission[0].T)
    positions = torch.arange(tokens.shape[-1], device=tokens.device)
    return potentials.emission.transpose(1, 2)[positions, tokens]


def emission_of_latents(potentials: Potentials, latents: torch.Tensor) -> torch.Tensor:
    """`log E_i(z_i, v)`, `[..., L, V]`, of latents `[..., L]`."""
    if potentials.tied_emissions:
        return potentials.emission[0][latents]
    positions = torch.arange(latents.shape[-1], device=latents.device)
    return potentials.emission[positions, latents]


@full_precision
def soft_evidence(
    potentials: Potentials, log_phi: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """`log s(z)`, `[N, H]`, of `N` positions.

    Args:
        potentials: the circuit.
        log_phi: `[N, V]` log-probabilities of the tokens; -inf is allowed.
        positions: `[N]`, where in the window each row stands.
    """
    emission, shift = emission_factors(potentials)
    phi = log_phi.exp()
    if potentials.tied_emissions:
        product, shift = phi @ emission[0].T, shift[:, :, 0].expand(len(phi), -1)
    else:
        product = log_phi.new_zeros(len(positions), potentials.num_latents)
        for position, rows in by_position(positions):
            product = product.index_put((rows,), phi[rows] @ emission[position].T)
        shift = shift[positions, :, 0]
    lost = product < UNDERFLOW
    log_evidence = product.masked_fill(lost, 1).log() + shift
    log_evidence = log_evidence.masked_fill(lost, -torch.inf)
    rows, states = lost.nonzero(as_tuple=True)
    if len(rows):
        chunk = max(ELEMENTS_AT_ONCE // potentials.vocab_size, 1)
        exact = []
        for first in range(0, len(rows), chunk):
            r, z = rows[first : first + chunk], states[first : first + chunk]
            at = 0 if potentials.tied_emissions else positions[r]
            exact.append(logsumexp(log_phi[r] + potentials.emission[at, z], -1))
        log_evidence = log_evidence.index_put((rows, states), torch.cat(exact))
    return log_evidence


@full_precision
def mix_tokens(
    potentials: Potentials,
    log_phi: torch.Tensor,
    weights: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Token laws `[N, V]` proportional to `phi(v) sum_z exp(weights(z)) E(z, v)`.

    Args:
        potentials: the circuit.
        log_phi: `[N, V]`.
        weights: `[N, H]` log-weights of the states.
        positions: `[N]`.
    """
    emission, shift = emission_factors(potentials)
    if potentials.tied_emissions:
        law = torch.softmax(weights + shift[0, :, 0], -1) @ emission[0]
    else:
        law = torch.zeros_like(log_phi)
        for position, rows in by_position(positions):
            mixed = torch.softmax(weights[rows] + shift[position, :, 0], -1)
            law = law.index_put((rows,), mixed @ emission[position])
    law = law * log_phi.exp()
    total = law.sum(-1, keepdim=True)
    lost = total <= LOST_MASS
    law = law / total.masked_fill(lost, 1)
    rows = lost[:, 0].nonzero()[:, 0]
    if len(rows):
        exact = [
            normalised_exp(logsumexp(scores + weights[rows][chunk, :, None], 1))
            for chunk, scores in token_scores(potentials, log_phi[rows], positions[rows])
        ]
        law = law.index_put((rows,), torch.cat(exact))
    return law


def emission_factors(potentials: Potentials) -> tuple[torch.Tensor, torch.Tensor]:
    """`E = exp(log E - shift)` and its `shift` `[1 or L, H, 1]`, the largest of each state."""
    shift = potentials.emission.detach().amax(-1, keepdim=True)
    shift = shift.masked_fill(shift == -torch.inf, 0)
    return (potentials.emission - shift).exp(), shift


def token_scores(potentials: Potentials, log_phi: torch.Tensor, positions: torch.Tensor):
    """Yields slices of rows and their `log phi(v) + log E(z, v)`, `[n, H, V]`, few at once."""
    chunk = max(ELEMENTS_AT_ONCE // (potentials.num_latents * potentials.vocab_size), 1)
    for first in range(0, len(positions), chunk):
        rows = slice(first, first + chunk)
        if potentials.tied_emissions:
            emission = potentials.emission
        else:
            emission = potentials.emission[positions[rows]]
        yield rows, log_phi[rows, None] + emission


def by_position(positions: torch.Tensor):
    """Yields each position that occurs and the rows at which it does."""
    for position in positions.unique().tolist():
        yield position, (positions == position).nonzero()[:, 0]
