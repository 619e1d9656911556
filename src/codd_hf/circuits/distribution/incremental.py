"""Tokens that become known one after another, in distributions over the same windows.

A token changes the evidence of one position. Messages from the left depend on what stands to the
left of where they arrive, messages from the right on what stands to the right. So a token renews
those from the left behind its position and those from the right before it: one pass over the chain
in place of two, over the windows that got a token, as far as there are masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..numerics import full_precision, shifted_exp
from ..recursions.chain import Chain, forward_filter, posterior, step_left, step_right
from .conditionals import Conditionals


class Revealing:
    """Distributions over the same `B` windows, to which tokens are revealed.

    All go through the recursions together.

    Args:
        distributions: alike in all but the evidence temperature.
        wanted: `[B, L]` bool, the masked positions whose laws are asked for until they are
            revealed.
    """

    def __init__(self, distributions: Sequence[Conditionals], wanted: torch.Tensor) -> None:
        self.distributions = distributions
        self.wanted = wanted.clone()
        self.device = wanted.device
        first = distributions[0]
        self._chain = first._chain(torch.cat([d._evidence for d in distributions]))
        self._around = first._chain(torch.zeros_like(first._evidence)).evidence
        messages = torch.cat([d._filter.messages for d in distributions])
        self._past = messages.transpose(0, 1).contiguous()  # [L, S * B, H + J]
        self._future = torch.ones_like(self._past)
        batch, length = wanted.shape
        self._renew(torch.arange(batch, device=self.device), length, length - 1)

    def laws(self, index: int, windows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`[N, V]`: laws of tokens, given what is known by now.

        Args:
            index: of the distribution.
            windows: `[N]`.
            positions: `[N]`, wanted ones.
        """
        posterior = self._posterior(index, windows, positions)
        return self.distributions[index].token_laws(windows, positions, posterior)

    def probs(
        self, index: int, windows: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """`[N]`: what `laws` give to tokens `[N]`, at no cost in the vocabulary."""
        posterior = self._posterior(index, windows, positions)
        return self.distributions[index].token_probs(windows, positions, posterior, tokens)

    def reveal(self, windows: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> None:
        """Makes tokens known.

        Args:
            windows: `[n]`, each once, in ascending order.
            positions: `[n]`, wanted ones.
            tokens: `[n]`.
        """
        evidence = self.distributions[0]._hard_evidence_at(windows, positions, tokens)
        evidence = evidence + self._around[windows, positions]
        copies = len(self.distributions)
        at = self._rows(windows), positions.repeat(copies)
        self._chain.evidence[at] = evidence.repeat(copies, 1)
        self.wanted[windows, positions] = False
        self._renew(windows, int(positions.min()), int(positions.max()))

    def _rows(self, windows: torch.Tensor) -> torch.Tensor:
        """`[S * n]`: where the windows stand in the stacked chains."""
        batch, copies = len(self.wanted), len(self.distributions)
        first = torch.arange(copies, device=self.device) * batch
        return (first[:, None] + windows).flatten()

    @torch.no_grad()
    @full_precision
    def _renew(self, windows: torch.Tensor, first: int, last: int) -> None:
        """Messages of windows whose evidence has changed at positions `first` to `last`."""
        columns = self.wanted[windows].any(0).nonzero()[:, 0]
        if len(columns) == 0:
            return
        rows = self._rows(windows)
        chain = self._chain
        if len(windows) < len(self.wanted):
            present = None if chain.present is None else chain.present[rows]
            chain = Chain(chain.steps.select(windows), chain.evidence[rows], present)
        if not chain.cannot_underflow:  # the past stands for both, and what meets it is 1
            self._past[:, rows] = posterior(chain, forward_filter(chain)).transpose(0, 1)
            return
        weights = shifted_exp(chain.evidence, 2)[0].unbind(1)
        message, future = self._past[first - 1, rows], self._future[last, rows]
        if first == 0:
            message = torch.full_like(message, 1 / message.shape[-1])
        for i in range(first, int(columns[-1]) + 1):
            message, _ = step_right(chain, message, weights[i], i)
            self._past[i, rows] = message
        for i in range(last, int(columns[0]), -1):
            future = step_left(chain, future, weights[i], i)
            self._future[i - 1, rows] = future

    def _posterior(
        self, index: int, windows: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """`[N, H + J]`: the laws of the latents; zeros where nothing is possible."""
        rows = windows + index * len(self.wanted)
        joint = self._past[positions, rows] * self._future[positions, rows]
        total = joint.sum(-1, keepdim=True)
        return joint / total.masked_fill(total <= 0, 1)
