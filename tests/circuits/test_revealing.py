"""Laws of tokens while others become known one after another, against enumeration."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_probabilities_agree
from cases import ALL, random_case
from test_conditionals import conditional

from codd_hf.circuits import CoupledCategorical
from codd_hf.circuits.distribution.incremental import IncrementalPosterior
from codd_hf.circuits.random import draw_categorical


def at_two_temperatures(distribution: CoupledCategorical) -> list[CoupledCategorical]:
    if not isinstance(distribution.logits, torch.Tensor):
        return [distribution]
    other = distribution.with_temperature(0.7)
    distribution.filter_with(other)
    return [distribution, other]


@pytest.mark.parametrize("name", ALL)
def test_laws_are_the_conditionals_given_the_tokens_revealed_so_far(name):
    case = ALL[name]
    distributions = at_two_temperatures(case.distribution())
    first, last = distributions[0], distributions[-1]
    exact = [case.enumerate(row) for row in range(len(case))]
    close = max(1e-5, *(4 * e.rounding for e in exact))
    g = torch.Generator().manual_seed(0)
    order = torch.rand(first.masked.shape, generator=g)
    left, fixed = first.masked.clone(), [{} for _ in exact]
    known = IncrementalPosterior(distributions, left)
    tokens = torch.zeros_like(first.tokens)
    while bool(left.any()):
        at = left.nonzero(as_tuple=True)
        laws = known.token_probs(0, at)
        given = last.condition(tokens, first.masked & ~left)
        possible = (given.log_partition > -torch.inf)[at[0]]
        others = known.token_probs(len(distributions) - 1, at)
        assert_probabilities_agree(others[possible], given.marginals[at][possible], close)
        value = torch.randint(case.logits.shape[-1], at[0].shape, generator=g)
        probs = laws.gather(1, value[:, None])[:, 0]
        assert_probabilities_agree(known.prob_of(value, 0, at), probs, close)
        for law, row, i in zip(laws, *(t.tolist() for t in at), strict=True):
            expected = conditional(exact[row], i, fixed[row])
            if expected is not None:  # else drawn with a rounded-off probability
                assert_probabilities_agree(law, expected.to(law.dtype), close)

        # Some rows get a token, each at a position of its own.
        rows = (left.any(-1) & (torch.rand(len(left), generator=g) < 0.7)).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        positions = order.masked_fill(~left, -1).argmax(-1)[rows]
        drawn = draw_categorical(
            known.token_probs(0, (rows, positions)), torch.rand(len(rows), generator=g)
        )
        known.reveal((rows, positions), drawn)
        tokens[rows, positions], left[rows, positions] = drawn, False
        for row, i, token in zip(*(t.tolist() for t in (rows, positions, drawn)), strict=True):
            fixed[row][i] = token


def test_only_positions_that_are_wanted_are_kept_up_to_date():
    """What nobody asks for costs nothing, and changes nothing of what is asked for."""
    ours = random_case(3, observed="none").distribution()
    wanted = torch.tensor([[False, True, True, False]] * 3)
    rows, tokens = torch.arange(3), torch.tensor([0, 1, 2])
    known = IncrementalPosterior([ours], wanted)
    known.reveal((rows, torch.full_like(rows, 2)), tokens)
    given = ours.condition(tokens[:, None].expand(-1, 4), wanted & (torch.arange(4) == 2))
    laws = known.token_probs(0, (rows, torch.ones_like(rows)))
    assert_probabilities_agree(laws, given.marginals[:, 1])
