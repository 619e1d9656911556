r"""Predictions that keep a short list of tokens and the mass of groups of others.

A large vocabulary's prediction is mostly tail. Kept are the `k` likeliest tokens `T` and, for each
group `c` of tokens that look alike to the circuit, the mass `r_c` of those that are not listed.
Within a group it is taken to be spread in proportion to a token marginal `u`:

    phi(v) = r_c u(v) / u(c \ T)    for v outside T in group c

Soft evidence then needs `k` columns of the emission instead of all `V`, and a product with the
groups' means `U_c(z) = \sum_{v in c} u(v) E(z, v)`, which are made once:

    s(z) = \sum_{v in T} (phi(v) - w_c(v) u(v)) E(z, v) + \sum_c w_c U_c(z),  w_c = r_c / u(c \ T)

It is exact when `k = V`, and otherwise within `soft_evidence_bounds`.

Where nearly all of a group's marginal is listed, what is left of it is mostly rounding error. A
group takes mass for at least `SMALLEST_PART` of its marginal's, and what is then left over, with a
rounding error's worth of all, is spread over all tokens by the marginal.

On CUDA, sums by group are made in no fixed order: runs agree to rounding, and bit by bit only under
`torch.use_deterministic_algorithms(True)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from ..numerics import exp_of_difference, full_precision, logsumexp, safe_log, shifted_exp
from ..potentials.emissions import Emission, stored_by_latent
from ..potentials.tables import EmissionTables, TokenGroups
from .dense import DenseEvidence, rows_of_latents, scaled_logits
from .listing import list_likeliest, slice_size, sum_by_group

SMALLEST_PART = 1e-3
"""Of a group's marginal: keeps the mass spread within it accurate to about a ten-thousandth."""

STATES_AT_ONCE = 256
"""States whose emissions of the listed tokens are gathered together: the fastest on a CPU."""


