r"""Predictions that keep a short list of tokens, and the evidence they give.

A large vocabulary's prediction is mostly tail. Kept are the `k` likeliest tokens `T` and the mass
`r` of all others, which is taken to be spread in proportion to a token marginal `u`:

    phi(v) = r u(v) / (1 - u(T))    for v outside T

Soft evidence then needs `k` columns of the emission instead of all `V`:

    s(z) = \sum_{v in T} phi(v) E(z, v) + r (U(z) - \sum_{v in T} u(v) E(z, v)) / (1 - u(T)),

with `U(z) = \sum_v u(v) E(z, v)` computed once. It is exact when `k = V`, and otherwise within
`soft_evidence_bounds`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn import functional as F

from ..numerics import exp_of_difference, full_precision, logsumexp, safe_log, shifted_exp
from ..potentials.emissions import DenseEmission, Emission, stored_by_latent
from .dense import (
    DenseEvidence,
    EmissionSummary,
    columns_of_lists,
    rows_of_latents,
    scaled_logits,
    summarise,
    working_dtype,
)
from .listing import list_likeliest, slice_size, sum_by_group

STATES_AT_ONCE = 256
"""States whose emissions of the listed tokens are gathered together: the fastest on a CPU."""


@dataclass(frozen=True)
class TopKEvidence:
    """The backbone's factorized prediction as a list of tokens and the mass of the others.

    Attributes:
        indices: `[*batch, k]` long, distinct tokens.
        log_probs: `[*batch, k]`, their log-probabilities.
        log_rest: `[*batch]`, log of the mass of all other tokens; -inf when `k = V`.
        temperature: the evidence temperature it was computed at.
        log_marginal: `[1 or L, V]`, the law by which the rest is spread (`spread_by`).
        marginal_rows: `[*batch]` long, which row of `log_marginal` each prediction uses.
    """

    indices: torch.Tensor
    log_probs: torch.Tensor
    log_rest: torch.Tensor
    temperature: float = 1.0
    log_marginal: torch.Tensor | None = None
    marginal_rows: torch.Tensor | None = None

    _by_prediction = ("indices", "log_probs", "log_rest", "marginal_rows")

    @classmethod
    def from_logits(
        cls,
        logits: torch.Tensor,
        k: int,
        temperature: float = 1.0,
        forbidden: torch.Tensor | None = None,
    ) -> TopKEvidence:
        """The `k` likeliest tokens of `softmax(logits / temperature)`, forbidden ones left out.

        Args:
            logits: `[*batch, V]`, of any floating dtype; a row that is -inf throughout stays so.
            k: from 1 to `V`.
            temperature: positive.
            forbidden: `[V]` bool, tokens that get no mass; name them to `spread_by` as well.

        Raises:
            ValueError: `k` is out of range.
        """
        indices, log_probs, log_rest = list_and_rest(logits, k, temperature, forbidden)
        return cls(indices, log_probs, log_rest[..., 0], temperature)

    def spread_by(
        self, log_marginal: torch.Tensor, forbidden: torch.Tensor | None = None
    ) -> TopKEvidence:
        """The same with the law by which the remaining mass is spread.

        Args:
            log_marginal: `[V]` or `[L, V]` log of the token marginal, up to a constant; row `i` is
                for position `i` of the batch's last axis.
            forbidden: `[V]` bool, tokens that get none of it.
        """
        return self.spread_by_law(law_of_rest(log_marginal, forbidden))

    def spread_by_law(self, log_marginal: torch.Tensor) -> TopKEvidence:
        """`spread_by` what `law_of_rest` has made."""
        rows = torch.zeros_like(self.log_rest, dtype=torch.long)
        if len(log_marginal) > 1:
            rows = rows + torch.arange(rows.shape[-1], device=rows.device)
        return replace(self, log_marginal=log_marginal, marginal_rows=rows)

    @property
    def batch_shape(self) -> torch.Size:
        return self.log_rest.shape

    @property
    def device(self) -> torch.device:
        return self.log_rest.device

    def __getitem__(self, index) -> TopKEvidence:
        """The predictions at some places of the batch, such as `prediction[rows, positions]`."""
        return self._map(lambda tensor: tensor[index])

    def _map(self, function) -> TopKEvidence:
        held = {name: getattr(self, name) for name in self._by_prediction}
        return replace(self, **{n: t if t is None else function(t) for n, t in held.items()})

    def log_prob_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[*S, *batch]` of tokens `[*S, *batch]`."""
        match = self.indices == tokens[..., None]
        listed = torch.where(match, self.log_probs, 0).sum(-1)
        weights = self._log_rest_weights.expand(*tokens.shape, -1)
        other = self._weights_of(weights, tokens[..., None])[..., 0]
        other = other + self.log_marginal[self.marginal_rows, tokens]
        return torch.where(match.any(-1), listed, other)

    def log_prob_bounds_of(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper `log_prob_of`, however the remaining mass is really spread."""
        match = self.indices == tokens[..., None]
        listed = torch.where(match, self.log_probs, 0).sum(-1)
        known = match.any(-1)
        rest = self.log_rest.expand_as(listed)
        return listed.masked_fill(~known, -torch.inf), torch.where(known, listed, rest)

    def dense(self) -> torch.Tensor:
        """`[*batch, V]` log-probabilities."""
        rest = self._weights_of(self._log_rest_weights) + self.log_marginal[self.marginal_rows]
        return rest.scatter(-1, self.indices, self.log_probs.to(rest.dtype))

    @full_precision
    def given_latents(
        self, emission: Emission, latents: torch.Tensor, log_total: torch.Tensor
    ) -> torch.Tensor:
        """As `DenseEvidence.given_latents`."""
        scores = log_total.new_empty(*latents.shape, emission.vocab_size)
        whole = self.indices.shape[-1] == emission.vocab_size

        def flat(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.expand(*latents.shape, -1).reshape(-1, tensor.shape[-1])

        indices = flat(self.indices)
        listed = flat(self.log_probs - log_total[..., None])
        if not whole:
            others = flat(self._log_rest_weights - log_total[..., None])
            laws, law_of = self.log_marginal, flat(self.marginal_rows[..., None])[:, 0]
        for part, rows in rows_of_latents(emission, latents, scores):
            values = rows.gather(1, indices[part]).add_(listed[part])
            if not whole:
                rows.add_(self._weights_of(others[part]))
                rows.add_(laws if len(laws) == 1 else laws[law_of[part]])
            rows.scatter_(1, indices[part], values)
        return scores

    @full_precision
    def soft_evidence(
        self,
        emission: Emission,
        positions: torch.Tensor,
        summary: EmissionSummary | None = None,
        repair: bool = True,
    ) -> torch.Tensor:
        """`log s(z)`, `[N, H]`, of a batch of `N` predictions; differentiable.

        Args:
            emission: the emission.
            positions: `[N]`, where in the window each prediction stands.
            summary: of this emission and of `log_marginal`, if at hand: saves a product with the
                whole vocabulary.
            repair: as in `DenseEvidence.soft_evidence`, for the `summary` that is made if none is
                given; what the listed tokens add is summed in log space.

        Raises:
            ValueError: `k < V` and no `spread_by` has said where the remaining mass goes.
        """
        safe = summary is not None and not summary.needs_repair
        if safe and stored_by_latent(emission) and not torch.is_grad_enabled():
            return self._soft_evidence_in_products(emission, positions, summary)
        listed, columns = self._listed(emission, positions)
        if self.indices.shape[-1] == emission.vocab_size:
            return listed
        rest, share = self._log_rest_weights, self._log_marginal_listed
        if summary is None:
            summary = summarise(emission, self.log_marginal, repair)
        untied = emission.num_positions > 1
        log_mean = summary.log_mean[positions if untied else self.marginal_rows].to(columns.dtype)
        scale = log_mean.masked_fill(log_mean == -torch.inf, 0)
        # The part of the mean that the listed tokens make up: at most 1 but for rounding.
        part = (columns + share[..., None]).sub_(scale[:, None]).exp_().sum(1)
        others = log_mean + safe_log(1 - part) + rest
        return logsumexp(torch.stack((listed, others)), 0)

    def _soft_evidence_in_products(
        self, emission: Emission, positions: torch.Tensor, summary: EmissionSummary
    ) -> torch.Tensor:
        """The same where sums cannot underflow: what is listed is added up in two products."""
        scale = summary.scale(0)
        whole = self.indices.shape[-1] == emission.vocab_size
        counted = [self.log_probs]  # and what the law of the rest would give to the listed tokens
        if not whole:
            rest = self._weights_of(self._log_rest_weights, self.indices)
            counted.append(rest + self._log_marginal_listed)
        weights = torch.stack(counted, 1).to(scale.dtype).exp()  # [N, 1 or 2, k]
        if stored_by_latent(emission):
            sums = self._sums_by_latent(emission, scale, weights)
        else:
            columns = columns_of_lists(emission, self.indices, positions).to(scale.dtype)
            sums = weights @ exp_of_difference(columns, scale)
        if whole:
            return sums[:, 0].log() + scale
        listed, part = sums.unbind(1)
        return (listed + (self._rest(summary) - part).clamp(min=0)).log() + scale

    def _rest(self, summary: EmissionSummary) -> torch.Tensor:
        """`[N, H]`: what the rest adds to `s(z) exp(-scale(z))` if no token were listed."""
        scale = summary.scale(0)
        mean = (summary.log_mean.to(scale.dtype) - scale).exp()[self.marginal_rows]
        return self._log_rest_weights.to(scale.dtype).exp() * mean

    def _sums_by_latent(
        self, emission: DenseEmission, scale: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """`[N, n, H]`: sums of the listed tokens' `E(z, v) exp(-scale(z))`.

        Args:
            emission: stored by latent.
            scale: `[H]`.
            weights: `[N, n, k]`, what the tokens count in each sum.
        """
        # Predictions share many of their tokens: these are read once, and in the order in which
        # they lie in memory.
        tokens, place = self.indices.unique(return_inverse=True)
        number = min(max(slice_size(self.device) // max(len(tokens), 1), 1), STATES_AT_ONCE)
        sums = scale.new_empty(len(weights), weights.shape[1], emission.num_latents)
        for first in range(0, emission.num_latents, number):
            part = slice(first, first + number)
            matrix = emission.log_potential[0, part]
            table = matrix.T.index_select(0, tokens).to(scale.dtype)
            table = exp_of_difference(table, scale[part], out=table)
            sums[..., part] = _weighted_sums(table, place, weights)
        return sums

    @full_precision
    def soft_evidence_bounds(
        self,
        emission: Emission,
        positions: torch.Tensor,
        summary: EmissionSummary | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper `log s(z)`, `[N, H]` each, however the remaining mass is really spread.

        All of it is put on the token that the state emits least, or most. Sums over latent paths
        grow with every piece of evidence, so these give a lower and an upper `log Z` too.
        """
        if summary is None:
            summary = summarise(emission)
        listed, _ = self._listed(emission, positions)
        rows = positions if emission.num_positions > 1 else torch.zeros_like(positions)
        extremes = torch.stack((summary.log_min, summary.log_max))[:, rows]
        others = self.log_rest[:, None] + extremes  # [2, N, H]
        lower, upper = logsumexp(torch.stack((listed.expand_as(others), others)), 0)
        return lower, upper

    def _listed(
        self, emission: Emission, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The listed tokens' share of `log s`, `[N, H]`, and their `log E(z, v)`, `[N, k, H]`."""
        dtype = working_dtype(emission, self.log_probs)
        columns = columns_of_lists(emission, self.indices, positions).to(dtype)
        return logsumexp(columns + self.log_probs[..., None], 1), columns

    @cached_property
    def _log_marginal_listed(self) -> torch.Tensor:
        """`[*batch, k]`: `log u(v)` of the listed tokens."""
        if self.log_marginal is None:
            raise ValueError("the remaining mass has no law yet: call `spread_by` first.")
        if len(self.log_marginal) == 1:
            return self.log_marginal[0].take(self.indices)
        return self.log_marginal[self.marginal_rows[..., None], self.indices]

    @cached_property
    def _log_rest_weights(self) -> torch.Tensor:
        """`[*batch, 1]`: what to add to `log u(v)` for the log-probability of a token not listed.

        -inf where `u` is all on listed tokens: then there is nothing to spread the rest over.
        """
        return (self.log_rest - self._log_left)[..., None]

    @cached_property
    def _log_left(self) -> torch.Tensor:
        """`[*batch]`: log of what `u` has outside the list; inf if it is nothing."""
        left = 1 - self._log_marginal_listed.exp().sum(-1)
        none = left <= 16 * torch.finfo(left.dtype).eps
        return left.masked_fill(none, torch.inf).log()

    def _weights_of(
        self, weights: torch.Tensor, tokens: torch.Tensor | slice = slice(None)
    ) -> torch.Tensor:
        """Such weights `[..., 1]` of tokens `[..., n]`, or of all; what broadcasts so will do."""
        return weights


def list_and_rest(
    logits: torch.Tensor,
    k: int,
    temperature: float,
    forbidden: torch.Tensor | None,
    groups: torch.Tensor | None = None,
    num_groups: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What lists are made of.

    Args:
        logits: `[*batch, V]`.
        k: from 1 to `V`.
        temperature: positive.
        forbidden: `[V]` bool, tokens that get no mass.
        groups: `[V]`, to which group each token belongs; default, all to one.
        num_groups: how many there are.

    Returns:
        The tokens, `[*batch, k]`; their log-probabilities; and the logs of what is left in each
        group, `[*batch, num_groups]`.

    Raises:
        ValueError: `k` is out of range.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"`k` must be in [1, {logits.shape[-1]}], got {k}.")
    if torch.is_grad_enabled() and logits.requires_grad:
        logits = scaled_logits(logits, temperature, forbidden)
        listed, indices = logits.topk(k, -1)
        others, shift = shifted_exp(logits.scatter(-1, indices, -torch.inf), -1)
        rest = safe_log(sum_by_group(others, groups, num_groups)) + shift
    else:
        batch = logits.shape[:-1]
        flat = logits.reshape(-1, logits.shape[-1])
        found = list_likeliest(flat, k, temperature, forbidden, groups, num_groups)
        listed, indices, rest = (part.view(*batch, part.shape[-1]) for part in found)
    total = logsumexp(torch.cat((listed, rest), -1), -1)[..., None]
    total = total.masked_fill(total == -torch.inf, 0)
    return indices, listed - total, rest - total


def law_of_rest(log_marginal: torch.Tensor, forbidden: torch.Tensor | None) -> torch.Tensor:
    """`[1 or L, V]`: the normalised log-law that `spread_by` makes of its arguments."""
    rows = log_marginal.reshape(-1, log_marginal.shape[-1])
    return DenseEvidence.from_logits(rows, forbidden=forbidden).log_probs


def gives_mass_to(log_marginal: torch.Tensor, tokens: torch.Tensor) -> bool:
    """Whether a law `[1 or L, V]` gives something to any of the tokens `[V]` (bool)."""
    return bool((tokens & (log_marginal > -torch.inf)).any())


def _weighted_sums(
    table: torch.Tensor, places: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """`[N, n, H]`: `sum_k weights[., n, k] table[places[., k]]`.

    Args:
        table: `[U, H]`.
        places: `[N, k]`.
        weights: `[N, n, k]`.
    """
    # The sums of a prediction one after the other: all but the first from the processor's cache.
    every = places.repeat_interleave(weights.shape[1], 0)
    sums = F.embedding_bag(every, table, mode="sum", per_sample_weights=weights.flatten(0, 1))
    return sums.unflatten(0, weights.shape[:2])
