r"""Short lists whose remaining mass is spread group by group.

A token belongs to the group of the state that emits it most readily, so that tokens of a group look
alike to a circuit. Beside the list `T` a prediction keeps how much of the remaining mass the
backbone gave to each group, `r_c`, and only within a group it is spread by the token marginal:

    phi(v) = r_c u(v) / u(c \ T)    for v outside T in group c

Soft evidence then needs, beside the columns of the listed tokens, one product with what the groups
mean to the states, `U_c(z) = \sum_{v in c} u(v) E(z, v)`, which is made once.

Where nearly all of a group's marginal is listed, what is left of it is mostly rounding error. A
group takes mass for at least `SMALLEST_PART` of its marginal's, and what is then left over, with a
rounding error's worth of all, is spread over all tokens by the marginal, as without groups.

On CUDA, sums by group are made in no fixed order: runs agree to rounding, and bit by bit only under
`torch.use_deterministic_algorithms(True)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from ..numerics import full_precision, logsumexp, safe_log
from ..potentials.emissions import Emission
from .dense import (
    DenseEvidence,
    EmissionSummary,
    emission_factors,
    product_width,
)
from .lists import TopKEvidence, gives_mass_to, list_and_rest

SMALLEST_PART = 1e-3
"""Of a group's marginal: keeps what is spread within it accurate to about a ten-thousandth."""


@dataclass(frozen=True)
class TokenGroups:
    """Tokens grouped by the state that emits them most readily.

    Attributes:
        index: `[V]` long, the group of each token.
        log_marginal: `[1, V]`, the law by which mass is spread.
        mass: `[H]`, what it gives to each group.
        means: `[H, H]`, `U_c(z) exp(-scale(z))` with the scale of the emission's summary; row `c`.
    """

    index: torch.Tensor
    log_marginal: torch.Tensor
    mass: torch.Tensor
    means: torch.Tensor


@torch.no_grad()
@full_precision
def group_tokens(
    emission: Emission, log_marginal: torch.Tensor, summary: EmissionSummary
) -> TokenGroups:
    """Groups the tokens of an emission.

    Args:
        emission: shared by all positions.
        log_marginal: `[1, V]`, the normalised law by which mass is spread.
        summary: of the emission.

    Raises:
        ValueError: emissions or law differ between positions.
    """
    if emission.num_positions > 1 or len(log_marginal) > 1:
        raise ValueError(
            "Tokens are grouped where emissions and token marginal are the same at all positions: "
            "these are not, so leave `evidence_groups` off."
        )
    number, scale = emission.num_latents, summary.scale(0)
    marginal = log_marginal[0].to(scale.dtype).exp()
    index = torch.empty(emission.vocab_size, dtype=torch.long, device=emission.device)
    means = scale.new_zeros(number, number)
    for part, matrix in emission.chunks(product_width(emission), 0):
        index[part] = matrix.argmax(0)
        means.index_add_(0, index[part], (emission_factors(matrix, scale) * marginal[part]).T)
    mass = scale.new_zeros(number).index_add_(0, index, marginal)
    return TokenGroups(index, log_marginal, mass, means)


@dataclass(frozen=True)
class GroupedEvidence(TopKEvidence):
    """The backbone's factorized prediction as a list of tokens and the mass of groups of others.

    Attributes:
        log_shares: `[*batch, H]`, log of the mass of a group's tokens that are not listed.
        groups: the groups.
    """

    log_shares: torch.Tensor | None = None
    groups: TokenGroups | None = None

    _by_prediction = (*TopKEvidence._by_prediction, "log_shares")

    @classmethod
    def from_logits(
        cls,
        logits: torch.Tensor,
        k: int,
        temperature: float = 1.0,
        forbidden: torch.Tensor | None = None,
        *,
        groups: TokenGroups,
    ) -> GroupedEvidence:
        """As `TopKEvidence.from_logits`.

        Args:
            logits: `[*batch, V]`, of any floating dtype; a row that is -inf throughout stays so.
            k: from 1 to `V`.
            temperature: positive.
            forbidden: `[V]` bool, tokens that get no mass, nor have any in the groups' law.
            groups: they bring the law by which the rest is spread.

        Raises:
            ValueError: `k` is out of range, or the groups' law gives mass to forbidden tokens.
        """
        law = groups.log_marginal
        if forbidden is not None and gives_mass_to(law, forbidden):
            raise ValueError(
                "The law of `groups` gives mass to `forbidden` tokens: make the groups with a law "
                "that does not (`Potentials.law_of_rest`)."
            )
        indices, log_probs, log_shares = list_and_rest(
            logits, k, temperature, forbidden, groups.index, len(groups.mass)
        )
        log_rest = logsumexp(log_shares, -1)
        listed = cls(
            indices, log_probs, log_rest, temperature, log_shares=log_shares, groups=groups
        )
        return listed.spread_by_law(law)

    def spread_by(self, log_marginal: torch.Tensor, forbidden: torch.Tensor | None = None):
        """Not for groups, which bring their law.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "Grouped evidence is spread by the law of its groups: make other groups for another "
            "law (`group_tokens`)."
        )

    def __getitem__(self, index) -> GroupedEvidence:
        """As that of `TopKEvidence`; what the groups weigh is computed once for all."""
        some = super().__getitem__(index)
        some.__dict__["_log_rest_weights"] = self._log_rest_weights[index]
        return some

    @cached_property
    def _log_rest_weights(self) -> torch.Tensor:
        """`[*batch, H]`: what to add to `log u(v)` for the log-probability of a group's tokens."""
        mass = self.groups.mass.to(self.log_shares.dtype)
        listed = self._log_marginal_listed.to(mass.dtype).exp()
        group = self.groups.index[self.indices]
        left = mass.expand_as(self.log_shares).scatter_add(-1, group, -listed)
        left = torch.where(mass > 0, left.clamp(min=0), 0)
        counted = torch.maximum(left, SMALLEST_PART * mass)
        counted = counted.masked_fill(counted <= 0, torch.inf)
        within = self.log_shares - counted.log()
        over = logsumexp(self.log_shares + safe_log(1 - left / counted), -1)
        least = self.log_rest + math.log(torch.finfo(mass.dtype).eps)
        over = logsumexp(torch.stack((over, least)), 0) - self._log_left
        return logsumexp(torch.stack((within, over[..., None].expand_as(within))), 0)

    def _weights_of(
        self, weights: torch.Tensor, tokens: torch.Tensor | slice = slice(None)
    ) -> torch.Tensor:
        """Weights `[..., H]` of tokens `[..., n]`, or of all."""
        index = self.groups.index[tokens]
        return weights.gather(-1, index.expand(*weights.shape[:-1], -1))

    def _rest(self, summary: EmissionSummary) -> torch.Tensor:
        """As that of `TopKEvidence`."""
        return self._log_rest_weights.to(self.groups.means.dtype).exp() @ self.groups.means

    @full_precision
    def soft_evidence(
        self,
        emission: Emission,
        positions: torch.Tensor,
        summary: EmissionSummary | None = None,
        repair: bool = True,
    ) -> torch.Tensor:
        """As that of `TopKEvidence`; with gradients or a wide emission by way of all tokens."""
        if summary is not None and not summary.needs_repair and not torch.is_grad_enabled():
            return self._soft_evidence_in_products(emission, positions, summary)
        dense = DenseEvidence(self.dense(), self.temperature)
        return dense.soft_evidence(emission, positions, summary, repair)
