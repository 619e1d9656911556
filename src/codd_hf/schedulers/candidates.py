"""What candidates are drawn from and ranked by: the reading of a model's output under settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..checks.arguments import RowError
from ..circuits import CoupledCategorical
from ..circuits.factorized import without_tokens
from ..circuits.numerics import sure_of, sure_where
from ..circuits.random import Generators, draw_categorical, uniform
from .settings import DrawSettings


class Confidence(NamedTuple):
    """How sure a model is of tokens. Most strategies ask for few numbers, so nothing is made early.

    Attributes:
        of: maps tokens `[batch, length]` to their probabilities `[batch, length]`.
        law: gives all probabilities `[batch, length, vocab]`.
        log_joint: maps tokens `[batch, length]` and sets of positions `[n, batch, length]` (bool)
            to the exact log-probabilities `[n, batch]` of the tokens in each set together.
    """

    of: Callable[[torch.Tensor], torch.Tensor]
    law: Callable[[], torch.Tensor]
    log_joint: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    @classmethod
    def factorized(cls, log_law: Callable[[], torch.Tensor]) -> Confidence:
        """Reads everything off the laws of single positions, given by their logarithms."""

        def log_of(tokens: torch.Tensor) -> torch.Tensor:
            return log_law().gather(-1, tokens[..., None])[..., 0]

        def log_joint(tokens: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
            return torch.where(sets, log_of(tokens), 0).sum(-1)

        return cls(lambda tokens: log_of(tokens).exp(), lambda: log_law().exp(), log_joint)


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


@dataclass
class CoupledWindows:
    """A coupled distribution over the windows of some rows, those of a row in succession.

    The circuit is applied where the settings activate it and where it shares a completion with
    the backbone.

    Attributes:
        sharpened: at the settings' evidence temperature: what tokens are drawn from.
        plain: at evidence temperature 1: what confidence is read from.
        batch: the number of rows.
        fallback: `[batch]` bool, rows with a window in which circuit and backbone exclude each
            other.
    """

    sharpened: CoupledCategorical
    plain: CoupledCategorical
    batch: int
    fallback: torch.Tensor

    @classmethod
    def of(
        cls,
        distribution: CoupledCategorical,
        sample: torch.Tensor,
        settings: DrawSettings,
    ) -> CoupledWindows:
        """Applies the settings to a distribution.

        Args:
            distribution: over `batch * W` windows of `L` positions.
            sample: `[batch, W * L]`, the windows' tokens.
            settings: what shapes the draw.

        Raises:
            ValueError: `sample` does not fit the windows.
        """
        (num_windows,), (window_length,) = distribution.batch_shape, distribution.event_shape
        batch, length = sample.shape
        if num_windows * window_length != batch * length or length % window_length:
            raise ValueError(
                f"`sample` must hold the tokens of {num_windows} windows of {window_length}, the "
                f"windows of a row in succession, got shape {tuple(sample.shape)}."
            )
        if settings.forbidden_token_ids:
            ids = torch.tensor(settings.forbidden_token_ids, device=sample.device)
            distribution = distribution.without(ids)
        active = distribution.active & (_mask_ratio(distribution) <= settings.activation_ratio)
        if settings.sampling == "factorized":
            active = torch.zeros_like(active)
        if not torch.equal(active, distribution.active):
            distribution = distribution.with_active(active)
        plain = distribution.with_temperature(1.0)
        sharpened = distribution.with_temperature(settings.evidence_temperature)
        fallback = torch.zeros_like(active)
        if bool(active.any()):
            if plain is not sharpened:
                plain.filter_with(sharpened)
            impossible = sharpened.log_partition.isneginf() | plain.log_partition.isneginf()
            fallback = active & impossible
            if bool(fallback.any()):
                plain = plain.with_active(active & ~fallback)
                sharpened = sharpened.with_active(active & ~fallback)
        return cls(sharpened, plain, batch, fallback.view(batch, -1).any(-1))

    @property
    def masked(self) -> torch.Tensor:
        """`[batch, length]` bool."""
        return self.plain.masked.view(self.batch, -1)

    def windows(self, of_rows: torch.Tensor) -> torch.Tensor:
        """`[*S, batch * W, L]` of `[*S, batch, length]`."""
        return of_rows.reshape(*of_rows.shape[:-2], *self.plain.masked.shape)

    def rows(self, of_windows: torch.Tensor) -> torch.Tensor:
        """`[batch, length, ...]` of `[batch * W, L, ...]`."""
        return of_windows.reshape(*self.masked.shape, *of_windows.shape[2:])

    def read(self, settings: DrawSettings, generator: Generators = None) -> CandidateSource:
        """Reads laws from which the candidates of all positions are drawn independently.

        Args:
            settings: `sampling` counts.
            generator: one for all, or one per row, for the latents.
        """
        sharpened, plain = self.sharpened, self.plain
        drawn = settings.sampling == "latent" and not settings.is_greedy
        per_window = self._per_window(generator) if drawn else None
        latents = None
        if not bool(plain.active.any()):
            log_probs = sharpened.factorized_logits
            if drawn and plain.potentials.num_latents > 1:
                # A row uses up the same numbers whether or not others of its batch are coupled.
                num_windows, length = self.plain.masked.shape
                uniform((num_windows, 1, length), per_window, self.masked.device)
            confidence = Confidence.factorized(lambda: self.rows(plain.factorized_logits))
            return CandidateSource(self.masked, self.rows(log_probs), confidence, self.fallback)
        if drawn:
            latents = sharpened.sample_latents(per_window)
        elif settings.sampling == "latent":
            latents = sharpened.best_latents()
        elif settings.sampling == "viterbi":
            latents = sharpened.viterbi().latents
        log_probs = (
            sharpened.marginals.log() if latents is None else sharpened.logits_given(latents)
        )

        def log_joint(tokens: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
            log_prob = plain.partial_log_prob(self.windows(tokens), self.windows(sets))
            return log_prob.unflatten(-1, (self.batch, -1)).sum(-1)

        confidence = Confidence(
            lambda tokens: self.rows(plain.marginal_probs_of(self.windows(tokens))),
            lambda: self.rows(plain.marginals),
            log_joint,
        )
        return CandidateSource(self.masked, self.rows(log_probs), confidence, self.fallback)

    def _per_window(self, generator: Generators) -> Generators:
        """Each row's generator for each of its windows."""
        if generator is None or isinstance(generator, torch.Generator):
            return generator
        per_row = len(self.plain.masked) // self.batch
        return [row_generator for row_generator in generator for _ in range(per_row)]


