r"""Predictions that keep a short list of tokens and the mass of groups of others.

A large vocabulary's prediction is mostly tail. Kept are the `k` likeliest tokens `T` and, for each
group `c` of tokens that look alike to the circuit, the mass `r_c` of those that are not listed,
which is taken to be spread in proportion to a token marginal `u`:

    phi(v) = r_c u(v) / u(c \ T)    for v outside T in group c

Soft evidence then needs `k` columns of the emission instead of all `V`, and a product with the
groups' means `U_c(z) = \sum_{v in c} u(v) E(z, v)`, which are made once:

    s(z) = \sum_{v in T} (phi(v) - w_c(v) u(v)) E(z, v) + \sum_c w_c U_c(z),  w_c = r_c / u(c \ T)

It is exact when `k = V`. Where nearly all of a group's marginal is listed, what is left of it is
mostly rounding error. A group takes mass for at least `SMALLEST_PART` of its marginal's, and what
is then left over, with a rounding error's worth of all, is spread over all tokens by the marginal.

On CUDA, sums by group are made in no fixed order: runs agree to rounding, and bit by bit only under
`torch.use_deterministic_algorithms(True)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..potentials.circuit import Emission, exp_of_difference
from ..potentials.groups import TokenGroups
from ..recursions.chain import full_precision, logsumexp, safe_log, shifted_exp
from .dense import Batched, DenseEvidence, scaled_logits, slice_size

SMALLEST_PART = 1e-3
"""Of a group's marginal: keeps the mass spread within it accurate to about a ten-thousandth."""

STATES_AT_ONCE = 128
"""States whose emissions of the listed tokens are gathered at once: they stay in the cache."""