@dataclass(frozen=True)
class ListedEvidence:
    """The backbone's factorized prediction as a list of tokens and the mass of the others.

    Attributes:
        indices: `[*batch, k]` long, distinct tokens.
        log_probs: `[*batch, k]`, their log-probabilities.
        log_rest: `[*batch, C]`, log of the mass of each group's other tokens; -inf when `k = V`.
        temperature: the evidence temperature it was computed at.
        groups: by which that mass is spread (`spread`).
        rows: `[*batch]` long, which row of the groups' marginal each prediction uses.
        log_weights: `[*batch, C]`, what to add to it for the log-probability of a group's tokens.
    """

    indices: torch.Tensor
    log_probs: torch.Tensor
    log_rest: torch.Tensor
    temperature: float = 1.0
    groups: TokenGroups | None = None
    rows: torch.Tensor | None = None
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

        Args:
            logits: `[*batch, V]`, of any floating dtype; a row that is -inf throughout stays so.
            k: from 1 to `V`.
            temperature: positive.
            forbidden: `[V]` bool, tokens that get no mass, nor have any in the groups' marginal.
            groups: of tokens; None is one group, still without a distribution.

        Raises:
            ValueError: `k` is out of range.
        """
        if not 1 <= k <= logits.shape[-1]:
            raise ValueError(f"`k` must be in [1, {logits.shape[-1]}], got {k}.")
        index, number = (None, 1) if groups is None else (groups.index, groups.number)
        if torch.is_grad_enabled() and logits.requires_grad:
            logits = scaled_logits(logits, temperature, forbidden)
            listed, indices = logits.topk(k, -1)
            others, shift = shifted_exp(logits.scatter(-1, indices, -torch.inf), -1)
            rest = safe_log(sum_by_group(others, index, number)) + shift
        else:
            flat = logits.reshape(-1, logits.shape[-1])
            found = list_likeliest(flat, k, temperature, forbidden, index, number)
            shape = logits.shape[:-1]
            listed, indices, rest = (part.view(*shape, part.shape[-1]) for part in found)
        total = logsumexp(torch.cat((listed, rest), -1), -1)[..., None]
        total = total.masked_fill(total == -torch.inf, 0)
        evidence = cls(indices, listed - total, rest - total, temperature)
        return evidence if groups is None else evidence.spread(groups)

    def spread(self, groups: TokenGroups) -> ListedEvidence:
        """The same with the distribution by which the groups' mass is spread.

        With one row a position, row `i` is for position `i` of the batch's last axis.
        """
        rows = torch.zeros_like(self.indices[..., 0])
        if len(groups.log_marginal) > 1:
            rows = rows + torch.arange(rows.shape[-1], device=rows.device)
        spread = replace(self, groups=groups, rows=rows)
        listed = spread._log_marginal_of(self.indices).to(self.log_rest.dtype).exp()
        outside = 1 - listed.sum(-1)
        nothing = outside <= 16 * torch.finfo(outside.dtype).eps
        log_outside = outside.masked_fill(nothing, torch.inf).log()
        mass = groups.mass.to(listed.dtype)
        index = torch.zeros_like(self.indices)
        if groups.index is not None:
            index = groups.index[self.indices]
        left = mass.expand_as(self.log_rest).scatter_add(-1, index, -listed)
        left = torch.where(mass > 0, left.clamp(min=0), 0)
        counted = torch.maximum(left, SMALLEST_PART * mass)
        counted = counted.masked_fill(counted <= 0, torch.inf)
        within = self.log_rest - counted.log()
        over = logsumexp(self.log_rest + safe_log(1 - left / counted), -1)
        least = logsumexp(self.log_rest, -1) + math.log(torch.finfo(listed.dtype).eps)
        over = logsumexp(torch.stack((over, least)), 0) - log_outside
        weights = logsumexp(torch.stack((within, over[..., None].expand_as(within))), 0)
        return replace(spread, log_weights=weights)

    @property
    def batch_shape(self) -> torch.Size:
        return self.indices.shape[:-1]

    @property
    def device(self) -> torch.device:
        return self.indices.device

    def __getitem__(self, index) -> ListedEvidence:
        """The predictions at some places of the batch, such as `prediction[rows, positions]`."""
        names = ("indices", "log_probs", "log_rest", "rows", "log_weights")
        parts = {name: getattr(self, name) for name in names}
        return replace(self, **{n: t if t is None else t[index] for n, t in parts.items()})

    @property
    def _log_marginal(self) -> torch.Tensor:
        if self.groups is None:
            raise ValueError("the mass of other tokens has no distribution yet: call `spread`.")
        return self.groups.log_marginal

    def _log_marginal_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """`log u(v)` of tokens `[*S, *batch, n]`."""
        marginal = self._log_marginal
        if len(marginal) == 1:
            return marginal[0].take(tokens)
        return marginal[self.rows[..., None], tokens]

    def _by_token(
        self, weights: torch.Tensor, tokens: torch.Tensor | slice = slice(None)
    ) -> torch.Tensor:
        """Weights `[..., C]` of the groups of tokens `[..., n]`, or of all (or one for all)."""
        if self.groups.index is None:
            return weights
        index = self.groups.index[tokens]
        return weights.gather(-1, index.expand(*weights.shape[:-1], -1))

    def log_prob_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[*S, *batch]` of tokens `[*S, *batch]`."""
        match = self.indices == tokens[..., None]
        listed = torch.where(match, self.log_probs, 0).sum(-1)
        token = tokens[..., None]
        weights = self.log_weights.expand(*tokens.shape, -1)
        other = self._by_token(weights, token) + self._log_marginal_of(token)
        return torch.where(match.any(-1), listed, other[..., 0])

    def log_prob_bounds_of(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper `log_prob_of`, however the mass of the others is really spread."""
        match = self.indices == tokens[..., None]
        listed, known = torch.where(match, self.log_probs, 0).sum(-1), match.any(-1)
        rest = logsumexp(self.log_rest, -1).expand_as(listed)
        return listed.masked_fill(~known, -torch.inf), torch.where(known, listed, rest)

    def dense(self) -> torch.Tensor:
        """`[*batch, V]` log-probabilities."""
        marginal = self._log_marginal
        rest = self._by_token(self.log_weights)
        rest = rest + (marginal[0] if len(marginal) == 1 else marginal[self.rows])
        return rest.scatter(-1, self.indices, self.log_probs.to(rest.dtype))

    @full_precision
    def given_latents(
        self, emission: Emission, latents: torch.Tensor, log_total: torch.Tensor
    ) -> torch.Tensor:
        """As `DenseEvidence.given_latents`."""
        scores, marginal = (
            log_total.new_empty(*latents.shape, emission.vocab_size),
            self._log_marginal,
        )

        def flat(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.expand(*latents.shape, -1).reshape(-1, tensor.shape[-1])

        indices, rows_of = flat(self.indices), flat(self.rows[..., None])[:, 0]
        listed = flat(self.log_probs - log_total[..., None])
        others = flat(self.log_weights - log_total[..., None])
        for part, rows in rows_of_latents(emission, latents, scores):
            values = rows.gather(1, indices[part]).add_(listed[part])
            rows.add_(self._by_token(others[part]))
            rows.add_(marginal if len(marginal) == 1 else marginal[rows_of[part]])
            rows.scatter_(1, indices[part], values)
        return scores

    @full_precision
    def soft_evidence(self, tables: EmissionTables, positions: torch.Tensor) -> torch.Tensor:
        """`log s(z)`, `[N, H]`, of a batch of `N` predictions; differentiable.

        Args:
            tables: of the emission.
            positions: `[N]`, where in the window each prediction stands.

        Raises:
            ValueError: no `spread` has said where the mass of the others goes.
        """
        if tables.can_underflow:
            return DenseEvidence(self.dense()).soft_evidence(tables, positions)
        dtype = torch.promote_types(tables.log_max.dtype, self.log_probs.dtype)
        spread = self._by_token(self.log_weights, self.indices)
        weights = torch.stack((self.log_probs, spread + self._log_marginal_of(self.indices)), 1)
        listed, part = self._sums(tables, positions, weights.to(dtype).exp()).unbind(1)
        rest, means = self.log_weights.to(dtype).exp(), self.groups.means().to(dtype)
        if self.groups.index is None:
            rest = rest * (means if len(means) == 1 else means[positions])
        else:
            rest = rest @ means
        evidence = listed + (rest - part).clamp(min=0)
        nothing = evidence <= 0  # NaN is not
        evidence = evidence.masked_fill(nothing, 1).log() + tables.log_scale(positions).to(dtype)
        return evidence.masked_fill(nothing, -torch.inf)

    def _sums(
        self, tables: EmissionTables, positions: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """`[N, n, H]`: sums of the listed tokens' factors by weights `[N, n, k]`."""
        emission = tables.emission
        scale = tables.log_scale(positions).to(weights.dtype)
        if not stored_by_latent(emission):
            columns = emission.columns(self.indices, positions[:, None]).to(weights.dtype)
            return weights @ exp_of_difference(columns, scale[:, None])
        # Predictions share many of their tokens: these are read once, and in the order in which
        # they lie in memory.
        tokens, places = self.indices.unique(return_inverse=True)
        # A prediction's sums one after the other: all but the first from the processor's cache.
        places = places.repeat_interleave(weights.shape[1], 0)
        number = min(max(slice_size(self.device) // max(len(tokens), 1), 1), STATES_AT_ONCE)
        sums = []
        for matrix, shift in zip(
            emission.log_potential[0].split(number), scale[0].split(number), strict=True
        ):
            factors = matrix.T.index_select(0, tokens).to(shift.dtype)
            out = None if torch.is_grad_enabled() else factors
            factors, by_token = exp_of_difference(factors, shift, out), weights.flatten(0, 1)
            sums.append(F.embedding_bag(places, factors, mode="sum", per_sample_weights=by_token))
        return torch.cat(sums, -1).unflatten(0, weights.shape[:2])

    @full_precision
    def soft_evidence_bounds(
        self, tables: EmissionTables, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper `log s(z)`, `[N, H]` each, however the others' mass is really spread.

        All of it is put on the token that the state emits least, or most. Sums over latent paths
        grow with every piece of evidence, so these give a lower and an upper `log Z` too.
        """
        shape = *self.batch_shape, tables.emission.vocab_size
        listed = self.log_probs.new_full(shape, -torch.inf)
        listed = DenseEvidence(listed.scatter(-1, self.indices, self.log_probs))
        listed = listed.soft_evidence(tables, positions)
        rest, rows = logsumexp(self.log_rest, -1)[:, None], positions % len(tables.log_max)
        lower, upper = (
            logsumexp(torch.stack((listed, rest + extreme[rows])), 0)
            for extreme in (tables.log_min, tables.log_max)
        )
        return lower, upper
