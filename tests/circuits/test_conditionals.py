"""Tokens drawn one by one, tokens given all others, and sets of tokens, against enumeration."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_logs_agree
from brute_force import Case
from cases import ALL, CASES, random_case

from codd_hf.circuits.distribution.conditionals import draw_left_to_right, leave_one_out
from codd_hf.circuits.random import draw_categorical

DENSE = [name for name in ALL if ALL[name].top_k is None]


def conditional(exact, i: int, fixed: dict[int, int]) -> torch.Tensor | None:
    """`[V]`: the law of the token at `i` given tokens elsewhere; None if those are impossible."""
    agrees = torch.ones(len(exact.tokens), dtype=torch.bool)
    for position, token in fixed.items():
        agrees &= exact.tokens[:, exact.positions.index(position)] == token
    log_prob = exact.log_prob.masked_fill(~agrees, -torch.inf)
    if not bool((log_prob > -torch.inf).any()):
        return None
    at = torch.nn.functional.one_hot(exact.tokens[:, exact.positions.index(i)], exact.vocab)
    return (log_prob.exp()[:, None] * at).sum(0) / log_prob.exp().sum()


def draw_half(case: Case, seed: int):
    """Draws about half of the masked positions one by one and keeps the laws they came from."""
    ours = case.distribution()
    g = torch.Generator().manual_seed(seed)
    where = (torch.rand(ours.masked.shape, generator=g) < 0.6) & ours.masked
    numbers = torch.rand(ours.masked.shape, generator=g)
    laws = {}

    def draw(i, law, rows):
        laws.update({(int(row), i): law[k] for k, row in enumerate(rows)})
        return draw_categorical(law, numbers[rows, i])

    return ours, where, draw_left_to_right(ours, where, draw), laws


@pytest.mark.parametrize("name", ALL)
def test_each_token_is_drawn_from_its_conditional_given_those_before(name):
    case = ALL[name]
    for seed in range(2):
        _, where, tokens, laws = draw_half(case, seed)
        for row in range(len(case)):
            exact = case.enumerate(row)
            fixed = {}
            for i in where[row].nonzero()[:, 0].tolist():
                expected = conditional(exact, i, fixed)
                if expected is None:
                    break  # impossible from the start, or drawn with a rounded-off probability
                error = (laws[row, i].double() - expected).abs()
                assert float(error.max()) < max(1e-5, 4 * exact.rounding)
                fixed[i] = int(tokens[row, i])


@pytest.mark.parametrize("name", DENSE)
def test_leave_one_out_is_the_conditional_given_all_other_known_tokens(name):
    case = ALL[name]
    before, where, tokens, _ = draw_half(case, 3)
    known = where | before.observed
    tokens = torch.where(before.observed, before.tokens, tokens)
    ours = leave_one_out(
        before, tokens, known, before.latents.evidence, before.prediction.log_prob_of(tokens)
    )
    for row in range(len(case)):
        exact = case.enumerate(row)
        drawn = {i: int(tokens[row, i]) for i in where[row].nonzero()[:, 0].tolist()}
        for i, token in drawn.items():
            expected = conditional(exact, i, {p: t for p, t in drawn.items() if p != i})
            if expected is not None and conditional(exact, i, drawn) is not None:
                error = abs(float(ours[row, i]) - float(expected[token]))
                assert error < max(1e-5, 4 * exact.rounding)


def test_leave_one_out_takes_a_token_as_it_was_predicted_in_an_earlier_pass():
    """The token's own factor is that of the pass it was drawn in, all else that of this pass."""
    earlier = random_case(7, observed="none").distribution()
    case = random_case(8, observed="none")
    case.initial, case.transition, case.emission = (
        earlier.potentials.initial,
        earlier.potentials.transition.log_potential,
        earlier.potentials.emission.dense(),
    )
    mixed = random_case(8, observed="none")
    mixed.initial, mixed.transition, mixed.emission = case.initial, case.transition, case.emission
    mixed.logits = case.logits.clone()
    mixed.logits[:, 1] = earlier.logits[:, 1]
    tokens = torch.tensor([[1, 2, 3, 0]] * 3)
    known = torch.tensor([[True, True, False, True]] * 3)
    now = case.distribution().condition(tokens, known)
    evidence, log_probs = now.latents.evidence.clone(), torch.zeros(3, 4)
    evidence[:, 1] = earlier.latents.evidence[:, 1]
    log_probs[:, 1] = earlier.prediction.log_prob_of(tokens)[:, 1]
    ours = leave_one_out(now, tokens, known, evidence, log_probs)
    for row in range(3):
        expected = conditional(mixed.enumerate(row), 1, {0: 1, 3: 0})
        assert abs(float(ours[row, 1]) - float(expected[2])) < 1e-5


@pytest.mark.parametrize(
    "name", ["untied", "tied", "all masked", "inactive rows", "inactive rows, everything"]
)
def test_nested_sets_of_tokens_are_summed_out_in_one_call(name):
    case = CASES[name]
    ours = case.distribution()
    batch, length, vocab = case.logits.shape
    g = torch.Generator().manual_seed(1)
    value = torch.randint(vocab, (batch, length), generator=g)
    order = torch.rand(batch, length, generator=g).argsort(-1)
    nested = (order < torch.arange(length + 1)[:, None, None]) & ours.masked
    partial = ours.partial_log_prob(value, nested)
    assert partial.shape == (length + 1, batch)
    for row in range(batch):
        exact = case.enumerate(row)
        for n in range(length + 1):
            at = exact.positions
            agrees = ((exact.tokens == value[row, at]) | ~nested[n, row, at]).all(1)
            assert_logs_agree(partial[n, row], exact.log_prob[agrees].logsumexp(0))


def test_tokens_taken_out_at_some_positions_have_no_probability_there():
    case = random_case(9, observed="none")
    where = torch.tensor([[True, False, True, False]] * 3)
    ours = case.distribution().without(torch.tensor([0, 2]), where)
    case.logits = case.logits.clone()
    for token in (0, 2):
        case.logits[:, [0, 2], token] = -torch.inf
    for row in range(3):
        exact = case.enumerate(row)
        assert float((ours.marginals[row].double() - exact.marginals).abs().max()) < 1e-5
    assert (ours.marginals[:, [0, 2]][..., [0, 2]] == 0).all()
    with pytest.raises(ValueError, match="holds evidence in place of logits"):
        CASES["top 1"].distribution().without(torch.tensor([0]))
