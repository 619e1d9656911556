r"""Token evidence: all that inference needs to know of the vocabulary.

For a masked position the soft evidence of state `z` is `s(z) = \sum_v phi(v) E(z, v)`, where `phi`
is the backbone's prediction; for an observed one the hard evidence is `E(z, x)`. These are the only
products with the vocabulary. Here `phi` is known for every token; `topk.py` has the form that keeps
a short list of them.

Large emissions are exponentiated a slice of the vocabulary at a time, and never copied whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.utils.checkpoint import checkpoint

from ..numerics import (
    LOST_MASS,
    exp_of_difference,
    full_precision,
    log_softmax,
    logsumexp,
    normalised_exp,
)
from ..potentials.emissions import Emission, stored_by_latent
from .listing import slice_size

UNDERFLOW = 1e-30
"""A sum of float32 products below this may lack terms that were rounded to zero."""

ONE_PRODUCT = 1 << 24
"""Emissions of at most this many numbers are exponentiated whole: fewer products are faster."""

ELEMENTS_AT_ONCE = 1 << 22
"""Largest temporary, in numbers, of everything else."""


@dataclass(frozen=True)
class EmissionSummary:
    """What soft evidence needs of a whole emission: computed once where the circuit is fixed.

    Attributes:
        log_max: `[1 or L, H]`, each state's largest `log E(z, v)`, without a gradient.
        log_min: `[1 or L, H]`, the smallest, without a gradient.
        log_mean: `[1 or L, H]`, `log sum_v u(v) E(z, v)` under token marginals `u`, or None.
        factors: `[H, V]`, `E(z, v) exp(-scale(z))` of tied emissions, or None.
    """

    log_max: torch.Tensor
    log_min: torch.Tensor
    log_mean: torch.Tensor | None = None
    factors: torch.Tensor | None = None

    @cached_property
    def needs_repair(self) -> bool:
        """Whether soft evidence could underflow: some state likes some tokens so much more."""
        spread = self.log_max - self.log_min  # NaN for a state that emits nothing: rather repair
        return not bool((spread.exp() < 1 / UNDERFLOW).all())

    def holds_factors(self, dtype: torch.dtype) -> bool:
        """Whether `factors`, which have no gradients, are there in a dtype and will do."""
        held = self.factors is not None and self.factors.dtype == dtype
        return held and not torch.is_grad_enabled()

    def scale(self, position: int) -> torch.Tensor:
        """`[H]`: what is taken out of `log E_i(z, .)` before `exp`."""
        scale = self.log_max[position if len(self.log_max) > 1 else 0]
        return scale.masked_fill(scale == -torch.inf, 0)


@full_precision
def summarise(
    emission: Emission, log_marginal: torch.Tensor | None = None, repair: bool = True
) -> EmissionSummary:
    """The summary of an emission; `log_mean` is differentiable.

    Args:
        emission: the emission.
        log_marginal: `[1 or L, V]` normalised token marginals, such as `TopKEvidence.log_marginal`;
            for the summaries of evidence that is spread by them.
        repair: as in `DenseEvidence.soft_evidence`, for `log_mean`.
    """
    dtype = torch.promote_types(emission.dtype, torch.float32)
    lowest, highest = [], []
    with torch.no_grad():
        for position in range(emission.num_positions):
            chunks = emission.chunks(product_width(emission), position)
            # `aminmax` would be one pass, but takes three times as long.
            parts = [(matrix.amin(1), matrix.amax(1)) for _, matrix in chunks]
            low, high = (torch.stack(values) for values in zip(*parts, strict=True))
            lowest.append(low.amin(0))
            highest.append(high.amax(0))
    summary = EmissionSummary(torch.stack(highest).to(dtype), torch.stack(lowest).to(dtype))
    if log_marginal is None:
        return summary
    count = max(emission.num_positions, log_marginal.shape[0])
    positions = torch.arange(count, device=emission.device)
    marginal = DenseEvidence(log_marginal.expand(count, -1))
    log_mean = marginal.soft_evidence(emission, positions, summary, repair)
    return replace(summary, log_mean=log_mean)


@dataclass(frozen=True)
class DenseEvidence:
    """The backbone's factorized prediction with the probability of every token.

    Attributes:
        log_probs: `[*batch, V]`; -inf where a token is impossible.
        temperature: the evidence temperature it was computed at.
    """

    log_probs: torch.Tensor
    temperature: float = 1.0

    @classmethod
    def from_logits(
        cls,
        logits: torch.Tensor,
        temperature: float = 1.0,
        forbidden: torch.Tensor | None = None,
    ) -> DenseEvidence:
        """`softmax(logits / temperature)` over the tokens that are not forbidden.

        Args:
            logits: `[*batch, V]`, of any floating dtype; a row that is -inf throughout stays so.
            temperature: positive.
            forbidden: `[V]` bool, tokens that get no mass.
        """
        return cls(log_softmax(scaled_logits(logits, temperature, forbidden)), temperature)

    @property
    def batch_shape(self) -> torch.Size:
        return self.log_probs.shape[:-1]

    @property
    def device(self) -> torch.device:
        return self.log_probs.device

    def __getitem__(self, index) -> DenseEvidence:
        """The predictions at some places of the batch, such as `prediction[rows, positions]`."""
        return replace(self, log_probs=self.log_probs[index])

    def log_prob_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[*S, *batch]` of tokens `[*S, *batch]`."""
        # Samples go last: a gather from an expanded tensor has a gradient as large as all of it.
        samples = tokens[(None,) * (tokens.ndim < self.log_probs.ndim)]
        samples = samples.flatten(0, -self.log_probs.ndim).movedim(0, -1)
        return self.log_probs.gather(-1, samples).movedim(-1, 0).reshape(tokens.shape)

    def dense(self) -> torch.Tensor:
        """`[*batch, V]` log-probabilities."""
        return self.log_probs

    @full_precision
    def given_latents(
        self, emission: Emission, latents: torch.Tensor, log_total: torch.Tensor
    ) -> torch.Tensor:
        """`dense() + emission_of_latents(emission, latents) - log_total`; not differentiable.

        Args:
            emission: the emission.
            latents: `[*S, *batch]`.
            log_total: `[*S, *batch]`, whose dtype the result has.
        """
        scores = log_total.new_empty(*latents.shape, emission.vocab_size)
        log_probs = self.log_probs.reshape(-1, scores.shape[-1])
        log_total = log_total.reshape(-1, 1)
        copies = torch.arange(len(log_total), device=self.device) % max(len(log_probs), 1)
        once = len(log_total) == len(log_probs)
        for part, rows in rows_of_latents(emission, latents, scores):
            rows.add_(log_probs[part if once else copies[part]]).sub_(log_total[part])
        return scores

    @full_precision
    def soft_evidence(
        self,
        emission: Emission,
        positions: torch.Tensor,
        summary: EmissionSummary | None = None,
        repair: bool = True,
    ) -> torch.Tensor:
        """Exact `log s(z)`, `[N, H]`, of a batch of `N` predictions; differentiable.

        Args:
            emission: the emission.
            positions: `[N]`, where in the window each prediction stands.
            summary: of this emission, if at hand: saves a pass over it.
            repair: whether sums that underflow are repeated in log space, which makes the work
                depend on the data. Nothing is lost by False where `summary.needs_repair` is False.
        """
        if summary is None:
            summary = summarise(emission)
        log_phi = self.log_probs.to(working_dtype(emission, self.log_probs))
        phi = log_phi.exp()
        rows_of, sums = [], []
        for position, rows in _by_position(emission, positions):
            scale = summary.scale(position).to(phi.dtype)
            if summary.holds_factors(phi.dtype):
                product = phi[rows] @ summary.factors.T
            else:
                product = _sum_over_tokens(emission, phi[rows], position, scale)
            rows_of.append(rows)
            sums.append((product, scale.expand_as(product)))
        product, scale = (_in_order(rows_of, parts) for parts in zip(*sums, strict=True))
        lost = product < UNDERFLOW if repair else product <= 0
        log_evidence = product.masked_fill(lost, 1).log() + scale
        log_evidence = log_evidence.masked_fill(lost, -torch.inf)
        if not repair:
            return log_evidence
        rows, states = lost.nonzero(as_tuple=True)
        if len(rows):
            count = max(ELEMENTS_AT_ONCE // emission.vocab_size, 1)
            exact = [
                logsumexp(log_phi[r] + emission.rows(z, positions[r]), -1)
                for r, z in zip(rows.split(count), states.split(count), strict=True)
            ]
            log_evidence = log_evidence.index_put((rows, states), torch.cat(exact))
        return log_evidence


@torch.no_grad()
def with_factors(summary: EmissionSummary, emission: Emission) -> EmissionSummary:
    """A summary that also holds a small (tied) emission in probability space, for products."""
    with torch.autocast(emission.device.type, enabled=False):
        return replace(summary, factors=emission_factors(emission.dense()[0], summary.scale(0)))


@full_precision
def hard_evidence(emission: Emission, tokens: torch.Tensor) -> torch.Tensor:
    """`log E_i(z, x_i)`, `[..., L, H]`, of tokens `[..., L]`."""
    return emission.columns(tokens, torch.arange(tokens.shape[-1], device=tokens.device))


@full_precision
def emission_of_latents(emission: Emission, latents: torch.Tensor) -> torch.Tensor:
    """`log E_i(z_i, v)`, `[..., L, V]`, of latents `[..., L]`."""
    return emission.rows(latents, torch.arange(latents.shape[-1], device=latents.device))


def rows_of_latents(
    emission: Emission, latents: torch.Tensor, scores: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Fills `scores [*S, *batch, V]` with `emission_of_latents`, few rows at a time.

    Yields which of the rows, and the rows `[n, V]` themselves, to be worked on while they are in
    the processor's cache.
    """
    length = latents.shape[-1]
    positions = torch.arange(length, device=latents.device).expand_as(latents).reshape(-1)
    latents, scores = latents.reshape(-1), scores.view(-1, scores.shape[-1])
    number = max(slice_size(scores.device) // scores.shape[-1], 1)
    for first in range(0, len(scores), number):
        part = slice(first, first + number)
        emission.rows_into(scores[part], latents[part], positions[part])
        yield part, scores[part]


@full_precision
def mix_tokens(
    emission: Emission,
    log_phi: torch.Tensor,
    weights: torch.Tensor,
    positions: torch.Tensor,
    summary: EmissionSummary | None = None,
) -> torch.Tensor:
    """Token laws `[N, V]` proportional to `phi(v) sum_z exp(weights(z)) E(z, v)`.

    Args:
        emission: the emission.
        log_phi: `[N, V]`.
        weights: `[N, H]` log-weights of the states.
        positions: `[N]`.
        summary: of this emission, if at hand: saves a pass over it.
    """
    if summary is None:
        summary = summarise(emission)
    dtype = working_dtype(emission, log_phi)
    log_phi, weights = log_phi.to(dtype), weights.to(dtype)
    rows_of, parts = [], []
    for position, rows in _by_position(emission, positions):
        scale = summary.scale(position).to(dtype)
        mixture = normalised_exp(weights[rows] + scale)
        chunks = emission.chunks(product_width(emission), position)
        made = (emission_factors(matrix, scale) for _, matrix in chunks)
        held = [summary.factors] if summary.holds_factors(dtype) else made
        mixed = [mixture @ factors for factors in held]
        rows_of.append(rows)
        parts.append(torch.cat(mixed, -1))
    law = _in_order(rows_of, parts) * log_phi.exp()
    total = law.sum(-1, keepdim=True)
    lost = total <= LOST_MASS
    law = law / total.masked_fill(lost, 1)
    rows = lost[:, 0].nonzero()[:, 0]
    exact = []
    for row in rows.tolist():
        chunks = emission.chunks(product_width(emission), int(positions[row]))
        mixed = [logsumexp(weights[row][:, None] + matrix, 0) for _, matrix in chunks]
        exact.append(normalised_exp(log_phi[row] + torch.cat(mixed)))
    return law.index_put((rows,), torch.stack(exact)) if exact else law


def columns_of_lists(
    emission: Emission, tokens: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """`log E_i(., v)`, `[N, k, H]`, of lists of tokens `[N, k]` at positions `[N]`."""
    if not stored_by_latent(emission):
        return emission.columns(tokens, positions[:, None])
    # Twice as fast as `columns`, which goes through all states for one token at a time.
    columns = emission.log_potential[0].index_select(1, tokens.flatten())
    return columns.unflatten(1, tokens.shape).permute(1, 2, 0)


def scaled_logits(
    logits: torch.Tensor, temperature: float, forbidden: torch.Tensor | None
) -> torch.Tensor:
    """Logits over the temperature, in float32 at least, -inf for forbidden tokens."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if forbidden is not None:
        logits = logits.masked_fill(forbidden, -torch.inf)
    return logits if temperature == 1 else logits / temperature


def working_dtype(emission: Emission, log_probs: torch.Tensor) -> torch.dtype:
    """float32, or float64 if one of them is."""
    return torch.promote_types(torch.promote_types(emission.dtype, log_probs.dtype), torch.float32)


def product_width(emission: Emission) -> int:
    """How many tokens go into one product."""
    if emission.num_latents * emission.vocab_size <= ONE_PRODUCT:
        return emission.vocab_size
    return max(ELEMENTS_AT_ONCE // emission.num_latents, 1)


def emission_factors(log_emission: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return exp_of_difference(log_emission.to(scale.dtype), scale[:, None])


def _sum_over_tokens(emission, weights, position: int, scale) -> torch.Tensor:
    """`sum_v weights(v) E(z, v) exp(-scale(z))`, `[N, H]`, of weights `[N, V]`."""

    def part_of_sum(weights, log_emission, scale):
        return weights @ emission_factors(log_emission, scale).T

    width = product_width(emission)
    total = weights.new_zeros(len(weights), emission.num_latents)
    for part, log_emission in emission.chunks(width, position):
        arguments = weights[:, part], log_emission, scale
        if width < emission.vocab_size and torch.is_grad_enabled():
            # Kept until the backward pass, the factors would add up to the whole emission.
            part_sum = checkpoint(
                part_of_sum, *arguments, use_reentrant=False, preserve_rng_state=False
            )
            total = total + part_sum
        else:
            total = total + part_of_sum(*arguments)
    return total


def _by_position(
    emission: Emission, positions: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor | slice]]:
    """Yields the positions whose emissions differ and the rows that stand there."""
    if emission.num_positions == 1 or not len(positions):
        yield 0, slice(None)
        return
    for position in positions.unique().tolist():
        yield position, (positions == position).nonzero()[:, 0]


def _in_order(rows_of: list, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Puts what was computed by position back into the order of the rows."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.cat(rows_of).argsort()]
