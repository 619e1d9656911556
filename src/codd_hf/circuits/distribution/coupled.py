"""The coupled distribution: a factorized prediction times a circuit, normalised exactly."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from inspect import signature
from typing import Any, ClassVar, NamedTuple

import torch
from torch.distributions import Distribution

from ...checks.arguments import as_tensor, check_tokens, factor, integer, shown
from ..context.maps import Context
from ..evidence.dense import DenseEvidence
from ..evidence.lists import ListedEvidence
from ..potentials.circuit import DenseEmission, Potentials, StepTransitions
from ..potentials.groups import TokenGroups
from ..random import Generators, draw_categorical, uniform
from .latents import Latents


class ViterbiPath(NamedTuple):
    """The most probable tokens `[B, L]` and latents `[B, L]`, and the log-probability `[B]`."""

    tokens: torch.Tensor
    latents: torch.Tensor
    log_prob: torch.Tensor


class CoupledCategorical(Distribution):
    r"""A joint distribution over the masked tokens of a window (CoDD, arXiv 2603.00045).

        p(x_M | x_O) = p_w(x_M, x_O) \prod_{i in M} phi_i(x_i) / Z

    `phi_i` is the backbone's prediction and `p_w` a hidden Markov model. Everything here is exact,
    at a cost of one forward recursion over latents (and a backward one for the distributions of
    single positions). It stands where `Independent(Categorical(logits=logits), 1)` would.

    Args:
        logits: `[B, L, V]`, the backbone's logits, of any floating dtype; used at masked positions.
            Or evidence, [`ListedEvidence`] or [`DenseEvidence`], made at this `temperature`.
        potentials: the circuit, over the same `V` and `L`.
        tokens: `[B, L]`, the window's tokens; needed where `observed`.
        observed: `[B, L]` bool, True where the position is given by `tokens`; default none.
        present: `[B, L]` bool, False where there is no such position (padding, past the end);
            default all. An absent position is skipped, not summed over.
        context: what the backbone says about the latents; a tensor `[B, L, H]` is the log of a
            factor on them; default none.
        active: `[B]` bool, False for rows that are to stay factorized; default all.
        temperature: the evidence temperature, which divides the logits.
        forbidden: `[V]` bool, tokens that get zero potential at masked positions.
        top_k: read logits by so many of their likeliest tokens, the others' mass spread by
            `potentials.log_marginal` within groups; 0 reads all, exactly.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: shapes do not fit, a number is out of range, or a logit is NaN.
    """

    arg_constraints: ClassVar[dict] = {}
    support = torch.distributions.constraints.independent(
        torch.distributions.constraints.nonnegative_integer, 1
    )

    def __init__(
        self,
        logits: torch.Tensor | DenseEvidence | ListedEvidence,
        potentials: Potentials,
        tokens: torch.Tensor | None = None,
        observed: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
        context: Context | torch.Tensor | None = None,
        active: torch.Tensor | None = None,
        temperature: float = 1.0,
        forbidden: torch.Tensor | None = None,
        top_k: int = 0,
    ) -> None:
        if not isinstance(logits, DenseEvidence | ListedEvidence):
            logits = as_tensor("logits", logits, float)
        self.logits, self.potentials = logits, potentials
        self.temperature = factor("temperature", temperature)
        self.top_k = integer("top_k", top_k, least=0)
        shape, device = self._checked_shape(), logits.device
        super().__init__(shape[:1], shape[1:], validate_args=False)

        def mask(name: str, value: torch.Tensor | None, default: bool, axes: int = 2):
            value = torch.full(shape[:axes], default, device=device) if value is None else value
            return as_tensor(name, value, bool, shape[:axes], device)

        self.present = mask("present", present, True)
        self.active = mask("active", active, True, axes=1)
        self.observed = mask("observed", observed, False) & self.present
        self.masked = self.present & ~self.observed
        if tokens is None and bool(self.observed.any()):
            raise ValueError("`tokens` must be given where `observed` is True.")
        tokens = torch.zeros(shape, dtype=torch.long, device=device) if tokens is None else tokens
        self.tokens = torch.where(self.observed, as_tensor("tokens", tokens, int, shape, device), 0)
        check_tokens("tokens", self.tokens, potentials.vocab_size)
        self.context = context if isinstance(context, Context) else Context(context)
        if (latent := self.context.latent) is not None:
            size = (*shape, potentials.num_latents)
            latent = as_tensor("context", latent, float, size, device)
            self.context = replace(self.context, latent=latent)
        if forbidden is not None:
            size = (potentials.vocab_size,)
            forbidden = as_tensor("forbidden", forbidden, bool, size, device)
        self.forbidden = forbidden

    def _checked_shape(self) -> torch.Size:
        """`[B, L]`, once logits and potentials fit together."""
        logits, potentials = self.logits, self.potentials
        if not isinstance(potentials, Potentials):
            raise TypeError(f"`potentials` must be Potentials, got {shown(potentials)}.")
        vocab, shape = potentials.vocab_size, logits.shape
        if len(shape) != 3 or shape[-1] not in (vocab, -1):
            raise ValueError(
                f"`logits` must have shape [batch, length, {vocab}], got {tuple(shape)}."
            )
        made_at = getattr(logits, "temperature", self.temperature)
        if made_at != self.temperature:
            raise ValueError(
                f"`logits` is evidence computed at temperature {made_at}, so that `temperature` "
                f"cannot be {self.temperature}: compute the evidence again."
            )
        unspread = bool(self.top_k)
        if isinstance(logits, ListedEvidence):
            unspread = logits.groups is None
        if unspread and potentials.log_marginal is None:
            raise ValueError(
                "There is no distribution by which the mass of tokens that are not listed is "
                "spread: give the potentials a `log_marginal`."
            )
        steps, positions = potentials.transition.num_steps, potentials.emission.num_positions
        if 1 < steps < shape[1] - 1 or 1 < positions < shape[1]:
            raise ValueError(
                f"`logits` cover {shape[1]} positions, but the circuit has {steps} untied "
                f"transitions and {positions} untied emissions."
            )
        return torch.Size(shape[:2])

    @cached_property
    def prediction(self) -> DenseEvidence | ListedEvidence:
        """The backbone's prediction without the circuit."""
        prediction, potentials = self.logits, self.potentials
        if isinstance(prediction, torch.Tensor):
            how = self.temperature, self.forbidden
            logits = prediction.to(torch.promote_types(potentials.emission.dtype, torch.float32))
            if not self.top_k:
                return DenseEvidence.from_logits(logits, *how)
            return ListedEvidence.from_logits(logits, self.top_k, *how, potentials.groups)
        if isinstance(prediction, DenseEvidence) or prediction.groups is not None:
            return prediction
        assert potentials.log_marginal is not None
        groups = TokenGroups(potentials.log_marginal, emission=potentials.emission)
        return prediction.spread(groups, self.forbidden)

    @cached_property
    def latents(self) -> Latents:
        """The distribution of the latents, on which all queries rest."""
        return Latents(
            self.potentials,
            self.prediction,
            self.tokens,
            self.masked,
            None if bool(self.present.all()) else self.present,
            self.active,
            self.context,
        )

    @property
    def log_partition(self) -> torch.Tensor:
        """`[B]` log Z; -inf where the circuit and the backbone share no completion."""
        return self.latents.filter.log_partition

    @property
    def latent_posterior(self) -> torch.Tensor:
        """`[B, L, H + J]`: the distribution of each latent, copy states last; zeros if absent."""
        return self.latents.posterior

    @cached_property
    def factorized_logits(self) -> torch.Tensor:
        """`[B, L, V]` log-probabilities without the circuit; one-hot at observed positions."""
        log_probs = self.prediction.dense()
        # The caller's own evidence is not changed.
        is_given = isinstance(self.logits, DenseEvidence)
        return self.latents.pinned(log_probs.clone() if is_given else log_probs)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Log-probability `[*S, B]` of tokens `[*S, B, L]`; -inf where it is zero.

        Observed positions must agree with the given tokens, absent ones are ignored.

        Raises:
            ValueError: `Z` is zero for a row, or a token is outside the vocabulary.
        """
        value = self._checked(value)
        token = self.prediction.log_prob_of(value).masked_fill(~self.masked, 0)
        agrees = ((value == self.tokens) | ~self.observed).all(-1)
        return torch.where(agrees, self.coupling_gain(value) + token.sum(-1), -torch.inf)

    def coupling_gain(self, value: torch.Tensor) -> torch.Tensor:
        """`log p_w(x) - log Z`, `[*S, B]`: what the circuit adds to the factorized log-likelihood.

        Raises as `log_prob` does.
        """
        evidence = self.latents.hard_evidence(self._checked(value))
        return torch.where(self.active, self._log_share(evidence), 0)

    def partial_log_prob(self, value: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[*S, B]` of tokens `[B, L]` at the masked positions that are `known`.

        These are `[*S, B, L]` bool; all others are summed out, in one recursion for all sets.
        """
        shape, device = self.tokens.shape, self.tokens.device
        known = as_tensor("known", known, bool, device=device)
        as_tensor("known", known, shape=(*known.shape[:-2], *shape))
        value = as_tensor("value", value, int, shape, device)
        value = self._checked(torch.where(known.reshape(-1, *shape).any(0), value, 0))
        hard = self.latents.hard_evidence(value)
        evidence = torch.where((known & self.masked)[..., None], hard, self.latents.evidence)
        token = torch.where(known, self.prediction.log_prob_of(value), 0)
        return self._log_share(evidence) + token.sum(-1)

    def _log_share(self, evidence: torch.Tensor) -> torch.Tensor:
        """`[*S, B]`: log of the share of `Z` of the paths with evidence `[*S, B, L, H + J]`."""
        weight = self.latents.log_weight(evidence)
        impossible = (self.active & (self.log_partition == -torch.inf)).nonzero()[:, 0].tolist()
        if impossible:
            raise ValueError(
                f"`log_partition` is -inf for rows {impossible}: the circuit rules out every "
                "completion that the backbone allows; use `with_active` to leave them "
                "factorized, or smooth the potentials."
            )
        return weight - self.log_partition

    @cached_property
    def marginals(self) -> torch.Tensor:
        """`[B, L, V]`: exact marginal probabilities of the tokens, one-hot at observed positions.

        They are the backbone's at absent ones, in inactive rows, and in rows where `Z` is zero.
        """
        at, posterior = self._coupled_positions()
        return self.factorized_logits.exp().index_put(at, self.latents.token_probs(at, posterior))

    def marginal_probs_of(self, value: torch.Tensor) -> torch.Tensor:
        """`[B, L]`: what `marginals` give tokens `[B, L]`, at no cost in the vocabulary."""
        value = self._checked(as_tensor("value", value, int, self.tokens.shape))
        at, posterior = self._coupled_positions()
        probs = self.prediction.log_prob_of(value).exp()
        probs = torch.where(self.observed, (value == self.tokens).to(probs.dtype), probs)
        return probs.index_put(at, self.latents.prob_of(value[at], at, posterior))

    def _coupled_positions(self) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Rows and positions `[N]` where the circuit counts, and the latents' posterior there."""
        coupled = self.active & (self.log_partition > -torch.inf)
        at = (self.masked & coupled[:, None]).nonzero(as_tuple=True)
        return at, self.latent_posterior[at]

    def sample_latents(self, generator: Generators = None) -> torch.Tensor:
        """A joint sample of the latent path, `[B, L]`, one per row."""
        return self.latents.sample((), generator)

    @torch.no_grad()
    def likely_latents(self) -> torch.Tensor:
        """The latent path `[B, L]` of `sample_latents` if the most probable is taken in each draw.

        It costs no more than a sample. The most probable path (`viterbi` has it, with its tokens)
        would take a maximum over pairs of states, and decoded no better.
        """
        return self.latents.own_chain.likely_path(self.latents.filter.messages)

    def logits_given(self, latents: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[*S, B, L, V]` of tokens, independent given the latents `[*S, B, L]`.

        One-hot at observed positions, the backbone's own at absent ones and in inactive rows.
        """
        states = self.potentials.num_latents + self.latents.num_copies
        return self.latents.log_probs_given(self._checked(latents, "latents", states, "states"))

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self, sample_shape: tuple[int, ...] = (), generator: Generators = None
    ) -> torch.Tensor:
        """Exact joint samples `[*sample_shape, B, L]`; observed tokens stay, absent ones are 0.

        Where the circuit and the backbone share no completion, they are the backbone's.

        Raises:
            ValueError: no token is possible at some position.
        """
        if not isinstance(sample_shape, tuple | list):
            raise TypeError(f"`sample_shape` must be a tuple of sizes, got {shown(sample_shape)}.")
        shape = torch.Size(integer("sample_shape", size, least=0) for size in sample_shape)
        self._check_tokens_left()
        log_probs = self.latents.log_probs_given(self.latents.sample(shape, generator))
        batch, length = self.tokens.shape
        numbers = uniform((batch, shape.numel(), length), generator, self.tokens.device)
        numbers = numbers.transpose(0, 1).reshape(log_probs.shape[:-1])
        return torch.where(self.masked, draw_categorical(log_probs.exp(), numbers), self.tokens)

    @torch.no_grad()
    def viterbi(self) -> ViterbiPath:
        """The most probable latents and tokens together (not the mode of the tokens alone).

        Raises as `sample` does.
        """
        self._check_tokens_left()
        best = self.latents.evidence_of_best_tokens()
        latents, log_weight = self.latents.chain(best).best_path()
        tokens = self.latents.log_probs_given(latents).argmax(-1)
        possible = self.log_partition > -torch.inf
        log_prob = torch.where(possible, log_weight - self.log_partition, -torch.inf)
        return ViterbiPath(torch.where(self.masked, tokens, self.tokens), latents, log_prob)

    def condition(self, tokens: torch.Tensor, observed: torch.Tensor) -> CoupledCategorical:
        """The distribution given further tokens `[B, L]` where `observed` `[B, L]`."""
        shape, device = self.tokens.shape, self.tokens.device
        tokens = as_tensor("tokens", tokens, int, shape, device)
        observed = as_tensor("observed", observed, bool, shape, device)
        tokens = torch.where(self.observed, self.tokens, tokens)
        return self._replace(tokens=tokens, observed=self.observed | observed)

    def without(self, token_ids: torch.Tensor) -> CoupledCategorical:
        """The same distribution with no potential for the tokens `token_ids` `[n]`."""
        self._check_logits("no token can be taken out, give `forbidden` when the evidence is made")
        size, device = self.potentials.vocab_size, self.tokens.device
        token_ids = as_tensor("token_ids", token_ids, int, device=device)
        check_tokens("token_ids", token_ids, size)
        never = torch.zeros(size, dtype=torch.bool, device=device)
        never[token_ids] = True
        return self._replace(forbidden=never if self.forbidden is None else never | self.forbidden)

    def with_temperature(self, temperature: float) -> CoupledCategorical:
        """The same distribution at another evidence temperature."""
        temperature = factor("temperature", temperature)
        if temperature == self.temperature:
            return self
        self._check_logits(f"make it again at {temperature}")
        return self._replace(temperature=temperature)

    def with_active(self, active: torch.Tensor) -> CoupledCategorical:
        """The same distribution with the circuit applied in the rows `active` `[B]` only."""
        return self._replace(active=active)

    def _replace(self, **changes: Any) -> CoupledCategorical:
        names = signature(CoupledCategorical).parameters
        return CoupledCategorical(**{name: getattr(self, name) for name in names} | changes)

    def _checked(
        self,
        value: torch.Tensor,
        name: str = "value",
        size: int | None = None,
        what: str = "ids of the vocabulary",
    ) -> torch.Tensor:
        """`[*S, B, L]`, 0 where absent: tokens, or numbers below a size."""
        value = as_tensor(name, value, int, device=self.tokens.device)
        as_tensor(name, value, shape=(*value.shape[:-2], *self.tokens.shape))
        value = torch.where(self.present, value, 0)
        check_tokens(name, value, size or self.potentials.vocab_size, what)
        return value

    def _check_logits(self, remedy: str) -> None:
        """Raises unless there are logits to change."""
        if not isinstance(self.logits, torch.Tensor):
            raise ValueError(
                "The distribution holds evidence in place of logits, computed at temperature "
                f"{self.temperature}: {remedy}."
            )

    def _check_tokens_left(self) -> None:
        """Raises where no token is possible at a masked position."""
        none = (self.masked & (self.prediction.log_probs.amax(-1) == -torch.inf)).nonzero()
        if len(none):
            raise ValueError(
                f"`logits` and `forbidden` leave no token possible in row {int(none[0, 0])}."
            )


def without_circuit(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    observed: torch.Tensor,
    present: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> CoupledCategorical:
    """The factorized distribution over windows; the arguments are `CoupledCategorical`'s."""
    zero = torch.zeros(1, device=logits.device)
    emission = DenseEmission(zero[None, None].expand(1, 1, logits.shape[-1]))
    return CoupledCategorical(
        logits,
        Potentials(zero, StepTransitions(zero[None, None]), emission),  # one state: no change
        tokens=tokens,
        observed=observed,
        present=present,
        active=torch.zeros(len(logits), dtype=torch.bool, device=logits.device),
        temperature=temperature,
    )