def read_logits(
    logits: torch.Tensor,
    sample: torch.Tensor,
    settings: DrawSettings,
    mask_token_id: int | None,
) -> CandidateSource:
    """Reads plain logits, which are factorized whatever the settings' `sampling` says.

    Args:
        logits: `[batch, length, vocab]`.
        sample: `[batch, length]`, the current tokens.
        settings: what shapes the draw.
        mask_token_id: the mask token, which is never drawn.

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
    logits = without_tokens(logits.float(), mask_token_id, settings.forbidden_token_ids)
    logits = sure_where(~masked, sample, logits, ours=True)
    return CandidateSource(
        masked=masked,
        log_probs=(logits / settings.evidence_temperature).log_softmax(-1),
        confidence=Confidence.factorized(lambda: logits.log_softmax(-1)),
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
        return sure_of(logits.argmax(-1), logits)
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


def draw_tokens(
    scores: torch.Tensor,
    settings: DrawSettings,
    uniforms: torch.Tensor | None,
    rows: torch.Tensor,
    wanted: torch.Tensor | None = None,
    output_logits: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draws tokens, as the settings shape their law.

    Args:
        scores: `[*batch, vocab]` log-probabilities; -inf where a token is impossible.
        settings: temperature, top-k and top-p.
        uniforms: `[*batch]` numbers in [0, 1); None for the most probable tokens.
        rows: `[*batch]`, the row of each, for errors.
        wanted: `[*batch]` bool, where the token counts; default everywhere.
        output_logits: whether what they were drawn from is wanted.

    Returns:
        Tokens `[*batch]`, and the log-probabilities `[*batch, vocab]` that they were drawn from.

    Raises:
        RowError: no token is possible where one is wanted, or a score is NaN or infinite.
    """
    if uniforms is None:
        best, tokens = scores.max(-1)
        undefined = ~best.isfinite()
        shaped = sure_of(tokens, scores) if output_logits else None
    else:
        shaped = shape_logits(
            scores, settings.temperature, top_k=settings.top_k, top_p=settings.top_p
        )
        undefined = shaped[..., 0].isnan()
        tokens = draw_categorical(shaped.exp(), uniforms)
    if wanted is not None:
        undefined = undefined & wanted
    if bool(undefined.any()):
        raise RowError(
            "No token can be drawn in row {row}: `forbidden_token_ids`, `logits_processor` and "
            "what the model never generates leave none, or a logit is NaN or infinite.",
            int(rows[undefined][0]),
        )
    return tokens, shaped


def _mask_ratio(distribution: CoupledCategorical) -> torch.Tensor:
    """The share `[batch * W]` of each window's positions that are masked."""
    masked = distribution.present & ~distribution.observed
    return masked.sum(-1) / distribution.present.sum(-1).clamp(min=1)
