"""The latents of coupled windows: the evidence of them, and the tokens that they emit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn import functional as F

from ..context.copies import CopyStates, CopySteps
from ..context.maps import Context
from ..evidence.dense import (
    DenseEvidence,
    EmissionSummary,
    emission_of_latents,
    mix_tokens,
    summarise,
)
from ..evidence.lists import TopKEvidence
from ..numerics import full_precision, logsumexp, pin_tokens, safe_log
from ..potentials import Potentials
from ..potentials.transitions import StepTransitions
from ..random import Generators
from ..recursions.chain import Chain
from ..recursions.queries import Filter, forward_filter, posterior, sample_paths


@dataclass
class Latents:
    """The latent chain of a batch of windows, whose `H` states `J` copy states follow, if any.

    Attributes:
        potentials: the circuit.
        prediction: the backbone's, `[B, L]`.
        tokens: `[B, L]`, 0 where not observed.
        observed: `[B, L]` bool, where evidence is of a token.
        present: `[B, L]` bool; None where all positions are.
        active: `[B]` bool; other rows have no evidence at all.
        context: of the backbone.
    """

    potentials: Potentials
    prediction: DenseEvidence | TopKEvidence
    tokens: torch.Tensor
    observed: torch.Tensor
    present: torch.Tensor | None
    active: torch.Tensor
    context: Context

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.potentials.emission.dtype, torch.float32)

    @cached_property
    def masked(self) -> torch.Tensor:
        """`[B, L]` bool: the positions that are neither observed nor absent."""
        return ~self.observed if self.present is None else ~self.observed & self.present

    @cached_property
    def tables(self) -> EmissionSummary:
        """What the evidence needs of all emissions."""
        if isinstance(self.prediction, DenseEvidence):
            return self.potentials.summary
        law = self.prediction.log_marginal
        if law is self.potentials.log_marginal:
            return self.potentials.top_k_summary
        return summarise(self.potentials.emission, law)

    @cached_property
    def copies(self) -> CopyStates | None:
        copies = self.context.copies
        return None if copies is None else copies.to(self.dtype)

    @property
    def num_copies(self) -> int:
        return 0 if self.copies is None else self.copies.tokens.shape[1]

    @cached_property
    def steps(self) -> StepTransitions | CopySteps:
        steps = self.potentials.transition.to(self.dtype)
        return steps if self.copies is None else CopySteps(steps, self.copies)

    @cached_property
    def prior(self) -> torch.Tensor:
        """`[B, L, H + J]`: log-weights by the context and, where a row starts, the initial law."""
        initial, latent = self.potentials.initial.to(self.dtype), self.context.latent
        if self.copies is not None:
            initial = self.copies.initial(initial)
        prior = initial.new_zeros(*self.tokens.shape, initial.shape[-1])
        if latent is not None:
            latent = latent.to(self.dtype).masked_fill(~self.active[:, None, None], 0)
            prior = prior + F.pad(latent, (0, self.num_copies))
        return Chain.start(initial, self.steps, prior, self.present).evidence

    def chain(self, evidence: torch.Tensor) -> Chain:
        """The chain with log-evidence `[S * B, L, H + J]`, of one or more copies of the batch."""
        copies = len(evidence) // len(self.tokens)
        present = None if self.present is None else self.present.repeat(copies, 1)
        return Chain(self.steps, evidence + self.prior.repeat(copies, 1, 1), present)

    @cached_property
    def evidence(self) -> torch.Tensor:
        """`[B, L, H + J]`: the log-evidence of predictions where masked, of tokens elsewhere."""
        emission, tables = self.potentials.emission, self.tables
        return self._evidence(
            lambda prediction, positions: prediction.soft_evidence(
                emission, positions, tables, repair=tables.needs_repair
            ),
            self.prediction.log_prob_of,
        )

    def evidence_bound(self, side: int) -> torch.Tensor:
        """A lower (0) or upper (1) bound on `evidence`, whatever a list of tokens left out."""
        emission, tables = self.potentials.emission, self.tables
        return self._evidence(
            lambda prediction, positions: prediction.soft_evidence_bounds(
                emission, positions, tables
            )[side],
            lambda tokens: self.prediction.log_prob_bounds_of(tokens)[side],
        )

    def _evidence(self, soft_evidence: Callable, log_prob_of: Callable) -> torch.Tensor:
        """Evidence by functions for states `[N, H]` and for the tokens of copy states."""
        soft = self.masked & self.active[:, None]
        rows, positions = soft.nonzero(as_tuple=True)
        evidence = self.hard_evidence(self.tokens)
        states = soft_evidence(self.prediction[rows, positions], positions).to(self.dtype)
        if self.copies is not None:
            copied = self.copies.soft_evidence(log_prob_of)[rows, positions]
            states = torch.cat((states, copied.to(self.dtype)), -1)
        return evidence.index_put((rows, positions), states)

    @full_precision
    def hard_evidence(
        self,
        tokens: torch.Tensor,
        rows: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[..., H + J]`: log-evidence of tokens `[..., B, L]`, or `[n]` at rows and positions."""
        if rows is None:
            rows = torch.arange(tokens.shape[-2], device=self.device)[:, None]
            positions = torch.arange(tokens.shape[-1], device=self.device)
        evidence = self.potentials.emission.columns(tokens, positions).to(self.dtype)
        if self.copies is not None:
            emits = self.copies.tokens[rows] == tokens[..., None]
            copied = torch.where(emits, self.copies.weight[rows], -torch.inf)
            evidence = torch.cat((evidence, copied), -1)
        return torch.where(self.active[rows, None], evidence, 0)

    @cached_property
    def filter(self) -> Filter:
        """The forward pass over `evidence`."""
        (filtered,) = self.filters(self.evidence)
        return filtered

    def filters(self, *evidence: torch.Tensor) -> list[Filter]:
        """Forward passes over log-evidence `[S * B, L, H + J]`, all at once."""
        stacked, parts, first = forward_filter(self.chain(torch.cat(evidence))), [], 0
        if bool(stacked.log_partition.isnan().any()):
            raise ValueError(
                "`logits`, `context` or the potentials hold NaN: check what made them."
            )
        for part in evidence:
            parts.append(stacked.part(first, len(part)))
            first += len(part)
        return parts

    def filter_with(self, other: Latents) -> None:
        """Runs both forward passes at once; all but the predictions must be the same."""
        other.copies, other.steps, other.prior = self.copies, self.steps, self.prior
        self.filter, other.filter = self.filters(self.evidence, other.evidence)

    def log_weight(self, evidence: torch.Tensor) -> torch.Tensor:
        """`[*S, B]`: log of the sum over paths with other log-evidence `[*S, B, L, H + J]`.

        The forward pass over the chain's own runs along, if it has not been asked for yet.
        """
        stacked = evidence.flatten(0, -3)
        if "filter" in self.__dict__:
            (filtered,) = self.filters(stacked)
        else:
            self.filter, filtered = self.filters(self.evidence, stacked)
        return filtered.log_partition.view(evidence.shape[:-2])

    def given(self, tokens: torch.Tensor, observed: torch.Tensor) -> Latents:
        """The latents given further tokens; the evidence of predictions stays as it is."""
        given = replace(self, tokens=tokens, observed=observed)
        further = (self.masked & observed)[..., None]
        given.evidence = torch.where(further, given.hard_evidence(tokens), self.evidence)
        return given

    def sample(self, sample_shape: tuple[int, ...], generator: Generators) -> torch.Tensor:
        """Joint samples `[*sample_shape, B, L]` of the latent path."""
        return sample_paths(self.chain(self.evidence), self.filter, sample_shape, generator)

    @cached_property
    def posterior(self) -> torch.Tensor:
        """`[B, L, H + J]`: the distribution of each latent; zeros at absent positions."""
        return posterior(self.chain(self.evidence), self.filter)

    def token_probs(
        self, rows: torch.Tensor, positions: torch.Tensor, posterior: torch.Tensor
    ) -> torch.Tensor:
        """`[N, V]`: distributions of the tokens at masked positions, given those of the latents.

        They are the backbone's own in rows that are not active, and where nothing is possible.

        Args:
            rows: `[N]`.
            positions: `[N]`.
            posterior: `[N, H + J]`; zeros where nothing is possible.
        """
        log_phi = self.prediction[rows, positions].dense()
        weights, own, copied = self._emitted(rows, positions, posterior)
        emission, tables = self.potentials.emission, self.potentials.summary
        mixed = mix_tokens(emission, log_phi, weights, positions, tables)
        if self.copies is not None:
            tokens, copied = self.copies.tokens[rows], copied.to(mixed.dtype)
            mixed = (own.sum(-1, keepdim=True) * mixed).scatter_add(1, tokens, copied)
        coupled = self._coupled(rows, posterior)
        return mixed if bool(coupled.all()) else torch.where(coupled[:, None], mixed, log_phi.exp())

    def prob_of(
        self,
        tokens: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        posterior: torch.Tensor,
    ) -> torch.Tensor:
        """`[N]`: what `token_probs` give to tokens `[N]`, at no cost in the vocabulary."""
        log_phi = self.prediction[rows, positions].log_prob_of(tokens)
        weights, _, copied = self._emitted(rows, positions, posterior)
        columns = self.potentials.emission.columns(tokens, positions).to(self.dtype)
        mixed = (log_phi + logsumexp(weights + columns, -1)).exp()
        if self.copies is not None:
            emits = self.copies.tokens[rows] == tokens[:, None]
            mixed = mixed + (copied * emits).sum(-1)
        return torch.where(self._coupled(rows, posterior), mixed, log_phi.exp())

    def _emitted(self, rows, positions, posterior) -> tuple[torch.Tensor, ...]:
        """`posterior(z) / s(z)`, `[N, H]` in logs: what states weigh in the mixture of emissions.

        And the two parts of the posterior: states and copy states.
        """
        own, copied = posterior.split((self.potentials.num_latents, self.num_copies), -1)
        weights, evidence = safe_log(own), self.evidence[rows, positions, : own.shape[-1]]
        return weights - torch.where(weights == -torch.inf, 0, evidence), own, copied

    def _coupled(self, rows: torch.Tensor, posterior: torch.Tensor) -> torch.Tensor:
        return self.active[rows] & (posterior > 0).any(-1)

    def log_probs_given(self, latents: torch.Tensor) -> torch.Tensor:
        """`[*S, B, L, V]`: log-probabilities of the tokens given latents `[*S, B, L]`."""
        emission, number = self.potentials.emission, self.potentials.num_latents
        states = latents.clamp(max=number - 1)
        # The sum over the vocabulary is the evidence of the latent, which is known already.
        total = self.evidence.expand(*latents.shape, -1).gather(-1, latents[..., None])[..., 0]
        coupled = self.masked & self.active[:, None] & (total > -torch.inf)
        total = total.masked_fill(~coupled, 0)
        if torch.is_grad_enabled():
            log_phi, rows = self.prediction.dense(), emission_of_latents(emission, states)
            scores = log_phi + rows.to(self.dtype) - total[..., None]
            scores = torch.where(coupled[..., None], scores, log_phi)
        else:
            scores = self.prediction.given_latents(emission, states, total)
            at = (~coupled & ~self.observed).nonzero(as_tuple=True)
            scores[at] = self.prediction[at[-2:]].dense().to(scores.dtype)
        if self.copies is not None:
            copied, place = (latents >= number) & coupled, (latents - number).clamp(min=0)
            tokens = self.copies.tokens.expand(*latents.shape[:-1], -1).gather(-1, place)
            scores = pin_tokens(copied, tokens, scores, in_place=True)
        return self.pinned(scores, in_place=True)

    def pinned(self, log_probs: torch.Tensor, in_place: bool) -> torch.Tensor:
        """Log-probabilities `[*S, B, L, V]` that are sure of the observed tokens."""
        shape = log_probs.shape[:-1]
        return pin_tokens(
            self.observed.expand(shape), self.tokens.expand(shape), log_probs, in_place
        )
