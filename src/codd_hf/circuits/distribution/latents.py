"""The latents of coupled windows, and the exact conditionals of single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn import functional as F

from ..context.maps import Context, CopySteps
from ..evidence.dense import DenseEvidence, best_evidence, log_probs_given, mix_tokens
from ..evidence.lists import ListedEvidence
from ..potentials.circuit import Potentials, StepTransitions
from ..random import Generators
from ..recursions.chain import Chain, Filter, full_precision, logsumexp, safe_log

At = tuple[torch.Tensor, ...]
"""Rows `[N]` of a batch and their positions `[N]`."""


@dataclass
class Latents:
    """The latent chain of windows, whose `H` states `J` copy states follow, if any.

    The tokens `[B, L]` are 0 where masked or absent; evidence is of the prediction where `masked`
    and of a token elsewhere, and there is none in rows that are not `active`.
    """

    potentials: Potentials
    prediction: DenseEvidence | ListedEvidence
    tokens: torch.Tensor
    masked: torch.Tensor
    present: torch.Tensor | None
    active: torch.Tensor
    context: Context

    def __post_init__(self) -> None:
        self.device, self.copies = self.tokens.device, self.context.copies
        self.emission, self.num_latents = self.potentials.emission, self.potentials.num_latents
        self.num_copies = 0 if self.copies is None else self.copies.tokens.shape[1]
        # Of evidence and messages: float32, or float64 if the emissions are.
        self.dtype = torch.promote_types(self.emission.dtype, torch.float32)

    @cached_property
    def steps(self) -> StepTransitions | CopySteps:
        """The transitions."""
        steps = self.potentials.transition.to(self.dtype)
        return steps if self.copies is None else CopySteps(steps, self.copies)

    @cached_property
    def prior(self) -> torch.Tensor:
        """`[B, L, H + J]`: log-weights by the context, and the initial ones where a row starts."""
        initial, latent = self.potentials.initial.to(self.dtype), self.context.latent
        if self.copies is not None:
            initial = self.copies.initial(initial)
        prior = initial.new_zeros(*self.tokens.shape, initial.shape[-1])
        if latent is not None:
            latent = latent.to(self.dtype).masked_fill(~self.active[:, None, None], 0)
            prior = prior + F.pad(latent, (0, self.num_copies))
        return Chain(self.steps, prior, self.present).started(initial).evidence

    def chain(self, evidence: torch.Tensor) -> Chain:
        """The chain with log-evidence `[S * B, L, H + J]`, of one or more copies of the batch."""
        copies = len(evidence) // len(self.tokens)
        present = None if self.present is None else self.present.repeat(copies, 1)
        return Chain(self.steps, evidence + self.prior.repeat(copies, 1, 1), present)

    @cached_property
    def evidence(self) -> torch.Tensor:
        """`[B, L, H + J]`: the log-evidence of predictions where masked, of tokens elsewhere."""
        at = (self.masked & self.active[:, None]).nonzero(as_tuple=True)
        soft = self.prediction[at].soft_evidence(self.emission, at[1])
        if self.copies is not None:
            copied = self.copies.soft_evidence(self.prediction.log_prob_of)
            soft = torch.cat((soft, copied[at]), -1)
        return self.hard_evidence(self.tokens).index_put(at, soft.to(self.dtype))

    def evidence_of_best_tokens(self) -> torch.Tensor:
        """`evidence` with a maximum over tokens in place of the sum."""
        at = self.masked.nonzero(as_tuple=True)
        log_phi = self.prediction[at].dense()
        best = best_evidence(log_phi, at[1], self.emission).to(self.dtype)
        best = torch.cat((best, self.evidence[at][:, self.num_latents :]), -1)
        best = torch.where(self.active[at[0], None], best, log_phi.amax(-1, keepdim=True))
        return self.evidence.index_put(at, best)

    @full_precision
    def hard_evidence(self, tokens: torch.Tensor, at: At | None = None) -> torch.Tensor:
        """`[..., H + J]`: log-evidence of tokens `[..., B, L]`, or of `[N]` at some positions."""
        if at is None:
            rows, positions = (torch.arange(n, device=self.device) for n in tokens.shape[-2:])
            at = rows[:, None], positions
        evidence = self.emission.columns(tokens, at[1]).to(self.dtype)
        if self.copies is not None:
            emits = self.copies.tokens[at[0]] == tokens[..., None]
            copied = torch.where(emits, self.copies.weight[at[0]], -torch.inf)
            evidence = torch.cat((evidence, copied), -1)
        return torch.where(self.active[at[0], None], evidence, 0)

    @cached_property
    def own_chain(self) -> Chain:
        """The chain with the latents' own evidence."""
        return self.chain(self.evidence)

    @cached_property
    def filter(self) -> Filter:
        """The forward pass over it."""
        return self._checked(self.own_chain.filter())

    def _checked(self, filtered: Filter) -> Filter:
        undefined = filtered.log_partition.isnan().nonzero()
        if len(undefined):
            raise ValueError(
                "`logits`, `context` or the potentials hold NaN or infinity in row "
                f"{int(undefined[0]) % len(self.tokens)}: check what made them."
            )
        return filtered

    def _filter_with(self, evidence: torch.Tensor) -> Filter:
        """`filter`, and the forward pass over other evidence `[S * B, L, H + J]`, at once."""
        both = self.chain(torch.cat((self.evidence, evidence))).filter()
        sizes = len(self.evidence), len(evidence)
        parts = [tensor.split(sizes) for tensor in self._checked(both)]
        self.filter, other = (Filter(*part) for part in zip(*parts, strict=True))
        return other

    def filter_with(self, other: Latents) -> None:
        """Runs both forward passes at once; all but the predictions must be the same."""
        other.steps, other.prior = self.steps, self.prior
        other.filter = self._filter_with(other.evidence)

    def log_weight(self, evidence: torch.Tensor) -> torch.Tensor:
        """`[*S, B]`: log of the sum over paths with other log-evidence `[*S, B, L, H + J]`.

        The forward pass over the chain's own runs along, if it has not been asked for yet.
        """
        stacked = evidence.flatten(0, -3)
        if "filter" in self.__dict__:
            filtered = self._checked(self.chain(stacked).filter())
        else:
            filtered = self._filter_with(stacked)
        return filtered.log_partition.view(evidence.shape[:-2])

    @cached_property
    def posterior(self) -> torch.Tensor:
        """`[B, L, H + J]`: the distribution of each latent; zeros at absent positions."""
        return self.own_chain.posterior(self.filter.messages)

    def sample(self, sample_shape: tuple[int, ...], generator: Generators) -> torch.Tensor:
        """Joint samples `[*sample_shape, B, L]` of the latent path."""
        return self.own_chain.sample(self.filter.messages, sample_shape, generator)

    def token_probs(self, at: At, posterior: torch.Tensor) -> torch.Tensor:
        """`[N, V]`: distributions of the tokens at masked positions, given those of the latents.

        They are the backbone's own in inactive rows and where the `posterior` `[N, H + J]` is zero.
        """
        log_phi = self.prediction[at].dense()
        weights, copied = self._emitted(at, posterior)
        mixed = mix_tokens(log_phi, weights, at[1], self.emission)
        if self.copies is not None:
            own = posterior[:, : self.num_latents].sum(-1, keepdim=True)
            tokens, copied = self.copies.tokens[at[0]], copied.to(mixed.dtype)
            mixed = (own * mixed).scatter_add(1, tokens, copied)
        coupled = self._coupled(at, posterior)
        return mixed if bool(coupled.all()) else torch.where(coupled[:, None], mixed, log_phi.exp())

    def prob_of(self, tokens: torch.Tensor, at: At, posterior: torch.Tensor) -> torch.Tensor:
        """`[N]`: what `token_probs` give to tokens `[N]`, at no cost in the vocabulary."""
        log_phi = self.prediction[at].log_prob_of(tokens)
        weights, copied = self._emitted(at, posterior)
        columns = self.emission.columns(tokens, at[1]).to(self.dtype)
        mixed = (log_phi + logsumexp(weights + columns, -1)).exp()
        if self.copies is not None:
            emits = self.copies.tokens[at[0]] == tokens[:, None]
            mixed = mixed + (copied * emits).sum(-1)
        return torch.where(self._coupled(at, posterior), mixed, log_phi.exp())

    def _emitted(self, at: At, posterior: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`log posterior(z) / s(z)`, `[N, H]`: weights of emissions; and the copies' posterior."""
        states, copied = posterior.split((self.num_latents, self.num_copies), -1)
        weights, evidence = safe_log(states), self.evidence[at][:, : self.num_latents]
        return weights - torch.where(weights == -torch.inf, 0, evidence), copied

    def _coupled(self, at: At, posterior: torch.Tensor) -> torch.Tensor:
        return self.active[at[0]] & (posterior > 0).any(-1)

    def log_probs_given(self, latents: torch.Tensor) -> torch.Tensor:
        """`[*S, B, L, V]`: log-probabilities of the tokens given latents `[*S, B, L]`."""
        # The sum over the vocabulary is the evidence of the latent, which is known already.
        total = self.evidence.expand(*latents.shape, -1).gather(-1, latents[..., None])[..., 0]
        coupled = self.masked & self.active[:, None] & (total > -torch.inf)
        total, states = total.masked_fill(~coupled, 0), latents.clamp(max=self.num_latents - 1)
        scores = log_probs_given(self.prediction, self.emission, states, total)
        at = (~coupled & ~self._observed).nonzero(as_tuple=True)
        scores[at] = self.prediction[at[-2:]].dense().to(scores.dtype)
        if self.copies is not None:
            place = latents - self.num_latents
            tokens = self.copies.tokens.expand(*latents.shape[:-1], -1)
            tokens = tokens.gather(-1, place.clamp(min=0))
            scores = pin_tokens((place >= 0) & coupled, tokens, scores)
        return self.pinned(scores)

    @property
    def _observed(self) -> torch.Tensor:
        return ~self.masked if self.present is None else ~self.masked & self.present

    def pinned(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[*S, B, L, V]` that are sure of the observed tokens.

        They are changed in place unless they have a gradient.
        """
        where, tokens = (t.expand(log_probs.shape[:-1]) for t in (self._observed, self.tokens))
        return pin_tokens(where, tokens, log_probs)


class IncrementalPosterior:
    """Posteriors of tokens over the same `B` windows, while others become known one by one.

    A token changes the evidence of one position. It renews the messages from the left behind that
    position and those from the right before it, over the windows that got a token, as far as
    positions are `wanted` `[B, L]`. All `latents`, alike but for the evidence temperature, go
    through it together.
    """

    def __init__(self, latents: Sequence[Latents], wanted: torch.Tensor) -> None:
        self.latents, self.wanted, self.device = latents, wanted.clone(), wanted.device
        self._chain = latents[0].chain(torch.cat([each.evidence for each in latents]))
        messages = torch.cat([each.filter.messages for each in latents])
        self._past = messages.transpose(0, 1).contiguous()  # [L, S * B, H + J]
        self._future = self._chain.one.expand_as(self._past).clone()
        # Where the windows of a distribution stand in the stacked chains.
        self._rows = torch.arange(len(messages), device=self.device).view(len(latents), -1)
        self._renew(self._rows[0], wanted.shape[1], wanted.shape[1] - 1)

    def token_probs(self, index: int, at: At) -> torch.Tensor:
        """`[N, V]`: of the tokens at wanted positions, given what is known, by a distribution."""
        return self.latents[index].token_probs(at, self._posterior(index, at))

    def prob_of(self, tokens: torch.Tensor, index: int, at: At) -> torch.Tensor:
        """`[N]`: what `token_probs` give to tokens `[N]`, at no cost in the vocabulary."""
        return self.latents[index].prob_of(tokens, at, self._posterior(index, at))

    def reveal(self, at: At, tokens: torch.Tensor) -> None:
        """Makes the tokens `[n]` at wanted positions known, one of a window, windows in order."""
        windows, positions = at
        evidence = self.latents[0].hard_evidence(tokens, at) + self.latents[0].prior[at]
        self._chain.evidence[self._rows[:, windows], positions] = evidence
        self.wanted[at] = False
        self._renew(windows, int(positions.min()), int(positions.max()))

    @torch.no_grad()
    @full_precision
    def _renew(self, windows: torch.Tensor, first: int, last: int) -> None:
        """Messages of windows whose evidence has changed at positions `first` to `last`."""
        columns = self.wanted[windows].any(0).nonzero()[:, 0]
        if len(columns) == 0:
            return
        rows = self._rows[:, windows].flatten()
        every = len(windows) == len(self.wanted)
        chain = replace(self._chain) if every else self._chain.select(rows)
        before = None if first == 0 else self._past[first - 1, rows]
        for i, (message, _) in enumerate(chain.forward(first, int(columns[-1]), before), first):
            self._past[i, rows] = message
        futures = chain.backward(int(columns[0]), last, self._future[last, rows])
        for i, future in zip(range(last, -1, -1), futures, strict=False):
            self._future[i, rows] = future

    def _posterior(self, index: int, at: At) -> torch.Tensor:
        """`[N, H + J]`: distributions of the latents; zeros where nothing is possible."""
        place = at[1], self._rows[index, at[0]]
        return self._chain.probs(self._past[place], self._future[place])


def pin_tokens(where: torch.Tensor, tokens: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[..., V]` that are sure of `tokens` `[...]` where `where` `[...]` says so.

    They are changed in place unless they have a gradient.
    """
    if torch.is_grad_enabled() and log_probs.requires_grad:
        log_probs = log_probs.clone()
    at = where.nonzero(as_tuple=True)
    log_probs[at] = -torch.inf
    log_probs[(*at, tokens[at])] = 0.0
    return log_probs
