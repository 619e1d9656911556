"""What tokens are drawn from and ranked by: a coupled distribution under a call's settings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..circuits import CoupledCategorical
from ..circuits.factorized import trivial_potentials, without_tokens
from ..circuits.random import Generators, uniform
from .settings import DrawSettings


@dataclass
class CoupledWindows:
    """A coupled distribution over the windows of some rows, those of a row in succession.

    The circuit is applied where the settings activate it and where it shares a completion with
    the backbone.

    Attributes:
        sharpened: at the settings' evidence temperature; tokens are drawn from it.
        plain: at evidence temperature 1; confidence is read from it, since a sharpened
            distribution saturates and cannot rank.
        batch: the number of rows.
        fallback: `[batch]` bool, rows with a window in which circuit and backbone exclude each
            other.
        is_coupled: whether the circuit is applied anywhere.
    """

    sharpened: CoupledCategorical
    plain: CoupledCategorical
    batch: int
    fallback: torch.Tensor
    is_coupled: bool

    @classmethod
    def of(
        cls, distribution: CoupledCategorical, sample: torch.Tensor, settings: DrawSettings
    ) -> CoupledWindows:
        """Applies the settings to a distribution over `batch * W` windows of `L` positions.

        Args:
            distribution: made at the head's evidence temperature.
            sample: `[batch, W * L]`, the windows' tokens.
            settings: of the call.

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
        ratio = distribution.masked.sum(-1) / distribution.present.sum(-1).clamp(min=1)
        coupled = settings.sampling != "factorized"
        active = distribution.active & (ratio <= settings.activation_ratio) & coupled
        if not torch.equal(active, distribution.active):
            distribution = distribution.with_active(active)
        temperature = settings.evidence_temperature
        if temperature is None:  # a head's own says nothing where it is left out
            temperature = distribution.temperature if coupled else 1.0
        plain = distribution.with_temperature(1.0)
        sharpened = distribution.with_temperature(temperature)
        fallback = torch.zeros_like(active)
        if bool(active.any()):
            if plain is not sharpened:
                plain.filter_with(sharpened)
            impossible = sharpened.log_partition.isneginf() | plain.log_partition.isneginf()
            fallback, active = active & impossible, active & ~impossible
            if bool(fallback.any()):
                plain, sharpened = plain.with_active(active), sharpened.with_active(active)
        fallback = fallback.view(batch, -1).any(-1)
        return cls(sharpened, plain, batch, fallback, bool(active.any()))

    @property
    def masked(self) -> torch.Tensor:
        """`[batch, length]` bool."""
        return self.plain.masked.view(self.batch, -1)

    def split(self, of_rows: torch.Tensor) -> torch.Tensor:
        """`[*S, batch * W, L]` of `[*S, batch, length]`."""
        return of_rows.reshape(*of_rows.shape[:-2], *self.plain.masked.shape)

    def join(self, of_windows: torch.Tensor) -> torch.Tensor:
        """`[batch, length, ...]` of `[batch * W, L, ...]`."""
        return of_windows.reshape(*self.masked.shape, *of_windows.shape[2:])

    def probs(self) -> torch.Tensor:
        """Confidence in every token, `[batch, length, vocab]`."""
        if not self.is_coupled:
            return self.join(self.plain.factorized_logits.exp())
        return self.join(self.plain.marginals)

    def probs_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Confidence in tokens `[batch, length]`."""
        if not self.is_coupled:
            return self._factorized(tokens).exp()
        return self.join(self.plain.marginal_probs_of(self.split(tokens)))

    def log_prob(self, tokens: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
        """`[n, batch]`: of the tokens at each set of positions `[n, batch, length]` together."""
        if not self.is_coupled:
            return torch.where(sets, self._factorized(tokens), 0).sum(-1)
        log_prob = self.plain.partial_log_prob(self.split(tokens), self.split(sets))
        return log_prob.unflatten(-1, (self.batch, -1)).sum(-1)

    def _factorized(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.join(self.plain.factorized_logits)
        return logits.gather(-1, tokens[..., None])[..., 0]

    def candidate_logits(self, settings: DrawSettings, generator: Generators) -> torch.Tensor:
        """`[batch, length, vocab]` log-probabilities from which each candidate is drawn by itself.

        Args:
            settings: `sampling` counts.
            generator: one for all, or one per row, for the latents.
        """
        distribution = self.sharpened
        if settings.sampling == "latent" and not settings.is_greedy:
            number, length = self.plain.masked.shape
            if isinstance(generator, list | tuple):  # a row's for each of its windows
                generator = [g for g in generator for _ in range(number // self.batch)]
            if self.is_coupled:
                latents = distribution.sample_latents(generator)
            elif distribution.potentials.num_latents > 1:
                # A row uses up the same numbers whether or not others of its batch are coupled.
                uniform((number, 1, length), generator, self.masked.device)
        if not self.is_coupled:
            return self.join(distribution.factorized_logits)
        if settings.sampling == "marginal":
            return self.join(distribution.marginals.log())
        if settings.sampling == "viterbi":
            latents = distribution.viterbi().latents
        elif settings.is_greedy:
            latents = distribution.best_latents()
        return self.join(distribution.logits_given(latents))


def of_logits(
    logits: torch.Tensor, sample: torch.Tensor, mask_token_id: int | None
) -> CoupledCategorical:
    """Plain logits `[batch, length, vocab]` as windows without a circuit, one a row.

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
    return CoupledCategorical(
        without_tokens(logits.float(), mask_token_id, None),
        trivial_potentials(logits.shape[-1], logits.device),
        tokens=sample,
        observed=sample != mask_token_id,
        active=torch.zeros(len(sample), dtype=torch.bool, device=logits.device),
    )
