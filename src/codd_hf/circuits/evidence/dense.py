r"""Token evidence: all that inference needs to know of the vocabulary.

For a masked position the soft evidence of state `z` is `s(z) = \sum_v phi(v) E(z, v)`, where `phi`
is the backbone's prediction; for an observed one the hard evidence is `E(z, x)`. These are the only
products with the vocabulary. Here `phi` is known for every token; `lists.py` has the form that
keeps a short list of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..numerics import LOST_MASS, full_precision, log_softmax, logsumexp, normalised_exp
from ..potentials.emissions import Emission
from ..potentials.tables import ELEMENTS_AT_ONCE, UNDERFLOW, EmissionTables
from .listing import slice_size


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
        number = tokens.numel() // max(self.batch_shape.numel(), 1)
        samples = tokens.reshape(number, *self.batch_shape).movedim(0, -1)
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
    def soft_evidence(self, tables: EmissionTables, positions: torch.Tensor) -> torch.Tensor:
        """Exact `log s(z)`, `[N, H]`, of a batch of `N` predictions; differentiable.

        Sums that underflow are repeated in log space.

        Args:
            tables: of the emission.
            positions: `[N]`, where in the window each prediction stands.
        """
        log_phi = self.log_probs.to(torch.promote_types(tables.log_max.dtype, self.log_probs.dtype))
        sums = tables.sums(log_phi.exp(), positions)
        lost = sums < UNDERFLOW if tables.can_underflow else sums <= 0
        log_evidence = sums.masked_fill(lost, 1).log() + tables.log_scale(positions).to(sums.dtype)
        log_evidence = log_evidence.masked_fill(lost, -torch.inf)
        rows, states = lost.nonzero(as_tuple=True) if tables.can_underflow else ((), ())
        if not len(rows):
            return log_evidence
        emission = tables.emission
        count = max(ELEMENTS_AT_ONCE // emission.vocab_size, 1)
        exact = [
            logsumexp(log_phi[r] + emission.rows(z, positions[r]), -1)
            for r, z in zip(rows.split(count), states.split(count), strict=True)
        ]
        return log_evidence.index_put((rows, states), torch.cat(exact))


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
    log_phi: torch.Tensor,
    weights: torch.Tensor,
    positions: torch.Tensor,
    tables: EmissionTables,
) -> torch.Tensor:
    """Token probabilities `[N, V]` proportional to `phi(v) sum_z exp(weights(z)) E(z, v)`.

    Args:
        log_phi: `[N, V]`.
        weights: `[N, H]` log-weights of the states.
        positions: `[N]`.
        tables: of the emission.
    """
    emission = tables.emission
    dtype = torch.promote_types(tables.log_max.dtype, log_phi.dtype)
    log_phi, weights = log_phi.to(dtype), weights.to(dtype)

    def at(position: int, rows: torch.Tensor | slice) -> torch.Tensor:
        mixture = normalised_exp(weights[rows] + tables.log_scale(position).to(dtype))
        return torch.cat([mixture @ make() for _, make in tables.factors(position, dtype)], -1)

    probs = tables.by_position(positions, at) * log_phi.exp()
    total = probs.sum(-1, keepdim=True)
    lost = total <= LOST_MASS
    probs = probs / total.masked_fill(lost, 1)
    rows = lost[:, 0].nonzero()[:, 0]
    exact = []
    for row in rows.tolist():
        chunks = emission.chunks(max(ELEMENTS_AT_ONCE // emission.num_latents, 1), positions[row])
        mixed = [logsumexp(weights[row][:, None] + matrix, 0) for _, matrix in chunks]
        exact.append(normalised_exp(log_phi[row] + torch.cat(mixed)))
    return probs.index_put((rows,), torch.stack(exact)) if exact else probs


def scaled_logits(
    logits: torch.Tensor, temperature: float, forbidden: torch.Tensor | None
) -> torch.Tensor:
    """Logits over the temperature, in float32 at least, -inf for forbidden tokens."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if forbidden is not None:
        logits = logits.masked_fill(forbidden, -torch.inf)
    return logits if temperature == 1 else logits / temperature
