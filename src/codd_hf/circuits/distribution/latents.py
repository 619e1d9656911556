"""The latents of coupled windows: the evidence of them, and the tokens that they emit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch.nn import functional as F

from ..context.copies import CopyStates, CopySteps
from ..context.maps import Context
from ..evidence.best import best_evidence
from ..evidence.dense import DenseEvidence, emission_of_latents, mix_tokens
from ..evidence.lists import ListedEvidence
from ..numerics import full_precision, logsumexp, pin_tokens, safe_log
from ..potentials import Potentials
from ..potentials.transitions import StepTransitions
from ..random import Generators
from ..recursions.chain import Chain, Filter, forward_filter, posterior, sample_paths

At = tuple[torch.Tensor, torch.Tensor]
"""Rows `[N]` of a batch and their positions `[N]`."""


@dataclass
class Latents:
    """The latent chain of a batch of windows, whose `H` states `J` copy states follow, if any.

    Attributes:
        potentials: the circuit.
        prediction: the backbone's, `[B, L]`.
        tokens: `[B, L]`, 0 where masked or absent.
        masked: `[B, L]` bool, where evidence is of the prediction, not of a token.
        present: `[B, L]` bool; None where all positions are.
        active: `[B]` bool; other rows have no evidence at all.
        context: of the backbone.
    """

    potentials: Potentials
    prediction: DenseEvidence | ListedEvidence
    tokens: torch.Tensor
    masked: torch.Tensor
    present: torch.Tensor | None
    active: torch.Tensor
    context: Context

    @property
    def device(self) -> torch.device:
        """Where the windows are."""
        return self.tokens.device

    @property
    def dtype(self) -> torch.dtype:
        """Of evidence and messages: float32, or float64 if the emissions are."""
        return torch.promote_types(self.potentials.emission.dtype, torch.float32)

    @cached_property
    def copies(self) -> CopyStates | None:
        """The copy states."""
        copies = self.context.copies
        return None if copies is None else copies.to(self.dtype)

    @property
    def num_copies(self) -> int:
        """`J`."""
        return 0 if self.copies is None else self.copies.tokens.shape[1]

    @cached_property
    def steps(self) -> StepTransitions | CopySteps:
        """The transitions."""
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
        return self.evidence_by(None)

    def evidence_by(self, bound: int | None) -> torch.Tensor:
        """`evidence`, or a lower (0) or upper (1) bound, whatever a list of tokens left out."""
        at = (self.masked & self.active[:, None]).nonzero(as_tuple=True)
        prediction, given = self.prediction, (self.potentials.tables, at[1])
        if bound is None:
            soft = prediction[at].soft_evidence(*given)
        else:
            soft = prediction[at].soft_evidence_bounds(*given)[bound]
        if self.copies is not None:
            copied = self.copies.soft_evidence(
                prediction.log_prob_of
                if bound is None
                else lambda tokens: prediction.log_prob_bounds_of(tokens)[bound]
            )
            soft = torch.cat((soft, copied[at]), -1)
        return self.hard_evidence(self.tokens).index_put(at, soft.to(self.dtype))

    def evidence_of_best_tokens(self) -> torch.Tensor:
        """`evidence` with a maximum over tokens in place of the sum."""
        at, tables = self.masked.nonzero(as_tuple=True), self.potentials.tables
        log_phi = self.prediction[at].dense()
        best = best_evidence(log_phi, at[1], tables).to(self.dtype)
        best = torch.cat((best, self.evidence[at][:, self.potentials.num_latents :]), -1)
        best = torch.where(self.active[at[0], None], best, log_phi.amax(-1, keepdim=True))
        return self.evidence.index_put(at, best)

    @full_precision
    def hard_evidence(self, tokens: torch.Tensor, at: At | None = None) -> torch.Tensor:
        """`[..., H + J]`: log-evidence of tokens `[..., B, L]`, or of `[N]` at some positions."""
        if at is None:
            rows, positions = (torch.arange(n, device=self.device) for n in tokens.shape[-2:])
            at = rows[:, None], positions
        evidence = self.potentials.emission.columns(tokens, at[1]).to(self.dtype)
        if self.copies is not None:
            emits = self.copies.tokens[at[0]] == tokens[..., None]
            copied = torch.where(emits, self.copies.weight[at[0]], -torch.inf)
            evidence = torch.cat((evidence, copied), -1)
        return torch.where(self.active[at[0], None], evidence, 0)

    @cached_property
    def filter(self) -> Filter:
        """The forward pass over `evidence`."""
        return self.filters(self.evidence)[0]

    def filters(self, *evidence: torch.Tensor) -> list[Filter]:
        """Forward passes over log-evidence `[S * B, L, H + J]`, all at once."""
        stacked = forward_filter(self.chain(torch.cat(evidence)))
        undefined = stacked.log_partition.isnan().nonzero()
        if len(undefined):
            raise ValueError(
                "`logits`, `context` or the potentials hold NaN or infinity in row "
                f"{int(undefined[0]) % len(self.tokens)}: check what made them."
            )
        sizes = [len(part) for part in evidence]
        ends = accumulate(sizes)
        return [stacked.part(slice(end - n, end)) for n, end in zip(sizes, ends, strict=True)]

    def filter_with(self, other: Latents) -> None:
        """Runs both forward passes at once; all but the predictions must be the same."""
        other.copies, other.steps, other.prior = self.copies, self.steps, self.prior
        self.filter, other.filter = self.filters(self.evidence, other.evidence)

    def log_weight(self, evidence: torch.Tensor) -> torch.Tensor:
        """`[*S, B]`: log of the sum over paths with other log-evidence `[*S, B, L, H + J]`.

        The forward pass over the chain's own runs along, if it has not been asked for yet.
        """
        stacked = evidence.flatten(0, -3)
        if "filter" not in self.__dict__:
            self.filter, filtered = self.filters(self.evidence, stacked)
        else:
            (filtered,) = self.filters(stacked)
        return filtered.log_partition.view(evidence.shape[:-2])

    @cached_property
    def posterior(self) -> torch.Tensor:
        """`[B, L, H + J]`: the distribution of each latent; zeros at absent positions."""
        return posterior(self.chain(self.evidence), self.filter)

    def sample(self, sample_shape: tuple[int, ...], generator: Generators) -> torch.Tensor:
        """Joint samples `[*sample_shape, B, L]` of the latent path."""
        return sample_paths(self.chain(self.evidence), self.filter, sample_shape, generator)

    def token_probs(self, at: At, posterior: torch.Tensor) -> torch.Tensor:
        """`[N, V]`: distributions of the tokens at masked positions, given those of the latents.

        They are the backbone's own in rows that are not active, and where nothing is possible.

        Args:
            at: the positions.
            posterior: `[N, H + J]`; zeros where nothing is possible.
        """
        log_phi = self.prediction[at].dense()
        weights, copied = self._emitted(at, posterior)
        mixed = mix_tokens(log_phi, weights, at[1], self.potentials.tables)
        if self.copies is not None:
            own = posterior[:, : self.potentials.num_latents].sum(-1, keepdim=True)
            tokens, copied = self.copies.tokens[at[0]], copied.to(mixed.dtype)
            mixed = (own * mixed).scatter_add(1, tokens, copied)
        coupled = self._coupled(at, posterior)
        return mixed if bool(coupled.all()) else torch.where(coupled[:, None], mixed, log_phi.exp())

    def prob_of(self, tokens: torch.Tensor, at: At, posterior: torch.Tensor) -> torch.Tensor:
        """`[N]`: what `token_probs` give to tokens `[N]`, at no cost in the vocabulary."""
        log_phi = self.prediction[at].log_prob_of(tokens)
        weights, copied = self._emitted(at, posterior)
        columns = self.potentials.emission.columns(tokens, at[1]).to(self.dtype)
        mixed = (log_phi + logsumexp(weights + columns, -1)).exp()
        if self.copies is not None:
            emits = self.copies.tokens[at[0]] == tokens[:, None]
            mixed = mixed + (copied * emits).sum(-1)
        return torch.where(self._coupled(at, posterior), mixed, log_phi.exp())

    def _emitted(self, at: At, posterior: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`log posterior(z) / s(z)`, `[N, H]`: weights of emissions; and the copies' posterior."""
        states, copied = posterior.split((self.potentials.num_latents, self.num_copies), -1)
        weights, evidence = safe_log(states), self.evidence[at][:, : states.shape[-1]]
        return weights - torch.where(weights == -torch.inf, 0, evidence), copied

    def _coupled(self, at: At, posterior: torch.Tensor) -> torch.Tensor:
        return self.active[at[0]] & (posterior > 0).any(-1)

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
            at = (~coupled & ~self._observed).nonzero(as_tuple=True)
            scores[at] = self.prediction[at[-2:]].dense().to(scores.dtype)
        if self.copies is not None:
            copied, place = (latents >= number) & coupled, (latents - number).clamp(min=0)
            tokens = self.copies.tokens.expand(*latents.shape[:-1], -1).gather(-1, place)
            scores = pin_tokens(copied, tokens, scores, in_place=True)
        return self.pinned(scores, in_place=True)

    @property
    def _observed(self) -> torch.Tensor:
        return ~self.masked if self.present is None else ~self.masked & self.present

    def pinned(self, log_probs: torch.Tensor, in_place: bool) -> torch.Tensor:
        """Log-probabilities `[*S, B, L, V]` that are sure of the observed tokens."""
        where, tokens = (t.expand(log_probs.shape[:-1]) for t in (self._observed, self.tokens))
        return pin_tokens(where, tokens, log_probs, in_place)
