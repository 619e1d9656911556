"""Tokens that look alike to the circuit, over which mass is spread by a token marginal."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .circuit import Emission


@dataclass(frozen=True, eq=False)
class TokenGroups:
    """Groups of tokens; what is derived is held as long as the object.

    Attributes:
        log_marginal: `[V]`, the logarithm of the distribution by which mass is spread in a group.
        index: `[V]`, the group of each token; None where all tokens are one group.
        emission: of the circuit, for `means`.
    """

    log_marginal: torch.Tensor
    index: torch.Tensor | None = None
    emission: Emission | None = None

    @classmethod
    @torch.no_grad()
    def by_state(cls, log_marginal: torch.Tensor, emission: Emission) -> TokenGroups:
        """Groups of the tokens that a state emits most readily; one where positions differ."""
        if emission.num_positions > 1:
            return cls(log_marginal, None, emission)
        chunks = emission.chunks(emission.width)
        return cls(log_marginal, torch.cat([chunk.argmax(0) for chunk in chunks]), emission)

    @property
    def number(self) -> int:
        """How many groups there are, `C`."""
        return 1 if self.index is None or self.emission is None else self.emission.num_latents

    @cached_property
    def mass(self) -> torch.Tensor:
        """`[C]`, of each group."""
        return self.sums(self.log_marginal.exp())

    def sums(self, weights: torch.Tensor) -> torch.Tensor:
        """`[..., C]`: sums by group of weights `[..., V]` of the tokens."""
        if self.index is None:
            return weights.sum(-1, keepdim=True)
        sums = weights.new_zeros(*weights.shape[:-1], self.number)
        return sums.scatter_add(-1, self.index.expand_as(weights), weights)

    def means(self) -> torch.Tensor:
        """`[C, H]`: sums of `u(v) E(z, v) / exp(log_max(z))` over each group; differentiable."""
        return self._make_means() if torch.is_grad_enabled() else self._means

    @cached_property
    @torch.no_grad()
    def _means(self) -> torch.Tensor:
        return self._make_means()

    def _make_means(self) -> torch.Tensor:
        assert self.emission is not None
        marginal, index = self.log_marginal.to(self.emission.log_max.dtype).exp(), self.index
        if index is None:
            return self.emission.sums(marginal[None], torch.zeros_like(marginal[:1]).long())
        means = marginal.new_zeros(self.number, self.emission.num_latents)
        for part, make in self.emission.factors(0, marginal.dtype):
            means = means.index_add(0, index[part], (make() * marginal[part]).T)
        return means
