"""The CoDD head: a circuit over a window of tokens, alone."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from .circuits import CoupledCategorical, Potentials, token_marginal
from .configuration_codd import CoDDHeadConfig


class CoDDHead(PreTrainedModel):
    """A circuit over a window of tokens: the small artifact that people train and share.

    Parameters are log-potentials in float32, whatever the backbone's dtype: `initial [H]`,
    `transition [H, H]` (or `[L-1, H, H]`), `emission [H, V]` (or `[L, H, V]`). The buffer
    `token_marginal [V]` (or `[L, V]`) is the unigram distribution that `config.alpha` refers to.

    A new head changes nothing: its potentials are constant, so the coupled distribution is the
    factorized one.
    """

    config_class = CoDDHeadConfig
    base_model_prefix = "codd_head"
    main_input_name = "logits"
    _keep_in_fp32_modules_strict = ["initial", "transition", "emission", "token_marginal"]  # noqa: RUF012

    def __init__(self, config: CoDDHeadConfig):
        super().__init__(config)
        latents, vocab, length = config.num_latents, config.vocab_size, config.window_length
        steps = () if config.tie_transitions else (max(length - 1, 1),)
        positions = () if config.tie_emissions else (length,)
        self.initial = nn.Parameter(torch.empty(latents))
        self.transition = nn.Parameter(torch.empty(*steps, latents, latents))
        self.emission = nn.Parameter(torch.empty(*positions, latents, vocab))
        tied = config.tie_transitions and config.tie_emissions
        self.register_buffer("token_marginal", torch.empty(*(() if tied else (length,)), vocab))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            for parameter in (self.initial, self.transition):
                nn.init.constant_(parameter, -torch.tensor(self.config.num_latents).log().item())
            nn.init.zeros_(self.emission)
            nn.init.constant_(self.token_marginal, 1 / self.config.vocab_size)

    @property
    def potentials(self) -> Potentials:
        """The circuit; gradients flow to the parameters."""

        def with_positions(parameter: torch.Tensor, tied: bool) -> torch.Tensor:
            return parameter[None] if tied else parameter

        return Potentials(
            self.initial,
            with_positions(self.transition, self.config.tie_transitions),
            with_positions(self.emission, self.config.tie_emissions),
        )

    @torch.no_grad()
    def set_potentials(
        self, potentials: Potentials, marginal: torch.Tensor | None = None, alpha: float = 1.0
    ) -> None:
        """Takes over a fitted circuit.

        Args:
            potentials: a normalised circuit, before any correction.
            marginal: its token marginal `u`, `[V]` or `[L, V]`; computed from it if not given.
            alpha: the emissions are divided by `u ** alpha`.
        """
        if marginal is None:
            marginal = token_marginal(potentials, self.config.window_length)
        corrected = potentials.scaled_by_marginal(marginal.log(), -alpha)
        self.token_marginal.copy_(marginal)
        self.config.alpha = alpha
        for parameter, value in (
            (self.initial, corrected.initial),
            (self.transition, corrected.transition),
            (self.emission, corrected.emission),
        ):
            parameter.copy_(
                value.expand(parameter.shape) if value.ndim == parameter.ndim else value[0]
            )

    @torch.no_grad()
    def set_alpha(self, alpha: float) -> None:
        """Changes the power of the marginal correction (0 gives the raw product back)."""
        shifted = self.potentials.scaled_by_marginal(
            self.token_marginal.log(), self.config.alpha - alpha
        )
        self.emission.copy_(shifted.emission[0] if self.config.tie_emissions else shifted.emission)
        self.config.alpha = alpha

    @torch.no_grad()
    def temper(self, emission_power: float, transition_power: float) -> None:
        """Flattens the circuit: its emissions and its transitions to a power below 1.

        The backbone has already seen the observed tokens, whose dependencies a static circuit
        counts again; flattening gives some of that back at low mask ratios. Transitions and the
        initial law are normalised again, emissions are not (they are ratios).
        """
        self.emission.mul_(emission_power)
        for parameter in (self.initial, self.transition):
            parameter.copy_((parameter * transition_power).log_softmax(-1))

    def forward(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor | None = None,
        observed: torch.Tensor | None = None,
        last_hidden_state: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
        temperature: float = 1.0,
        active: torch.Tensor | None = None,
    ) -> CoupledCategorical:
        """The coupled distribution over a window.

        Args:
            logits: `[batch, L, vocab]`, the backbone's; used at masked positions.
            tokens: `[batch, L]`, used where `observed`.
            observed: `[batch, L]` bool, True where the position is given by `tokens`.
            last_hidden_state: `[batch, L, hidden]`; unused by a head without conditioning.
            present: `[batch, L]` bool, False where there is no such position.
            temperature: the evidence temperature.
            active: `[batch]` bool, False for rows that are to stay factorized.

        Raises:
            ValueError: shapes do not fit, or an observed token is outside the vocabulary.
        """
        return CoupledCategorical(
            logits,
            self.potentials,
            tokens=tokens,
            observed=observed,
            present=present,
            active=active,
            temperature=temperature,
            forbidden=forbidden_tokens(
                self.config.vocab_size,
                self.config.mask_token_id,
                self.config.forbidden_token_ids,
                logits.device,
            ),
        )


def forbidden_tokens(
    vocab_size: int,
    mask_token_id: int | None,
    forbidden_token_ids: list[int] | None,
    device: torch.device,
) -> torch.Tensor | None:
    """`[vocab]` bool, True for tokens that are never generated; None if there are none."""
    ids = [*(forbidden_token_ids or [])] + ([] if mask_token_id is None else [mask_token_id])
    if not ids:
        return None
    forbidden = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    forbidden[ids] = True
    return forbidden


def trivial_potentials(vocab_size: int, device: torch.device) -> Potentials:
    """A circuit of one state that changes nothing."""
    zero = torch.zeros(1, device=device)
    return Potentials(zero, zero[None, None], zero[None, None].expand(1, 1, vocab_size))
