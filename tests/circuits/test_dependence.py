"""What tokens tell of each other, against enumeration."""

from __future__ import annotations

import pytest
import torch
from cases import ALL, enumerations

from codd_hf.circuits import shared_information

SAMPLES = 250
NAMES = (
    "tied",
    "untied",
    "absent inside",
    "inactive rows",
    "hard zeros",
    "top 2, grouped, everything",
)


def pointwise(exact, order: list[int]) -> torch.Tensor:
    """`[X, n]`: log of `p(x_i, x_before) / (p(x_before) p(x_i))` at every position."""
    prob = exact.log_prob.exp()

    def log_prob_of(columns: list[int]) -> torch.Tensor:
        group = (exact.tokens[:, columns] * exact.vocab ** torch.arange(len(columns))).sum(1)
        size = exact.vocab ** len(columns)
        return torch.zeros(size, dtype=prob.dtype).index_add(0, group, prob)[group].log()

    told = torch.zeros(exact.tokens.shape, dtype=prob.dtype)
    for number, i in enumerate(order):
        before = order[:number]
        told[:, i] = log_prob_of([*before, i]) - log_prob_of(before) - log_prob_of([i])
    return told


@pytest.mark.parametrize("name", NAMES)
def test_information_shared_with_those_before_is_that_of_enumeration(name):
    case, generator = ALL[name], torch.Generator().manual_seed(0)
    distribution = case.distribution()
    ranks = torch.rand(distribution.tokens.shape, generator=generator).argsort(1)
    found = shared_information(distribution, ranks, SAMPLES, generator)
    assert (found[~distribution.masked] == 0).all()
    for row, exact in enumerate(enumerations(name)):
        columns = sorted(range(len(exact.positions)), key=lambda k: ranks[row, exact.positions[k]])
        told, prob = pointwise(exact, columns), exact.log_prob.exp()
        told = told.masked_fill((prob == 0)[:, None], 0)
        mean = (prob[:, None] * told).sum(0)
        error = ((prob[:, None] * (told - mean) ** 2).sum(0) / SAMPLES).sqrt()
        assert ((found[row, exact.positions] - mean).abs() <= 4.5 * error + 1e-4).all()
        # The sum over a set is its dependence: entropies of single tokens minus the joint one.
        entropies = torch.special.entr(exact.marginals).sum()
        assert torch.isclose(mean.sum(), entropies - torch.special.entr(prob).sum(), atol=1e-6)


def test_independent_tokens_share_nothing():
    case = ALL["inactive rows"]
    ranks = torch.arange(case.logits.shape[1]).expand(case.logits.shape[:2])
    found = shared_information(case.distribution(), ranks, 3)
    assert (found[~case.options["active"]].abs() < 1e-5).all()
