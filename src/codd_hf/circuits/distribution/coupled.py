"""The coupled distribution: a factorized prediction times a circuit, normalised exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.distributions import Distribution

from ...checks.arguments import (
    FACTORS,
    as_tensor,
    check_tokens,
    integer,
    is_factor,
    number,
    several,
    shown,
)
from ..best import best_evidence
from ..context.maps import Context
from ..evidence.dense import DenseEvidence, emission_of_latents
from ..evidence.lists import TopKEvidence
from ..lazy import cached_property
from ..numerics import logsumexp, safe_log, sure_where
from ..potentials import Potentials
from ..random import Generators, draw_categorical, uniform
from ..recursions import chain as chains
from .checks import check_shapes
from .conditionals import Conditionals


class ViterbiPath(NamedTuple):
    """The most probable latents and tokens together.

    Attributes:
        tokens: `[B, L]`.
        latents: `[B, L]`.
        log_prob: `[B]`, log-probability of the pair.
    """

    tokens: torch.Tensor
    latents: torch.Tensor
    log_prob: torch.Tensor


class CoupledCategorical(Conditionals, Distribution):
    r"""A joint distribution over the masked tokens of a window (CoDD, arXiv 2603.00045).

        p(x_M | x_O) = p_w(x_M, x_O) \prod_{i in M} phi_i(x_i) / Z

    `phi_i` is the backbone's prediction and `p_w` a hidden Markov model. Everything here is exact,
    at a cost of one forward recursion over latents (and a backward one where laws of single
    positions are asked for). It stands where `Independent(Categorical(logits=logits), 1)` would.

    Args:
        logits: `[B, L, V]`, the backbone's logits, of any floating dtype; used at masked positions.
            Or the prediction itself, as [`TopKEvidence`] (or [`DenseEvidence`]), made at this
            `temperature`.
        potentials: the circuit, over the same `V` and `L`.
        tokens: `[B, L]`, the window's tokens; needed where `observed`.
        observed: `[B, L]` bool, True where the position is given by `tokens`; default none.
        present: `[B, L]` bool, False where there is no such position (padding, past the end);
            default all. An absent position is skipped, not summed over.
        context: what the backbone says about the latents; a tensor `[B, L, H]` is the log of a
            factor on them at every position; default none.
        active: `[B]` bool, False for rows that are to stay factorized; default all.
        temperature: the evidence temperature, which divides the logits.
        forbidden: `[V]` bool, tokens that get zero potential at masked positions.
        top_k: read logits by so many of their likeliest tokens, the remaining mass spread by
            `potentials.log_marginal`; 0 reads all, exactly.
        grouped: with `top_k`, spread the remaining mass group by group (`GroupedEvidence`).

    Raises:
        ValueError: shapes do not fit, or a logit is NaN.
    """

    arg_constraints: dict = {}  # noqa: RUF012
    support = torch.distributions.constraints.independent(
        torch.distributions.constraints.nonnegative_integer, 1
    )

    def __init__(
        self,
        logits: torch.Tensor | DenseEvidence | TopKEvidence,
        potentials: Potentials,
        tokens: torch.Tensor | None = None,
        observed: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
        context: Context | torch.Tensor | None = None,
        active: torch.Tensor | None = None,
        temperature: float = 1.0,
        forbidden: torch.Tensor | None = None,
        top_k: int = 0,
        grouped: bool = False,
    ):
        given = isinstance(logits, torch.Tensor)
        if tokens is not None:
            tokens = as_tensor("tokens", tokens, int, device=getattr(logits, "device", None))
        check_shapes(
            logits, potentials, tokens, observed, present, context, active, temperature, forbidden
        )
        top_k = integer("top_k", top_k, least=0)
        self._own_law = isinstance(logits, TopKEvidence) and logits.log_marginal is not None
        listed = bool(top_k) if given else isinstance(logits, TopKEvidence)
        if listed and not self._own_law and potentials.log_marginal is None:
            what = f"`top_k` is {top_k}" if given else "`logits` is top-k evidence"
            raise ValueError(
                f"{what}, but there is no law by which its remaining mass is spread: call its "
                "`spread_by(log_marginal)`, or give the potentials a `log_marginal`."
            )
        if not isinstance(logits, torch.Tensor) and logits.temperature != temperature:
            raise ValueError(
                f"`logits` is evidence computed at temperature {logits.temperature}, so that "
                f"`temperature` cannot be {temperature}: compute the evidence again."
            )
        batch, length = logits.shape[:2] if isinstance(logits, torch.Tensor) else logits.batch_shape
        flags = {"dtype": torch.bool, "device": logits.device}
        self.logits = logits
        self.potentials = potentials
        self._all_present = present is None
        self.present = torch.ones(batch, length, **flags) if present is None else present
        observed = torch.zeros(batch, length, **flags) if observed is None else observed
        self.observed = observed & self.present
        self.tokens = torch.zeros_like(self.observed, dtype=torch.long)
        if tokens is not None:
            self.tokens = torch.where(self.observed, tokens, 0)
        self.context = Context(context) if isinstance(context, torch.Tensor) else context
        self._all_active = active is None
        self.active = torch.ones(batch, **flags) if active is None else active
        self.temperature = temperature
        self.forbidden = forbidden
        self.top_k = top_k
        self.grouped = grouped
        self._known_in_prediction = False
        super().__init__((batch,), (length,), validate_args=False)
        check_tokens("tokens", self.tokens, potentials.vocab_size)

    @cached_property
    def factorized_logits(self) -> torch.Tensor:
        """`[B, L, V]` log-probabilities without the circuit; one-hot at observed positions."""
        log_phi = self._log_phi
        return log_phi if self._known_in_prediction else self._sure_where_observed(log_phi)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Log-probability `[*S, B]` of tokens `[*S, B, L]`; -inf where it is zero.

        Observed positions must agree with the given tokens, absent ones are ignored.

        Raises:
            ValueError: `Z` is zero for a row, or a token is outside the vocabulary.
        """
        value = self._checked_value(value)
        gain = self.coupling_gain(value)
        token = self._prediction.log_prob_of(torch.where(self.present, value, 0))
        factorized = token.masked_fill(~self.masked, 0).sum(-1)
        agrees = ((value == self.tokens) | ~self.observed).all(-1)
        return torch.where(agrees, gain + factorized, -torch.inf)

    def coupling_gain(self, value: torch.Tensor) -> torch.Tensor:
        """`log p_w(x) - log Z`, `[*S, B]`: what the circuit adds to the factorized log-likelihood.

        Raises:
            ValueError: `Z` is zero for a row, or a token is outside the vocabulary.
        """
        value = self._checked_value(value)
        tokens = torch.where(self.present, value, 0).reshape(-1, *self.event_shape)
        evidence = self._hard_evidence(tokens)
        if "_filter" in self.__dict__:
            joint = chains.forward_filter(self._chain(evidence)).log_partition
        else:  # both at once: half as many steps, and their context is read once
            (batch,) = self.batch_shape
            stacked = torch.cat((self._evidence, evidence))
            both = self._checked(chains.forward_filter(self._chain(stacked)))
            self._filter, joint = both.copy(0, batch), both.log_partition[batch:]
        self._check_possible()
        total = self.log_partition.masked_fill(~self.active, 0)
        return joint.reshape(value.shape[:-1]).masked_fill(~self.active, 0) - total

    @cached_property
    def marginals(self) -> torch.Tensor:
        """`[B, L, V]`: exact marginal probabilities of the tokens.

        One-hot at observed positions; the backbone's own at absent ones and in rows where the
        circuit is not active or `Z` is zero.
        """
        coupled = self.active & (self.log_partition > -torch.inf)
        rows, positions = (self.masked & coupled[:, None]).nonzero(as_tuple=True)
        mixed = self.token_laws(rows, positions, self.latent_posterior[rows, positions])
        marginals = self.factorized_logits.exp()
        return marginals.index_put((rows, positions), mixed)

    def marginal_probs_of(self, value: torch.Tensor) -> torch.Tensor:
        """`[B, L]`: what `marginals` give the tokens `[B, L]`, at no cost in the vocabulary.

        What stands at absent positions has no meaning.
        """
        value = self._checked_value(value, samples=False)
        value = torch.where(self.present, value, 0)
        positions = torch.arange(value.shape[1], device=value.device)
        columns = self.potentials.emission.columns(value, positions).to(self._dtype)
        number = self.potentials.num_latents
        own, copied = self.latent_posterior.split((number, self._num_copies), -1)
        weights = safe_log(own)
        weights = weights - torch.where(weights == -torch.inf, 0, self._evidence[..., :number])
        log_phi = self._prediction.log_prob_of(value)
        coupled = self.active & (self.log_partition > -torch.inf)
        mixed = torch.where(coupled[:, None], logsumexp(weights + columns, -1), 0)
        probs = torch.where(self.present, log_phi + mixed, log_phi).exp()
        if self._copies is not None:
            emitted = copied * self._copies.emits(value)
            probs = probs + torch.where(coupled[:, None], emitted.sum(-1), 0)
        return torch.where(self.observed, (value == self.tokens).to(probs.dtype), probs)

    def sample_latents(self, generator: Generators = None) -> torch.Tensor:
        """A joint sample of the latent path, `[B, L]`, one per row."""
        return chains.sample_backward(self._chain(self._evidence), self._filter, (), generator)

    @torch.no_grad()
    def best_latents(self) -> torch.Tensor:
        """The most probable latent path `[B, L]`, whatever the tokens (`viterbi` chooses both)."""
        return chains.best_path(self._chain(self._evidence))[0]

    def logits_given(self, latents: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[*S, B, L, V]` of each token given the latents `[*S, B, L]`.

        Given the latents the tokens are independent. One-hot at observed positions, the backbone's
        own at absent ones and in inactive rows.

        Raises:
            ValueError: the latents have another shape, or there is no such state.
        """
        number = self.potentials.num_latents
        latents = as_tensor("latents", latents, int, device=self.present.device)
        shape = (*latents.shape[:-2], *self.batch_shape, *self.event_shape)
        as_tensor("latents", latents, shape=shape)
        check_tokens("latents", latents, number + self._num_copies, "states")
        own = latents.clamp(max=number - 1)
        # The sum over the vocabulary is the evidence of the latent, which is known already.
        coupled = (self.masked & self.active[:, None]).expand(latents.shape)
        evidence = self._evidence.expand(*latents.shape, -1).gather(-1, latents[..., None])
        impossible = evidence == -torch.inf
        coupled = coupled[..., None] & ~impossible
        total = evidence.masked_fill(~coupled, 0)
        in_place = not torch.is_grad_enabled()
        if in_place:
            scores = self._prediction.given_latents(
                self.potentials.emission, own, total[..., 0].to(self._dtype)
            )
            at = (~coupled[..., 0] & ~self.observed).nonzero(as_tuple=True)
            if len(at[0]):
                scores[at] = self._prediction[at[-2:]].dense().to(scores.dtype)
        else:
            emission = emission_of_latents(self.potentials.emission, own).to(self._dtype)
            scores = torch.where(coupled, self._log_phi + emission - total, self._log_phi)
        if self._copies is not None:
            copied = (latents >= number) & coupled[..., 0]
            places = (latents - number).clamp(min=0)
            tokens = self._copies.tokens.expand(*latents.shape[:-1], -1).gather(-1, places)
            scores = sure_where(copied, tokens, scores, ours=True)
        return self._sure_where_observed(scores, ours=True)

    @torch.no_grad()
    def sample(
        self, sample_shape: tuple[int, ...] = (), generator: Generators = None
    ) -> torch.Tensor:
        """Exact joint samples `[*sample_shape, B, L]`; observed tokens stay, absent ones are 0.

        Where the circuit and the backbone share no completion, they are the backbone's.

        Raises:
            ValueError: no token is possible at some position.
        """
        sizes = several(sample_shape)
        if sizes is None:
            raise TypeError(f"`sample_shape` must be a tuple, got {shown(sample_shape)}.")
        sample_shape = tuple(integer("sample_shape", size, least=0) for size in sizes)
        self._check_tokens_left()
        chain = self._chain(self._evidence)
        latents = chains.sample_backward(chain, self._filter, sample_shape, generator)
        samples = int(torch.Size(sample_shape).numel())
        batch, length = *self.batch_shape, *self.event_shape
        numbers = uniform((batch, samples, length), generator, self.present.device)
        numbers = numbers.transpose(0, 1).reshape(*sample_shape, batch, length)
        tokens = draw_categorical(self.logits_given(latents).exp(), numbers)
        return torch.where(self.masked, tokens, self.tokens)

    @torch.no_grad()
    def viterbi(self) -> ViterbiPath:
        """The most probable latents and tokens together (not the mode of the tokens alone).

        Raises:
            ValueError: no token is possible at some position.
        """
        self._check_tokens_left()
        log_phi = self._log_phi
        rows, positions = (self.masked & self.active[:, None]).nonzero(as_tuple=True)
        best = best_evidence(
            self.potentials.emission, log_phi[rows, positions], positions, self._summary
        )
        number = self.potentials.num_latents
        best = torch.cat((best.to(self._dtype), self._evidence[rows, positions, number:]), -1)
        evidence = self._evidence.index_put((rows, positions), best)
        factorized = (self.masked & ~self.active[:, None])[..., None]
        evidence = torch.where(factorized, log_phi.amax(-1, keepdim=True), evidence)
        latents, log_weight = chains.best_path(self._chain(evidence))
        tokens = torch.where(self.masked, self.logits_given(latents).argmax(-1), self.tokens)
        possible = self.log_partition > -torch.inf
        log_prob = torch.where(possible, log_weight - self.log_partition, -torch.inf)
        return ViterbiPath(tokens, latents, log_prob)

    def condition(self, tokens: torch.Tensor, observed: torch.Tensor) -> CoupledCategorical:
        """The distribution given further tokens.

        Args:
            tokens: `[B, L]`, used where `observed` and not observed before.
            observed: `[B, L]` bool, the further positions.
        """
        shape, device = (*self.batch_shape, *self.event_shape), self.present.device
        tokens = as_tensor("tokens", tokens, int, shape, device)
        observed = as_tensor("observed", observed, bool, shape, device)
        known = torch.where(self.observed, self.tokens, tokens)
        conditioned = self._replace(tokens=known, observed=self.observed | observed)
        if "_evidence" in self.__dict__:  # the products with the vocabulary stay as they are
            kept = ("_prediction", "_log_phi", "_copies", "_steps", "_initial")
            for name in kept:
                if name in self.__dict__:
                    conditioned.__dict__[name] = self.__dict__[name]
            hard = conditioned._hard_evidence(conditioned.tokens)
            further = (self.masked & observed)[..., None]
            conditioned._evidence = torch.where(further, hard, self._evidence)
        return conditioned

    def without(
        self, token_ids: torch.Tensor, where: torch.Tensor | None = None
    ) -> CoupledCategorical:
        """The same distribution with no potential for some tokens.

        Args:
            token_ids: `[n]` tokens that the backbone's prediction shall rule out.
            where: `[B, L]` bool, at which positions; default all.

        Raises:
            ValueError: the distribution was made of evidence, which holds no logits.
        """
        if not isinstance(self.logits, torch.Tensor):
            raise ValueError(
                "The distribution holds evidence in place of logits, of which no token can be "
                "taken out: give `forbidden` when the evidence is made."
            )
        token_ids = as_tensor("token_ids", token_ids, int, device=self.logits.device)
        if token_ids.ndim != 1:
            raise ValueError(f"`token_ids` must have one dimension, got {shown(token_ids)}.")
        check_tokens("token_ids", token_ids, self.potentials.vocab_size)
        if where is None:
            where = torch.ones_like(self.present)
        where = as_tensor("where", where, bool, self.present.shape, self.present.device)
        chosen = self.logits[..., token_ids].masked_fill(where[..., None], -torch.inf)
        logits = self.logits.index_copy(-1, token_ids, chosen)
        return self._replace(logits=logits)

    def with_temperature(self, temperature: float) -> CoupledCategorical:
        """The same distribution at another evidence temperature."""
        number("temperature", temperature, f"above 0, {FACTORS}", is_factor)
        if temperature == self.temperature:
            return self
        if not isinstance(self.logits, torch.Tensor):
            raise ValueError(
                f"The evidence was computed at temperature {self.temperature} and holds no logits: "
                f"make the distribution again at {temperature}."
            )
        return self._replace(temperature=temperature)

    def with_active(self, active: torch.Tensor) -> CoupledCategorical:
        """The same distribution with the circuit applied in the rows of `active` `[B]` only."""
        return self._replace(active=active)

    def _replace(self, **changes) -> CoupledCategorical:
        names = [
            "logits",
            "potentials",
            "tokens",
            "observed",
            "present",
            "context",
            "active",
            "temperature",
            "forbidden",
            "top_k",
            "grouped",
        ]
        kept = {name: getattr(self, name) for name in names}
        if self._all_present:
            kept["present"] = None
        if self._all_active:
            kept["active"] = None
        return CoupledCategorical(**(kept | changes))

    def _checked_value(self, value: torch.Tensor, samples: bool = True) -> torch.Tensor:
        """Tokens of the vocabulary, `[*S, B, L]` or, without `samples`, `[B, L]`."""
        value = as_tensor("value", value, int, device=self.present.device)
        leading = value.shape[:-2] if samples else ()
        as_tensor("value", value, shape=(*leading, *self.batch_shape, *self.event_shape))
        present = torch.where(self.present, value, 0)
        check_tokens("value", present, self.potentials.vocab_size)
        return value

    def _check_tokens_left(self) -> None:
        """Raises a ValueError where no token is possible at a masked position."""
        none = self.masked & (self._log_phi.amax(-1) == -torch.inf)
        if bool(none.any()):
            raise ValueError(
                f"`logits` leave no token possible in row {int(none.nonzero()[0, 0])}: `forbidden` "
                "and `without` must leave one."
            )
