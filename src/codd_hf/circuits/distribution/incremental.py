"""Posteriors of tokens while others become known one after another.

A token changes the evidence of one position. Messages from the left depend on what stands to the
left of where they arrive, messages from the right on what stands to the right. So a token renews
those from the left behind its position and those from the right before it: one pass over the chain
in place of two, over the windows that got a token, as far as there are masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..numerics import full_precision
from ..recursions.chain import forward_filter, posterior, probabilities
from .coupled import CoupledCategorical
from .latents import At


class IncrementalPosterior:
    """Distributions over the same `B` windows, to which tokens are revealed.

    All go through the recursions together.

    Args:
        distributions: alike in all but the evidence temperature.
        wanted: `[B, L]` bool, the masked positions that are asked for until they are revealed.
    """

    def __init__(self, distributions: Sequence[CoupledCategorical], wanted: torch.Tensor) -> None:
        self.latents = [distribution.latents for distribution in distributions]
        self.wanted, self.device = wanted.clone(), wanted.device
        self._chain = self.latents[0].chain(torch.cat([each.evidence for each in self.latents]))
        messages = torch.cat([each.filter.messages for each in self.latents])
        self._past = messages.transpose(0, 1).contiguous()  # [L, S * B, H + J]
        self._future = torch.ones_like(self._past)
        # Where the windows of a distribution stand in the stacked chains.
        self._rows = torch.arange(len(messages), device=self.device).view(len(self.latents), -1)
        self._renew(self._rows[0], wanted.shape[1], wanted.shape[1] - 1)

    def token_probs(self, index: int, at: At) -> torch.Tensor:
        """`[N, V]`: distributions of the tokens at wanted positions, given what is known by now.

        `index` is that of the distribution.
        """
        return self.latents[index].token_probs(at, self._posterior(index, at))

    def prob_of(self, tokens: torch.Tensor, index: int, at: At) -> torch.Tensor:
        """`[N]`: what `token_probs` give to tokens `[N]`, at no cost in the vocabulary."""
        return self.latents[index].prob_of(tokens, at, self._posterior(index, at))

    def reveal(self, at: At, tokens: torch.Tensor) -> None:
        """Makes the tokens `[n]` at wanted positions known, one of a window, windows in order."""
        windows, positions = at
        evidence = self.latents[0].hard_evidence(tokens, at) + self.latents[0].prior[at]
        self._chain.evidence[self._rows[:, windows], positions] = evidence
        self.wanted[at] = False
        self._renew(windows, int(positions.min()), int(positions.max()))

    @torch.no_grad()
    @full_precision
    def _renew(self, windows: torch.Tensor, first: int, last: int) -> None:
        """Messages of windows whose evidence has changed at positions `first` to `last`."""
        columns = self.wanted[windows].any(0).nonzero()[:, 0]
        if len(columns) == 0:
            return
        rows = self._rows[:, windows].flatten()
        chain = self._chain if len(windows) == len(self.wanted) else self._chain.select(rows)
        if not chain.cannot_underflow:  # the past stands for both, and what meets it is 1
            self._past[:, rows] = posterior(chain, forward_filter(chain)).transpose(0, 1)
            return
        algebra, _ = probabilities(chain)
        before = None if first == 0 else self._past[first - 1, rows]
        for i, (message, _) in enumerate(algebra.forward(first, int(columns[-1]), before), first):
            self._past[i, rows] = message
        futures = algebra.backward(int(columns[0]), last, self._future[last, rows])
        for i, future in zip(range(last, -1, -1), futures, strict=False):
            self._future[i, rows] = future

    def _posterior(self, index: int, at: At) -> torch.Tensor:
        """`[N, H + J]`: distributions of the latents; zeros where nothing is possible."""
        place = at[1], self._rows[index, at[0]]
        joint = self._past[place] * self._future[place]
        total = joint.sum(-1, keepdim=True)
        return joint / total.masked_fill(total <= 0, 1)
