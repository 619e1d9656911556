"""Changes of a head's circuit as a whole: a fitted one taken over, corrected, flattened."""

from __future__ import annotations

import torch

from . import Potentials, fit_tied, token_marginal


class FittedCircuit:
    """`set_potentials`, `set_alpha` and `temper` of a [`CoDDHead`]."""

    @torch.no_grad()
    def set_potentials(
        self, potentials: Potentials, marginal: torch.Tensor | None = None, alpha: float = 1.0
    ) -> None:
        """Takes over a fitted circuit.

        Tied emissions take over the least-squares fit of the logarithms.

        Args:
            potentials: a normalised circuit, before any correction.
            marginal: its token marginal `u`, `[V]` or `[L, V]`; computed from it if not given.
            alpha: the emissions are divided by `u ** alpha`.
        """
        tied = self.config.emission == "tied"
        embedding = self.output_embedding if tied else None
        if marginal is None:
            marginal = token_marginal(potentials, self.config.window_length)
        if marginal.ndim > self.token_marginal.ndim:
            marginal = marginal.mean(0)
        corrected = potentials.scaled_by_marginal(marginal.log(), -alpha)
        self.token_marginal.copy_(marginal)
        self.config.alpha = alpha
        self.initial.copy_(corrected.initial)
        _copy(self.transition, corrected.transition.log_potential)
        if tied:
            emission, rank = corrected.emission.dense()[0], self.config.emission_rank
            fitted = fit_tied(emission, embedding, marginal, rank)
            parts = self.emission_latents, self.emission_projection, self.emission_bias
            for parameter, value in zip(parts, fitted, strict=True):
                parameter.copy_(value)
        else:
            _copy(self.emission, corrected.emission.dense())

    @torch.no_grad()
    def set_alpha(self, alpha: float) -> None:
        """Changes the power of the marginal correction (0 gives the raw product back)."""
        shift = (self.config.alpha - alpha) * self.token_marginal.log()
        if self.config.tie_emissions:
            shift = shift.reshape(-1, shift.shape[-1])[0]
        if self.config.emission == "tied":
            self.emission_bias.add_(shift)
        else:
            self.emission.add_(shift if shift.ndim == 1 else shift[:, None])
        self.config.alpha = alpha

    @torch.no_grad()
    def temper(self, emission_power: float, transition_power: float) -> None:
        """Flattens the circuit: its emissions and its transitions to a power below 1.

        The backbone has already seen the observed tokens, whose dependencies a static circuit
        counts again; flattening gives some of that back at low mask ratios. Transitions and the
        initial law are normalised again, emissions are not (they are ratios).
        """
        tied = self.config.emission == "tied"
        for parameter in (self.emission_latents, self.emission_bias) if tied else (self.emission,):
            parameter.mul_(emission_power)
        for parameter in (self.initial, self.transition):
            parameter.copy_((parameter * transition_power).log_softmax(-1))


def _copy(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copies a value with a leading axis for positions into a parameter with or without one."""
    parameter.copy_(value.expand(parameter.shape) if value.ndim == parameter.ndim else value[0])
