r"""Token evidence: all that inference needs to know of the vocabulary.

For a masked position the soft evidence of state `z` is `s(z) = \sum_v phi(v) E(z, v)`, where `phi`
is the backbone's prediction; for an observed one it is `E(z, x)`. Here `phi` is known for every
token; `lists.py` has the form that keeps a short list of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch

from ..potentials.circuit import ELEMENTS_AT_ONCE, UNDERFLOW, Emission
from ..recursions.chain import full_precision, logsumexp, normalised_exp

if TYPE_CHECKING:
    from .lists import ListedEvidence

SLICE_IN_CACHE, SLICE_ON_DEVICE = 1 << 21, 1 << 26
"""Numbers that are worked on at once on a CPU, and where few large kernels beat many small ones."""

LOST_MASS = 1e-12
"""A mixture of tokens with less mass than this is made again in log space."""

FIRST_LIST = 64
"""How many of a prediction's likeliest tokens are tried first where the best one is looked for."""


@dataclass(frozen=True)
class Batched:
    """Fields that are tensors `[*batch, ...]`, and others that all of the batch shares."""

    @property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: t for name, t in vars(self).items() if isinstance(t, torch.Tensor)}

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self._tensors.values())).device

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same with every tensor changed."""
        changed: dict[str, Any] = {name: change(t) for name, t in self._tensors.items()}
        return replace(self, **changed)

    def __getitem__(self, index: Any) -> Self:
        """What concerns some places of the batch, such as `prediction[rows, positions]`."""
        return self.map(lambda tensor: tensor[index])


@dataclass(frozen=True)
class DenseEvidence(Batched):
    """The backbone's factorized prediction with the probability of every token.

    Attributes:
        log_probs: `[*batch, V]`; -inf where a token is impossible.
        temperature: the evidence temperature it was computed at.
    """

    log_probs: torch.Tensor
    temperature: float = 1.0

    @classmethod
    def from_logits(
        cls, logits: torch.Tensor, temperature: float = 1.0, forbidden: torch.Tensor | None = None
    ) -> DenseEvidence:
        """`softmax(logits / temperature)` over the tokens that are not forbidden `[V]`.

        A row of the logits that is -inf throughout stays so.
        """
        return cls(log_softmax(scaled_logits(logits, temperature, forbidden)), temperature)

    @property
    def shape(self) -> torch.Size:
        """`[*batch, V]`."""
        return self.log_probs.shape

    def log_prob_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[*S, *batch]` of tokens `[*S, *batch]`."""
        # Samples go last: a gather from an expanded tensor has a gradient as large as all of it.
        batch = self.shape[:-1]
        samples = tokens.reshape(tokens.numel() // max(batch.numel(), 1), *batch).movedim(0, -1)
        return self.log_probs.gather(-1, samples).movedim(-1, 0).reshape(tokens.shape)

    def dense(self) -> torch.Tensor:
        """`[*batch, V]` log-probabilities."""
        return self.log_probs

    @full_precision
    def soft_evidence(self, emission: Emission, positions: torch.Tensor) -> torch.Tensor:
        """Exact `log s(z)`, `[N, H]`, of a batch of `N` predictions at positions `[N]`.

        Differentiable. Sums that underflow are repeated in log space.
        """
        dtype = torch.promote_types(emission.log_max.dtype, self.log_probs.dtype)
        log_phi = self.log_probs.to(dtype)
        sums = emission.sums(log_phi.exp(), positions)
        lost = sums < UNDERFLOW if emission.can_underflow else sums <= 0
        log_evidence = sums.masked_fill(lost, 1).log() + emission.log_scale(positions).to(dtype)
        log_evidence = log_evidence.masked_fill(lost, -torch.inf)
        if not (emission.can_underflow and bool(lost.any())):
            return log_evidence
        rows, states = lost.nonzero(as_tuple=True)
        count = max(ELEMENTS_AT_ONCE // emission.vocab_size, 1)
        exact = [
            logsumexp(log_phi[r] + emission.rows(z, positions[r]), -1)
            for r, z in zip(rows.split(count), states.split(count), strict=True)
        ]
        return log_evidence.index_put((rows, states), torch.cat(exact))


@full_precision
def log_probs_given(
    prediction: DenseEvidence | ListedEvidence,
    emission: Emission,
    latents: torch.Tensor,
    log_total: torch.Tensor,
) -> torch.Tensor:
    """`log phi(v) + log E_i(z_i, v) - log_total`, `[*S, *batch, V]`, of latents `[*S, *batch]`."""
    positions = torch.arange(latents.shape[-1], device=latents.device)
    if torch.is_grad_enabled():
        scores = prediction.dense() + emission.rows(latents, positions).to(log_total.dtype)
        return scores - log_total[..., None]
    scores = log_total.new_empty(*latents.shape, emission.vocab_size)
    flat, total = scores.view(-1, emission.vocab_size), log_total.reshape(-1, 1)
    states, positions = latents.reshape(-1), positions.expand_as(latents).reshape(-1)
    predictions = prediction.map(lambda tensor: tensor.flatten(0, -2))
    number = predictions.shape[0]
    copies = torch.arange(len(flat), device=latents.device) % max(number, 1)
    rows = max(slice_size(scores.device) // emission.vocab_size, 1)  # those stay in the cache
    for first in range(0, len(flat), rows):
        part = slice(first, first + rows)
        at = part if len(flat) == number else copies[part]
        log_emission = emission.rows(states[part], positions[part])
        torch.add(log_emission, predictions[at].dense(), out=flat[part]).sub_(total[part])
    return scores


@full_precision
def mix_tokens(
    log_phi: torch.Tensor, weights: torch.Tensor, positions: torch.Tensor, emission: Emission
) -> torch.Tensor:
    """Token probabilities `[N, V]` proportional to `phi(v) sum_z exp(weights(z)) E(z, v)`."""
    dtype = torch.promote_types(emission.log_max.dtype, log_phi.dtype)
    log_phi, weights = log_phi.to(dtype), weights.to(dtype)
    mixture = normalised_exp(weights + emission.log_scale(positions).to(dtype))
    probs = emission.mixtures(mixture, positions) * log_phi.exp()
    total = probs.sum(-1, keepdim=True)
    lost = total <= LOST_MASS
    probs = probs / total.masked_fill(lost, 1)
    exact, rows = [], lost[:, 0].nonzero()[:, 0]
    for row in rows.tolist():
        size = max(ELEMENTS_AT_ONCE // emission.num_latents, 1)
        chunks = emission.chunks(size, int(positions[row]))
        mixed = [logsumexp(weights[row][:, None] + chunk, 0) for chunk in chunks]
        exact.append(normalised_exp(log_phi[row] + torch.cat(mixed)))
    return probs.index_put((rows,), torch.stack(exact)) if exact else probs


@full_precision
def best_evidence(
    log_phi: torch.Tensor, positions: torch.Tensor, emission: Emission
) -> torch.Tensor:
    """`max_v log phi(v) + log E(z, v)`, `[N, H]`, of `log_phi [N, V]` at positions `[N]`; exact.

    A maximum is no matrix product. But a token that is not among the `k` likeliest adds at most the
    probability of the last of them and the state's largest emission. Predictions for which that
    does not rule out all others are looked at again with a longer list.
    """
    best = log_phi.new_empty(len(log_phi), emission.num_latents)
    largest = emission.log_max[positions % len(emission.log_max)]
    rows, size = torch.arange(len(log_phi), device=log_phi.device), FIRST_LIST
    while len(rows):
        size = min(size, emission.vocab_size)
        settled = []
        for part in rows.split(max(ELEMENTS_AT_ONCE // (size * emission.num_latents), 1)):
            values, tokens = log_phi[part].topk(size, -1)
            columns = emission.columns(tokens, positions[part, None])
            best[part] = (columns + values[..., None]).amax(1).to(best.dtype)
            settled.append((best[part] >= values[:, -1:] + largest[part]).all(1))
        rows = rows[~torch.cat(settled)] if size < emission.vocab_size else rows[:0]
        size *= 4
    return best


def scaled_logits(
    logits: torch.Tensor, temperature: float, forbidden: torch.Tensor | None
) -> torch.Tensor:
    """Logits over the temperature, in float32 at least, -inf for forbidden tokens."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if forbidden is not None:
        logits = logits.masked_fill(forbidden, -torch.inf)
    return logits if temperature == 1 else logits / temperature


def log_softmax(x: torch.Tensor) -> torch.Tensor:
    """`log_softmax` over the last axis; a row that is -inf throughout stays so, not NaN."""
    impossible = x.detach().amax(-1, keepdim=True) == -torch.inf
    if not bool(impossible.any()):
        return x.log_softmax(-1)
    return x.masked_fill(impossible, 0).log_softmax(-1).masked_fill(impossible, -torch.inf)


def slice_size(device: torch.device) -> int:
    """Numbers that are worked on at once on a device."""
    return SLICE_IN_CACHE if device.type == "cpu" else SLICE_ON_DEVICE


def forbidden_tokens(
    vocab_size: int,
    mask_token_id: int | None,
    forbidden_token_ids: Sequence[int] | None,
    device: torch.device,
) -> torch.Tensor | None:
    """`[vocab]` bool, True for tokens that are never generated; None if there are none."""
    ids = [i for i in (mask_token_id, *(forbidden_token_ids or ())) if i is not None]
    if not ids:
        return None
    forbidden = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    return forbidden.index_fill(0, torch.tensor(ids, device=device), True)


def without_tokens(
    logits: torch.Tensor, mask_token_id: int | None, forbidden_token_ids: Sequence[int] | None
) -> torch.Tensor:
    """Logits `[..., vocab]` that rule out the tokens of `forbidden_tokens`."""
    ids = mask_token_id, forbidden_token_ids
    forbidden = forbidden_tokens(logits.shape[-1], *ids, logits.device)
    return logits if forbidden is None else logits.masked_fill(forbidden, -torch.inf)
