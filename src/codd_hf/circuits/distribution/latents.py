"""The chain over the latents of a coupled distribution: evidence, recursions, what they say."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..context.copies import CopyStates, CopySteps
from ..evidence.dense import DenseEvidence, EmissionSummary, hard_evidence, summarise
from ..evidence.grouped import GroupedEvidence
from ..evidence.lists import TopKEvidence
from ..lazy import cached_property
from ..numerics import sure_where
from ..potentials.transitions import StepTransitions
from ..recursions import chain as chains


class LatentChain:
    """What a coupled distribution knows of its latents.

    [`CoupledCategorical`] is this with a public interface over tokens; its arguments are the
    attributes used here. `H` states of the circuit are followed by `J` copy states, if any.
    """

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
                prediction = DenseEvidence.from_logits(logits, *how)
                undefined = prediction.log_probs[..., 0].isnan() & self.masked
                if bool(undefined.any()):
                    raise ValueError(
                        "`logits` hold NaN or infinity in row "
                        f"{int(undefined.nonzero()[0, 0])}: check what made them."
                    )
                if not prediction.log_probs.requires_grad:
                    self._known_in_prediction = True
                    self._sure_where_observed(prediction.log_probs, ours=True)
                return prediction
            if self.grouped:
                groups = self.potentials.token_groups_without(self.forbidden)
                prediction = GroupedEvidence.from_logits(logits, self.top_k, *how, groups=groups)
            else:
                prediction = TopKEvidence.from_logits(logits, self.top_k, *how)
        if isinstance(prediction, TopKEvidence) and prediction.log_marginal is None:
            return prediction.spread_by_law(self.potentials.law_of_rest(self.forbidden))
        return prediction

    def _sure_where_observed(self, log_probs: torch.Tensor, ours: bool = False) -> torch.Tensor:
        """Log-probabilities `[*S, B, L, V]` that are sure of what is observed; in place if ours."""
        shape = log_probs.shape[:-1]
        return sure_where(self.observed.expand(shape), self.tokens.expand(shape), log_probs, ours)

    @cached_property
    def _log_phi(self) -> torch.Tensor:
        """`[B, L, V]` log-probabilities of the backbone; -inf for forbidden tokens."""
        return self._prediction.dense()

    def _soft_evidence(self, evaluate, log_prob_of=None) -> torch.Tensor:
        """`[B, L, H + J]`: of what is masked, else hard.

        Args:
            evaluate: maps predictions and their positions to evidence `[N, H]`.
            log_prob_of: what copied tokens are taken to have; default, the prediction's.
        """
        emission, wanted = self.potentials.emission, self.masked & self.active[:, None]
        if isinstance(self._prediction, TopKEvidence):
            # Cheap enough to be computed everywhere, which keeps all shapes fixed.
            positions = torch.arange(wanted.shape[1], device=wanted.device).repeat(len(wanted))
            soft = evaluate(self._prediction.flat(), positions).to(self._dtype)
            evidence = soft.unflatten(0, wanted.shape)
            if not bool(wanted.all()):
                hard = hard_evidence(emission, self.tokens).to(self._dtype)
                evidence = torch.where(wanted[..., None], evidence, hard)
        else:
            rows, positions = wanted.nonzero(as_tuple=True)
            soft = evaluate(self._prediction[rows, positions], positions).to(self._dtype)
            hard = hard_evidence(emission, self.tokens).to(self._dtype)
            evidence = hard.index_put((rows, positions), soft)
        if (copies := self._copies) is not None:
            soft = copies.soft_evidence(log_prob_of or self._prediction.log_prob_of)
            hard = copies.hard_evidence(self.tokens)
            copied = torch.where(wanted[..., None], soft.to(self._dtype), hard)
            evidence = torch.cat((evidence, copied), -1)
        if self._all_active:
            return evidence
        return torch.where(self.active[:, None, None], evidence, 0)

    def _hard_evidence(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[S * B, L, H + J]` log-evidence without context of tokens `[S * B, L]`."""
        evidence = hard_evidence(self.potentials.emission, tokens).to(self._dtype)
        if self._copies is not None:
            by_row = tokens.unflatten(0, (-1, *self.batch_shape))
            copied = self._copies.hard_evidence(by_row).flatten(0, 1)
            evidence = torch.cat((evidence, copied), -1)
        active = self.active.repeat(len(tokens) // self.batch_shape[0])
        return torch.where(active[:, None, None], evidence, 0)

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
        law = self._prediction.log_marginal
        if law is self.potentials.log_marginal:
            return self.potentials.top_k_summary
        # Another law than the circuit's: what is kept with the circuit is not for it.
        return summarise(self.potentials.emission, law)

    @cached_property
    def _copies(self) -> CopyStates | None:
        copies = None if self.context is None else self.context.copies
        return None if copies is None else copies.to(self._dtype)

    @cached_property
    def _steps(self) -> StepTransitions | CopySteps:
        steps = self.potentials.transition.to(self._dtype)
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

    def filter_with(self, other: LatentChain) -> None:
        """Runs the recursions behind both `log_partition`s at once.

        Args:
            other: the same but for the evidence temperature.
        """
        for name in ("_copies", "_steps", "_initial"):
            setattr(other, name, getattr(self, name))
        stacked = self._chain(torch.cat((self._evidence, other._evidence)))
        both = self._checked(chains.forward_filter(stacked))
        (batch,) = self.batch_shape
        self._filter, other._filter = both.copy(0, batch), both.copy(1, batch)

    def _checked(self, filtered: chains.Filter) -> chains.Filter:
        if bool(filtered.log_partition.isnan().any()):
            raise ValueError(
                "`logits`, `context` or the potentials hold NaN: check what made them."
            )
        return filtered

    def _check_possible(self) -> None:
        """Raises a ValueError where `Z` is zero: nothing can be divided by it."""
        impossible = (self.active & (self.log_partition == -torch.inf)).nonzero()[:, 0].tolist()
        if impossible:
            raise ValueError(
                f"`log_partition` is -inf for rows {impossible}: the circuit rules out every "
                "completion that the backbone allows; use `with_active` to leave them "
                "factorized, or smooth the potentials."
            )

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

    @cached_property
    def latent_posterior(self) -> torch.Tensor:
        """`[B, L, H + J]`: the law of each latent; zeros at absent positions.

        `J` copy states come last if the context has any.
        """
        return chains.posterior(self._chain(self._evidence), self._filter)

    @property
    def _num_copies(self) -> int:
        return 0 if self._copies is None else self._copies.tokens.shape[1]
