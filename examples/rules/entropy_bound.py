"""Bounds on what tokens that are committed together may say of each other.

`EntropyBound` is the EB-Sampler's (arXiv 2505.24857): tokens are committed while their entropies,
all but the largest, add up to at most a bound, since their dependence, the sum of their entropies
minus their joint entropy, is no greater. In any order the entropies are given the tokens drawn
before.

A coupled law knows its own dependence, which `DependenceBound` bounds: entropies of the marginals
minus those given what is drawn, the tokens before in any order, the latent path else. That is the
dependence in the mean over draws. What the circuit does not know of is not in it.

Candidates come in the order of their confidence, where the paper's come in that of an error proxy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from common import Step, draw_while

from codd_hf import CoDDSchedulerOutput
from codd_hf.schedulers.strategies import best_scored


@dataclass
class EntropyBound:
    """Entropies but for the largest add up to at most `bound` nats."""

    bound: float

    def __call__(self, step: Step) -> CoDDSchedulerOutput:
        if not step.is_in_any_order:
            output = step.draw.independently(step.committable, step.at_least)
            return longest(
                step, output, entropy(step.marginals()), self.bound, largest_is_free=True
            )
        spent = torch.zeros(len(step.committable))
        largest = torch.zeros_like(spent)

        def goes_on(rows, columns, law):
            spent[rows] += entropy(law)
            largest[rows] = torch.maximum(largest[rows], entropy(law))
            return spent[rows] - largest[rows] <= self.bound

        return draw_while(step, goes_on)


@dataclass
class DependenceBound:
    """What the coupled tokens say of each other is at most `bound` nats."""

    bound: float

    def __call__(self, step: Step) -> CoDDSchedulerOutput:
        alone = entropy(step.marginals())
        if not step.is_in_any_order:
            output = step.draw.independently(step.committable, step.at_least)
            return longest(step, output, alone - entropy(output.pred_logits.exp()), self.bound)
        spent = torch.zeros(len(step.committable))

        def goes_on(rows, columns, law):
            spent[rows] += alone[rows, columns] - entropy(law)
            return spent[rows] <= self.bound

        return draw_while(step, goes_on)


def entropy(probs: torch.Tensor) -> torch.Tensor:
    """Nats `[...]` of distributions `[..., vocab]`."""
    return torch.special.entr(probs).sum(-1)


def longest(
    step: Step,
    output: CoDDSchedulerOutput,
    cost: torch.Tensor,
    bound: float,
    largest_is_free: bool = False,
) -> CoDDSchedulerOutput:
    """Commits the longest run of candidates, by confidence, whose costs stay within a bound."""
    scores = output.sampled_probs.masked_fill(~step.committable, -torch.inf)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    cost = cost.masked_fill(~step.committable, torch.inf).gather(-1, order)
    spent = cost.cumsum(-1)
    if largest_is_free:
        spent = spent - cost.cummax(-1).values
    count = (spent <= bound).long().cumprod(-1).sum(-1)
    where = best_scored(scores, step.committable, torch.maximum(count, step.at_least))
    kept = torch.where(where, output.sampled_tokens, step.draw.sample)
    return CoDDSchedulerOutput(kept, where, output.sampled_tokens, output.sampled_probs)
