"""What candidates are drawn from and ranked by: the reading of a model's output under settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..circuits import CoupledCategorical
from ..circuits.random import Generators, uniform
from .settings import DrawSettings


class Confidence(NamedTuple):
    """How sure a model is of tokens. Most strategies ask for few numbers, so nothing is made early.

    Attributes:
        of: maps tokens `[batch, length]` to their probabilities `[batch, length]`.
        law: gives all probabilities `[batch, length, vocab]`.
    """

    of: Callable[[torch.Tensor], torch.Tensor]
    law: Callable[[], torch.Tensor]

    @classmethod
    def from_law(cls, law: Callable[[], torch.Tensor]) -> Confidence:
        """Reads single probabilities off the whole law."""
        return cls(lambda tokens: law().gather(-1, tokens[..., None])[..., 0], law)


class CandidateSource(NamedTuple):
    """What one step reads from a model's output.

    Attributes:
        masked: `[batch, length]` bool, the positions that have no token yet.
        log_probs: `[batch, length, vocab]`, what candidates are drawn from, before temperature.
        confidence: probabilities at evidence temperature 1.
        fallback: `[batch]` bool, rows in which a window had to be left factorized.
    """

    masked: torch.Tensor
    log_probs: torch.Tensor
    confidence: Confidence
    fallback: torch.Tensor


def read_distribution(
    distribution: CoupledCategorical,
    sample: torch.Tensor,
    settings: DrawSettings,
    generator: Generators = None,
    mask_ratio: torch.Tensor | None = None,
) -> CandidateSource:
    """Reads a coupled distribution over windows, those of a row in succession.

    Args:
        distribution: over `batch * W` windows of `L` positions.
        sample: `[batch, W * L]`, the windows' tokens.
        settings: what shapes the draw.
        generator: one for all, or one per row of `sample`, for the latents.
        mask_ratio: `[batch]`, each row's, for `activation_scope="row"`; default that of `sample`.

    Raises:
        ValueError: `sample` or `generator` does not fit the windows.
    """
    (num_windows,), (window_length,) = distribution.batch_shape, distribution.event_shape
    batch, length = sample.shape
    if num_windows * window_length != batch * length or length % window_length:
        raise ValueError(
            f"`sample` must hold the tokens of {num_windows} windows of {window_length}, the "
            f"windows of a row in succession, got shape {tuple(sample.shape)}."
        )
    per_row = length // window_length

    shape = (batch, length, -1)
    active = _active_windows(distribution, batch, settings, mask_ratio)
    fallback = torch.zeros_like(distribution.active)
    if settings.sampling == "factorized" or not bool(active.any()):
        sharpened = distribution.with_temperature(settings.evidence_temperature)
        plain = distribution.with_temperature(1.0)
        log_probs = sharpened.factorized_logits
        if settings.sampling == "latent" and distribution.potentials.num_latents > 1:
            # A row uses up the same numbers whether or not others of its batch are coupled.
            numbers = (num_windows, 1, window_length)
            uniform(numbers, _per_window(generator, batch, per_row), sample.device)
        confidence = Confidence.from_law(lambda: plain.factorized_logits.exp().reshape(shape))
    else:
        if not bool(active.all()):
            distribution = distribution.with_active(active)
        plain = distribution.with_temperature(1.0)
        sharpened = distribution.with_temperature(settings.evidence_temperature)
        impossible = sharpened.log_partition.isneginf()
        if settings.confidence != "latent":
            impossible = impossible | plain.log_partition.isneginf()
        fallback = active & impossible
        if bool(fallback.any()):
            plain = plain.with_active(active & ~fallback)
            sharpened = sharpened.with_active(active & ~fallback)
        if settings.sampling == "latent":
            latents = sharpened.sample_latents(_per_window(generator, batch, per_row))
            log_probs = sharpened.logits_given(latents)
        else:
            log_probs = sharpened.marginals.log()
        if settings.confidence == "latent":
            same = plain is sharpened
            confidence = Confidence.from_law(
                lambda: (log_probs if same else plain.logits_given(latents)).exp().reshape(shape)
            )
        else:
            windows = (num_windows, window_length)
            confidence = Confidence(
                lambda tokens: plain.marginal_probs_of(tokens.reshape(windows)).view(batch, length),
                lambda: plain.marginals.reshape(shape),
            )
    return CandidateSource(
        masked=(distribution.present & ~distribution.observed).view(batch, length),
        log_probs=log_probs.reshape(shape),
        confidence=confidence,
        fallback=fallback.view(batch, per_row).any(-1),
    )


def read_logits(
    logits: torch.Tensor,
    sample: torch.Tensor,
    settings: DrawSettings,
    mask_token_id: int | None,
    forbidden_token_ids: Sequence[int] = (),
) -> CandidateSource:
    """Reads plain logits, which are factorized whatever the settings' `sampling` says.

    Args:
        logits: `[batch, length, vocab]`.
        sample: `[batch, length]`, the current tokens.
        settings: what shapes the draw.
        mask_token_id: the mask token.
        forbidden_token_ids: tokens that are never drawn, besides the mask token.

    Raises:
        ValueError: the shapes do not fit, or the mask token is None.
    """
    if logits.ndim != 3 or logits.shape[:2] != sample.shape:
        raise ValueError(
            f"`model_output` must be a CoupledCategorical or logits [batch, length, vocab] for a "
            f"`sample` of shape {tuple(sample.shape)}, got shape {tuple(logits.shape)}."
        )
    if mask_token_id is None:
        raise ValueError(
            "`mask_token_id` must be given here or in the scheduler's config to step with logits."
        )
    masked = sample == mask_token_id
    never = torch.tensor([mask_token_id, *forbidden_token_ids], device=logits.device)
    logits = logits.float().index_fill(-1, never, -torch.inf)
    known = torch.full_like(logits, -torch.inf).scatter(-1, sample[..., None], 0.0)
    logits = torch.where(masked[..., None], logits, known)
    return CandidateSource(
        masked=masked,
        log_probs=(logits / settings.evidence_temperature).log_softmax(-1),
        confidence=Confidence.from_law(lambda: logits.softmax(-1)),
        fallback=masked.new_zeros(len(sample)),
    )


def shape_logits(
    logits: torch.Tensor,
    temperature: float,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """Log-probabilities after temperature, then top-k, then top-p.

    Args:
        logits: `[..., vocab]`; -inf where a token is impossible.
        temperature: divides the logits; 0 leaves the most probable token alone.
        top_k: how many tokens stay; 0 or None: all.
        top_p: the fewest tokens whose probabilities reach it stay; 1 or None: all.

    Returns:
        `[..., vocab]`, normalised; -inf where a token cannot be drawn.
    """
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    logits = (logits / temperature).log_softmax(-1)
    limited = top_k is not None and 0 < top_k < logits.shape[-1]
    nucleus = top_p is not None and top_p < 1
    if not (limited or nucleus):
        return logits
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    if limited:
        ordered[..., top_k:] = -torch.inf
    if nucleus:
        probability = ordered.softmax(-1)
        reached_before = probability.cumsum(-1) - probability >= top_p
        reached_before[..., 0] = False
        ordered = ordered.masked_fill(reached_before, -torch.inf)
    return torch.empty_like(logits).scatter(-1, index, ordered).log_softmax(-1)


def _active_windows(
    distribution: CoupledCategorical,
    batch: int,
    settings: DrawSettings,
    mask_ratio: torch.Tensor | None,
) -> torch.Tensor:
    """The windows `[batch * W]` in which the circuit is applied at the current mask ratio."""
    masked = distribution.present & ~distribution.observed
    num_masked, num_present = masked.sum(-1), distribution.present.sum(-1)
    if settings.activation_scope == "row":
        if mask_ratio is None:
            mask_ratio = num_masked.view(batch, -1).sum(-1) / num_present.view(batch, -1).sum(-1)
        ratio = mask_ratio.repeat_interleave(len(masked) // batch)
    else:
        ratio = num_masked / num_present.clamp(min=1)
    return distribution.active & (ratio <= settings.activation_ratio)


def _per_window(generator: Generators, batch: int, per_row: int) -> Generators:
    """Each row's generator for each of its windows."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if len(generator) != batch:
        raise ValueError(
            f"`generator` must have one entry per row ({batch}), got {len(generator)} generators."
        )
    return [row_generator for row_generator in generator for _ in range(per_row)]