@dataclass(frozen=True)
class ListedEvidence(Batched):
    """The backbone's factorized prediction as a list of tokens and the mass of the others.

    Attributes:
        indices: `[*batch, k]` long, distinct tokens.
        log_probs: `[*batch, k]`, their log-probabilities.
        log_rest: `[*batch, C]`, log of the mass of each group's other tokens; -inf when `k = V`.
        temperature: the evidence temperature it was computed at.
        groups: by which that mass is spread (`spread`).
        log_weights: `[*batch, C]`, what to add to the marginal for the log-probability of a group's
            tokens.
    """

    indices: torch.Tensor
    log_probs: torch.Tensor
    log_rest: torch.Tensor
    temperature: float = 1.0
    groups: TokenGroups | None = None
    log_weights: torch.Tensor | None = None

    @classmethod
    def from_logits(
        cls,
        logits: torch.Tensor,
        k: int,
        temperature: float = 1.0,
        forbidden: torch.Tensor | None = None,
        groups: TokenGroups | None = None,
    ) -> ListedEvidence:
        """The `k` likeliest tokens of `softmax(logits / temperature)`, forbidden ones left out.

        A row `[V]` that is -inf throughout stays so. No `groups` are one, without a distribution.
        """
        if not 1 <= k <= logits.shape[-1]:
            raise ValueError(f"`k` must be in [1, {logits.shape[-1]}], got {k}.")
        sums = (groups or TokenGroups(logits)).sums  # without groups, all tokens are one
        if torch.is_grad_enabled() and logits.requires_grad:
            logits = scaled_logits(logits, temperature, forbidden)
            listed, indices = logits.topk(k, -1)
            others, shift = shifted_exp(logits.scatter(-1, indices, -torch.inf), -1)
            rest = safe_log(sums(others)) + shift
        else:
            flat = logits.reshape(-1, logits.shape[-1])
            found = _list_likeliest(flat, k, temperature, forbidden, sums)
            shape = logits.shape[:-1]
            listed, indices, rest = (part.view(*shape, part.shape[-1]) for part in found)
        total = logsumexp(torch.cat((listed, rest), -1), -1)[..., None]
        total = total.masked_fill(total == -torch.inf, 0)
        evidence = cls(indices, listed - total, rest - total, temperature)
        return evidence if groups is None else evidence.spread(groups, forbidden)

    def spread(self, groups: TokenGroups, forbidden: torch.Tensor | None = None) -> ListedEvidence:
        """The same with a distribution of the rest; forbidden tokens are listed, with no mass."""
        indices, log_probs = self.indices, self.log_probs
        if forbidden is not None:
            never = (forbidden & (groups.log_marginal > -torch.inf)).nonzero()[:, 0]
            indices = torch.cat((indices, never.expand(*indices.shape[:-1], -1)), -1)
            log_probs = F.pad(log_probs, (0, len(never)), value=-torch.inf)
        listed = groups.log_marginal[indices].to(self.log_rest.dtype).exp()
        outside = 1 - listed.sum(-1)
        nothing = outside <= 16 * torch.finfo(outside.dtype).eps
        log_outside = outside.masked_fill(nothing, torch.inf).log()
        mass = groups.mass.to(listed.dtype)
        index = torch.zeros_like(indices) if groups.index is None else groups.index[indices]
        left = mass.expand_as(self.log_rest).scatter_add(-1, index, -listed)
        left = torch.where(mass > 0, left.clamp(min=0), 0)
        counted = torch.maximum(left, SMALLEST_PART * mass)
        counted = counted.masked_fill(counted <= 0, torch.inf)
        within = self.log_rest - counted.log()
        over = logsumexp(self.log_rest + safe_log(1 - left / counted), -1)
        least = logsumexp(self.log_rest, -1) + math.log(torch.finfo(listed.dtype).eps)
        over = logsumexp(torch.stack((over, least)), 0) - log_outside
        weights = logsumexp(torch.stack((within, over[..., None].expand_as(within))), 0)
        return ListedEvidence(indices, log_probs, self.log_rest, self.temperature, groups, weights)

    def laid_out(self, log_marginal: torch.Tensor) -> DenseEvidence:
        """`[*batch, V]`, the rest spread by a marginal `[V]`."""
        return DenseEvidence(self.spread(TokenGroups(log_marginal)).dense(), self.temperature)

    @property
    def shape(self) -> torch.Size:
        """`[*batch, V]`; -1 stands for any `V`."""
        return torch.Size((*self.indices.shape[:-1], -1))

    def _spread(self) -> tuple[TokenGroups, torch.Tensor]:
        if self.groups is None or self.log_weights is None:
            raise ValueError("the mass of other tokens has no distribution yet: call `spread`.")
        return self.groups, self.log_weights

    def _rest(
        self, tokens: torch.Tensor | slice, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[..., n]`: log-probabilities of tokens `[..., n]` by `log_weights`, or others."""
        groups, own = self._spread()
        weights = own if weights is None else weights
        if groups.index is not None:
            index = groups.index[tokens]
            weights = weights.gather(-1, index.expand(*weights.shape[:-1], -1))
        return weights + groups.log_marginal[tokens]

    def log_prob_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[*S, *batch]` of tokens `[*S, *batch]`."""
        match = self.indices == tokens[..., None]
        listed = torch.where(match, self.log_probs, 0).sum(-1)
        weights = self._spread()[1].expand(*tokens.shape, -1)
        return torch.where(match.any(-1), listed, self._rest(tokens[..., None], weights)[..., 0])

    def dense(self) -> torch.Tensor:
        """`[*batch, V]` log-probabilities."""
        rest = self._rest(slice(None))
        return rest.scatter(-1, self.indices, self.log_probs.to(rest.dtype))

    @full_precision
    def soft_evidence(self, emission: Emission, positions: torch.Tensor) -> torch.Tensor:
        """`log s(z)`, `[N, H]`, of a batch of `N` predictions at positions `[N]`; differentiable.

        Where sums can underflow, or positions differ, all tokens are laid out.
        """
        if emission.can_underflow or emission.num_positions > 1:
            return DenseEvidence(self.dense()).soft_evidence(emission, positions)
        groups, log_weights = self._spread()
        dtype = torch.promote_types(emission.log_max.dtype, self.log_probs.dtype)
        weights = torch.stack((self.log_probs, self._rest(self.indices)), 1).to(dtype).exp()
        # Predictions share many of their tokens, whose emissions are read once.
        tokens, places = self.indices.unique(return_inverse=True)
        by_token, places = weights.flatten(0, 1), places.repeat_interleave(2, 0)
        sums, parts = [], emission.parts(STATES_AT_ONCE)
        scales = emission.log_scale()[0].to(dtype).split([part.num_latents for part in parts])
        for part, scale in zip(parts, scales, strict=True):
            columns = part.columns(tokens, torch.zeros_like(tokens)).to(dtype)
            factors = exp_of_difference(columns, scale)
            sums.append(F.embedding_bag(places, factors, mode="sum", per_sample_weights=by_token))
        listed, spread = torch.cat(sums, 1).unflatten(0, (-1, 2)).unbind(1)
        rest = log_weights.to(dtype).exp() @ groups.means().to(dtype)
        evidence = listed + (rest - spread).clamp(min=0)
        nothing = evidence <= 0  # NaN is not
        evidence = evidence.masked_fill(nothing, 1).log() + emission.log_scale().to(dtype)
        return evidence.masked_fill(nothing, -torch.inf)


def _list_likeliest(
    logits: torch.Tensor,
    k: int,
    temperature: float,
    forbidden: torch.Tensor | None,
    sums: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits logits `[N, V]` over the temperature into the `k` largest and the rest.

    The rest is summed itself: 1 minus the sum of the listed is rounding error when that is 1. Not
    differentiable.

    Returns:
        The `k` largest, `[N, k]` in float32 or float64; their tokens, `[N, k]`; and the
        `logsumexp` of all others that are not forbidden, `[N, C]` by `sums` of groups.
    """
    size, at_once = logits.shape[-1], slice_size(logits.device)
    never = torch.zeros(0, dtype=torch.long, device=logits.device)
    if forbidden is not None:
        never = forbidden.nonzero()[:, 0]
    listed, tokens, others = [], [], []
    # A slice at a time, which fits the processor's cache: logits are by far the largest tensor.
    for part in logits.split(max(at_once // 2 // size, 1)):
        # Tokens that must not be listed are few and unlikely: out of a longer list, if at all.
        values, indices = part.topk(min(k + 1 + len(never), size), -1)
        values = values.to(torch.promote_types(logits.dtype, torch.float32))
        out = torch.isin(indices, never)
        if bool(out.any()):
            values, order = values.masked_fill(out, -torch.inf).sort(-1, descending=True)
            indices = indices.gather(1, order)
        values, indices = values[:, : k + 1] / temperature, indices[:, :k]
        listed.append(values[:, :k])
        tokens.append(indices)
        shift = values[:, -1:].masked_fill(values[:, -1:] == -torch.inf, 0)
        rest = exp_of_difference(part.to(values.dtype), shift, factor=1 / temperature)
        rest.scatter_(-1, indices, 0.0).index_fill_(-1, never, 0.0)
        others.append(sums(rest).log() + shift)
    return torch.cat(listed), torch.cat(tokens), torch.cat(others)
