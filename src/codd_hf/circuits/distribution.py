"""The coupled distribution: a factorized prediction times a circuit, normalised exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.distributions import Distribution
from torch.nn import functional as F

from . import chain as chains
from .checks import check_ids, check_shapes
from .conditioning import Context
from .copies import CopyStates, CopySteps
from .evidence import (
    DenseEvidence,
    EmissionSummary,
    best_evidence,
    emission_of_latents,
    hard_evidence,
    mix_tokens,
    summarise,
)
from .lazy import cached_property
from .numerics import logsumexp, safe_log
from .potentials import Potentials
from .random import Generators, draw_categorical, uniform
from .topk import TopKEvidence
from .transitions import Steps


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


class CoupledCategorical(Distribution):
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
    ):
        given = isinstance(logits, torch.Tensor)
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
        check_shapes(
            logits, potentials, tokens, observed, present, context, active, temperature, forbidden
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
        super().__init__((batch,), (length,), validate_args=False)
        check_ids("tokens", self.tokens, potentials.vocab_size)

    @property
    def masked(self) -> torch.Tensor:
        """`[B, L]` bool: the positions that are neither observed nor absent."""
        return self.present & ~self.observed

    @cached_property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.potentials.emission.dtype, torch.float32)

    @cached_property
    def _prediction(self) -> DenseEvidence | TopKEvidence:
        prediction = self.logits
        if isinstance(prediction, torch.Tensor):
            logits, how = self.logits.to(self._dtype), (self.temperature, self.forbidden)
            if not self.top_k:
                return DenseEvidence.from_logits(logits, *how)
            prediction = TopKEvidence.from_logits(logits, self.top_k, *how)
        if isinstance(prediction, TopKEvidence) and not self._own_law:
            return prediction.spread_by(self.potentials.log_marginal, self.forbidden)
        return prediction

    @cached_property
    def _log_phi(self) -> torch.Tensor:
        """`[B, L, V]` log-probabilities of the backbone; -inf for forbidden tokens."""
        return self._prediction.dense()

    @cached_property
    def factorized_logits(self) -> torch.Tensor:
        """`[B, L, V]` log-probabilities without the circuit; one-hot at observed positions."""
        return self._one_hot_where_observed(self._log_phi)

    def _soft_evidence(self, evaluate, log_prob_of=None) -> torch.Tensor:
        """`[B, L, H + J]`: of what is masked, else hard.

        Args:
            evaluate: maps predictions and their positions to evidence `[N, H]`.
            log_prob_of: what copied tokens are taken to have; default, the prediction's.
        """
        hard = hard_evidence(self.potentials.emission, self.tokens).to(self._dtype)
        wanted = self.masked & self.active[:, None]
        if isinstance(self._prediction, TopKEvidence) or torch.compiler.is_compiling():
            # Cheap enough to be computed everywhere, which keeps all shapes fixed.
            batch, length = wanted.shape
            rows = torch.arange(batch, device=wanted.device).repeat_interleave(length)
            positions = torch.arange(length, device=wanted.device).repeat(batch)
            soft = (
                evaluate(self._prediction[rows, positions], positions)
                .to(self._dtype)
                .unflatten(0, (batch, length))
            )
            evidence = torch.where(wanted[..., None], soft, hard)
        else:
            rows, positions = wanted.nonzero(as_tuple=True)
            soft = evaluate(self._prediction[rows, positions], positions).to(self._dtype)
            evidence = hard.index_put((rows, positions), soft)
        if (copies := self._copies) is not None:
            soft = copies.soft_evidence(log_prob_of or self._prediction.log_prob_of)
            hard = copies.hard_evidence(self.tokens)
            copied = torch.where(wanted[..., None], soft.to(self._dtype), hard)
            evidence = torch.cat((evidence, copied), -1)
        return torch.where(self.active[:, None, None], evidence, 0)

    @cached_property
    def _evidence(self) -> torch.Tensor:
        """`[B, L, H + J]` log-evidence without context."""
        summary = self._summary
        emission = self.potentials.emission
        return self._soft_evidence(
            lambda prediction, positions: prediction.soft_evidence(
                emission, positions, summary, repair=summary.needs_repair
            )
        )

    @cached_property
    def _summary(self) -> EmissionSummary:
        if not isinstance(self._prediction, TopKEvidence):
            return self.potentials.summary
        if not self._own_law and not self._forbids_more:
            return self.potentials.top_k_summary
        # Another law than the circuit's: what is kept with the circuit is not for it.
        return summarise(self.potentials.emission, self._prediction.log_marginal)

    @property
    def _forbids_more(self) -> bool:
        """Does the circuit's law of the remaining mass give some to forbidden tokens?"""
        if self.forbidden is None or torch.compiler.is_compiling():
            return False
        return bool((self.potentials.log_marginal > -torch.inf)[:, self.forbidden].any())

    @cached_property
    def _copies(self) -> CopyStates | None:
        copies = None if self.context is None else self.context.copies
        return None if copies is None else copies.to(self._dtype)

    @cached_property
    def _steps(self) -> Steps | CopySteps:
        context = None if self.context is None else self.context.steps.map(self._cast)
        steps = Steps(self.potentials.transition.to(self._dtype), context)
        return steps if self._copies is None else CopySteps(steps, self._copies)

    @cached_property
    def _initial(self) -> torch.Tensor:
        initial = self._cast(self.potentials.initial)
        return initial if self._copies is None else self._copies.initial(initial)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._dtype)

    def _chain(self, evidence: torch.Tensor) -> chains.Chain:
        """A chain over `[B, L, H + J]` or, for samples, `[S * B, L, H + J]` evidence."""
        repeats = evidence.shape[0] // self.batch_shape[0]
        if self.context is not None and self.context.latent is not None:
            latent = self._cast(self.context.latent).masked_fill(~self.active[:, None, None], 0)
            latent = F.pad(latent, (0, evidence.shape[-1] - latent.shape[-1]))
            evidence = evidence + latent.repeat(repeats, 1, 1)
        present = None if self._all_present else self.present.repeat(repeats, 1)
        initial = self._initial
        if initial.ndim == 3:
            initial = initial.repeat(repeats, 1, 1)
        return chains.Chain.start(initial, self._steps, evidence, present)

    @cached_property
    def _filter(self) -> chains.Filter:
        return self._checked(chains.forward_filter(self._chain(self._evidence)))

    def _checked(self, filtered: chains.Filter) -> chains.Filter:
        if not torch.compiler.is_compiling() and bool(filtered.log_partition.isnan().any()):
            raise ValueError(
                "`logits`, `context` or the potentials hold NaN: check what made them."
            )
        return filtered

    @property
    def log_partition(self) -> torch.Tensor:
        """`[B]` log Z; -inf where the circuit and the backbone share no completion."""
        return self._filter.log_partition

    @cached_property
    def log_partition_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper `log Z`, `[B]` each, whatever top-k evidence left out.

        Both are `log_partition` where the evidence is exact. The log-probability of listed tokens
        is off by no more than `log_partition` is.
        """
        if not isinstance(self._prediction, TopKEvidence):
            return self.log_partition, self.log_partition
        summary, emission = self._summary, self.potentials.emission

        def bound(side: int) -> torch.Tensor:
            evidence = self._soft_evidence(
                lambda prediction, positions: prediction.soft_evidence_bounds(
                    emission, positions, summary
                )[side],
                lambda tokens: self._prediction.log_prob_bounds_of(tokens)[side],
            )
            return chains.forward_filter(self._chain(evidence)).log_partition

        return bound(0), bound(1)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Log-probability `[*S, B]` of tokens `[*S, B, L]`; -inf where it is zero.

        Observed positions must agree with the given tokens, absent ones are ignored.

        Raises:
            ValueError: `Z` is zero for a row, or a token is outside the vocabulary.
        """
        gain = self.coupling_gain(value)
        token = self._prediction.log_prob_of(torch.where(self.present, value, 0))
        factorized = token.masked_fill(~self.masked, 0).sum(-1)
        agrees = ((value == self.tokens) | ~self.observed).all(-1)
        return torch.where(agrees, gain + factorized, -torch.inf)

    def partial_log_prob(self, value: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Log-probability `[B]` of the tokens at some masked positions, the others summed out.

        Args:
            value: `[B, L]` tokens.
            known: `[B, L]` bool, the positions that count; masked ones.
        """
        conditioned = self.condition(value, known)
        token = self._prediction.log_prob_of(torch.where(known, value, 0))
        gain = conditioned.log_partition - self.log_partition
        return gain + token.masked_fill(~known, 0).sum(-1)

    def coupling_gain(self, value: torch.Tensor) -> torch.Tensor:
        """`log p_w(x) - log Z`, `[*S, B]`: what the circuit adds to the factorized log-likelihood.

        Raises:
            ValueError: `Z` is zero for a row, or a token is outside the vocabulary.
        """
        self._check_value(value)
        tokens = torch.where(self.present, value, 0).reshape(-1, *self.event_shape)
        evidence = hard_evidence(self.potentials.emission, tokens).to(self._dtype)
        if self._copies is not None:
            by_row = tokens.unflatten(0, (-1, *self.batch_shape))
            copied = self._copies.hard_evidence(by_row).flatten(0, 1)
            evidence = torch.cat((evidence, copied), -1)
        active = self.active.repeat(len(tokens) // self.batch_shape[0])
        evidence = torch.where(active[:, None, None], evidence, 0)
        if "_filter" in self.__dict__:
            joint = chains.forward_filter(self._chain(evidence)).log_partition
        else:  # both at once: half as many steps, and their context is read once
            (batch,) = self.batch_shape
            stacked = torch.cat((self._evidence, evidence))
            both = self._checked(chains.forward_filter(self._chain(stacked)))
            self._filter, joint = both.first(batch), both.log_partition[batch:]
        impossible = (self.active & (self.log_partition == -torch.inf)).nonzero()[:, 0].tolist()
        if impossible:
            raise ValueError(
                f"`log_partition` is -inf for rows {impossible}: the circuit rules out every "
                "completion that the backbone allows; use `with_active` to leave them "
                "factorized, or smooth the potentials."
            )
        total = self.log_partition.masked_fill(~self.active, 0)
        return joint.reshape(value.shape[:-1]).masked_fill(~self.active, 0) - total

    @cached_property
    def latent_posterior(self) -> torch.Tensor:
        """`[B, L, H + J]`: the law of each latent; zeros at absent positions.

        `J` copy states come last if the context has any.
        """
        return chains.posterior(self._chain(self._evidence), self._filter)

    @cached_property
    def marginals(self) -> torch.Tensor:
        """`[B, L, V]`: exact marginal probabilities of the tokens.

        One-hot at observed positions; the backbone's own at absent ones and in rows where the
        circuit is not active or `Z` is zero.
        """
        coupled = self.active & (self.log_partition > -torch.inf)
        rows, positions = (self.masked & coupled[:, None]).nonzero(as_tuple=True)
        log_phi = self._log_phi[rows, positions]
        number = self.potentials.num_latents
        posterior = self.latent_posterior[rows, positions]
        weights = safe_log(posterior[:, :number])
        evidence = self._evidence[rows, positions, :number]
        weights = weights - torch.where(weights == -torch.inf, 0, evidence)
        mixed = mix_tokens(
            self.potentials.emission, log_phi, weights, positions, self.potentials.summary
        )
        if self._copies is not None:
            own = posterior[:, :number].sum(-1, keepdim=True)
            tokens = self._copies.tokens[rows]
            mixed = (own * mixed).scatter_add(1, tokens, posterior[:, number:].to(mixed.dtype))
        marginals = self.factorized_logits.exp()
        return marginals.index_put((rows, positions), mixed)

    def marginal_probs_of(self, value: torch.Tensor) -> torch.Tensor:
        """`[B, L]`: what `marginals` give the tokens `[B, L]`, at no cost in the vocabulary.

        What stands at absent positions has no meaning.
        """
        self._check_value(value)
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

    def logits_given(self, latents: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[*S, B, L, V]` of each token given the latents `[*S, B, L]`.

        Given the latents the tokens are independent. One-hot at observed positions, the backbone's
        own at absent ones and in inactive rows.
        """
        number = self.potentials.num_latents
        own = latents.clamp(max=number - 1)
        emission = emission_of_latents(self.potentials.emission, own).to(self._dtype)
        # The sum over the vocabulary is the evidence of the latent, which is known already.
        coupled = (self.masked & self.active[:, None]).expand(latents.shape)
        evidence = self._evidence.expand(*latents.shape, -1).gather(-1, latents[..., None])
        impossible = evidence == -torch.inf
        coupled = coupled[..., None] & ~impossible
        total = evidence.masked_fill(~coupled, 0)
        in_place = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if in_place:
            scores = self._prediction.weighted(emission, total)
        else:
            scores = self._log_phi + emission - total
        if not in_place or not bool(coupled.all()):
            scores = torch.where(coupled, scores, self._log_phi)
        if self._copies is not None:
            copied = (latents >= number)[..., None] & coupled
            places = (latents - number).clamp(min=0)
            tokens = self._copies.tokens.expand(*latents.shape[:-1], -1).gather(-1, places)
            scores = torch.where(copied, _one_hot(scores, tokens), scores)
        return self._one_hot_where_observed(scores)

    @torch.no_grad()
    def sample(
        self, sample_shape: tuple[int, ...] = (), generator: Generators = None
    ) -> torch.Tensor:
        """Exact joint samples `[*sample_shape, B, L]`; observed tokens stay, absent ones are 0."""
        sample_shape = tuple(sample_shape)
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
        """The most probable latents and tokens together (not the mode of the tokens alone)."""
        log_phi = self._log_phi
        rows, positions = (self.masked & self.active[:, None]).nonzero(as_tuple=True)
        best = best_evidence(self.potentials.emission, log_phi[rows, positions], positions)
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
        shape = (*self.batch_shape, *self.event_shape)
        for name, value in (("tokens", tokens), ("observed", observed)):
            if tuple(value.shape) != shape:
                raise ValueError(f"`{name}` must have shape {shape}, got {tuple(value.shape)}.")
        known = torch.where(self.observed, self.tokens, tokens)
        return self._replace(tokens=known, observed=self.observed | observed)

    def with_temperature(self, temperature: float) -> CoupledCategorical:
        """The same distribution at another evidence temperature."""
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
        ]
        kept = {name: getattr(self, name) for name in names}
        if self._all_present:
            kept["present"] = None
        if self._all_active:
            kept["active"] = None
        return CoupledCategorical(**(kept | changes))

    def _one_hot_where_observed(self, log_probs: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and not bool(self.observed.any()):
            return log_probs
        one_hot = _one_hot(log_probs, self.tokens.expand(log_probs.shape[:-1]))
        return torch.where(self.observed[..., None], one_hot, log_probs)

    @property
    def _num_copies(self) -> int:
        return 0 if self._copies is None else self._copies.tokens.shape[1]

    def _check_value(self, value: torch.Tensor) -> None:
        shape = (*self.batch_shape, *self.event_shape)
        if tuple(value.shape[-2:]) != shape:
            raise ValueError(f"`value` must end with shape {shape}, got {tuple(value.shape)}.")
        check_ids("value", value[..., self.present], self.potentials.vocab_size)


def _one_hot(like: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[..., V]` that are sure of tokens `[...]`."""
    return torch.full_like(like, -torch.inf).scatter(-1, tokens[..., None], 0.0)
