"""What further tokens, other temperatures and factorized rows change, against enumeration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from agreement import assert_logs_agree, assert_probabilities_agree
from brute_force import Case, Enumeration
from cases import ALL, CASES, FORBIDDEN, enumerations, every_completion, random_case

from codd_hf.circuits import CoupledCategorical
from codd_hf.circuits.distribution.latents import IncrementalPosterior
from codd_hf.circuits.random import draw_categorical

DENSE = [name for name in ALL if ALL[name].top_k is None]


def given(exact: Enumeration, fixed: dict[int, int]) -> torch.Tensor:
    """`[X]`: joint log-probabilities where tokens `fixed` by position agree, -inf elsewhere."""
    agrees = torch.ones(len(exact.tokens), dtype=torch.bool)
    for position, token in fixed.items():
        if position in exact.positions:
            agrees &= exact.tokens[:, exact.positions.index(position)] == token
    return exact.log_prob.masked_fill(~agrees, -torch.inf)


def conditional(exact: Enumeration, i: int, fixed: dict[int, int]) -> torch.Tensor | None:
    """`[V]`: the distribution of the token at `i` given others; None if those are impossible."""
    joint = given(exact, fixed)
    if not bool((joint > -torch.inf).any()):
        return None
    at = torch.nn.functional.one_hot(exact.tokens[:, exact.positions.index(i)], exact.vocab)
    return (joint.exp()[:, None] * at).sum(0) / joint.exp().sum()


def some_tokens(case: Case, seed: int, share: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens `[B, L]`, and which of them to take."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(case.logits.shape[-1], case.logits.shape[:2], generator=g)
    return tokens, torch.rand(tokens.shape, generator=g) < share


@pytest.mark.parametrize("name", [n for n in ALL if "hard zeros" not in n and "forced" not in n])
def test_conditioning_is_bayes_rule_on_the_joint(name):
    case = ALL[name]
    tokens, further = some_tokens(case, 0)
    before = case.distribution()
    conditioned = before.condition(tokens, further)
    assert torch.equal(conditioned.tokens[before.observed], before.tokens[before.observed])
    for row, exact in enumerate(enumerations(name)):
        at = (further & before.masked)[row].nonzero()[:, 0].tolist()
        joint = given(exact, {i: int(tokens[row, i]) for i in at})
        if not exact.positions or not bool((joint > -torch.inf).any()):
            continue  # nothing is there, or the further tokens are impossible
        expected, close = joint - joint.logsumexp(0), max(1e-5, exact.rounding)
        ours = conditioned.log_prob(every_completion(case, row))[:, row]
        assert_logs_agree(ours, expected, close)
        law = torch.nn.functional.one_hot(exact.tokens, exact.vocab).double()
        marginals = torch.einsum("x,xnv->nv", expected.exp(), law)
        assert_probabilities_agree(conditioned.marginals[row, exact.positions], marginals, close)


def test_conditioning_in_steps_is_conditioning_at_once_and_leaves_what_was_there():
    ours = CASES["all masked"].distribution()
    before = ours.log_partition.clone(), ours.factorized_logits.clone()
    tokens, first = (
        torch.tensor([[0, 1, 2, 3]] * 3),
        torch.tensor([[True, False, False, False]] * 3),
    )
    again = ours.condition(tokens, first).condition(tokens.flip(1), first | first.roll(2, 1))
    expected = torch.tensor([[0, 0, 1, 0]] * 3)
    assert torch.equal(again.tokens, expected)
    at_once = ours.condition(expected, first | first.roll(2, 1))
    assert_logs_agree(again.log_partition, at_once.log_partition)
    assert torch.equal(again.factorized_logits, at_once.factorized_logits)
    assert ours.masked.all()
    assert torch.equal(ours.log_partition, before[0])
    assert torch.equal(ours.factorized_logits, before[1])


@pytest.mark.parametrize("name", ["untied", "tied", "all masked", "inactive rows", *DENSE[-20:]])
def test_partial_log_prob_sums_the_other_tokens_out_for_many_sets_at_once(name):
    case = ALL[name]
    ours, (value, _) = case.distribution(), some_tokens(case, 1)
    order = torch.rand(value.shape, generator=torch.Generator().manual_seed(1)).argsort(-1)
    nested = (order < torch.arange(value.shape[1] + 1)[:, None, None]) & ours.masked
    partial = ours.partial_log_prob(value, nested)
    for row, exact in enumerate(enumerations(name)):
        for n, known in enumerate(nested[:, row]):
            at = known.nonzero()[:, 0].tolist()
            expected = given(exact, {i: int(value[row, i]) for i in at}).logsumexp(0)
            assert_logs_agree(partial[n, row], expected, max(1e-5, exact.rounding))


@pytest.mark.parametrize("temperature", [0.01, 2.0])
def test_with_temperature_is_the_distribution_made_at_that_temperature(temperature):
    case = random_case(100, context=1.0, forbidden=FORBIDDEN)
    made = replace(case, options=case.options | {"temperature": temperature})
    changed = case.distribution().with_temperature(temperature)
    for row in range(3):
        exact = made.enumerate(row)
        if bool((exact.log_prob > -torch.inf).any()):
            ours = changed.log_prob(every_completion(case, row))[:, row]
            assert_logs_agree(ours, exact.log_prob, max(1e-5, exact.rounding))


def test_with_active_is_factorized_in_the_other_rows():
    case, active = random_case(101, context=1.0), torch.tensor([True, False, True])
    changed = case.distribution().with_active(active)
    made = replace(case, options=case.options | {"active": active})
    for row in range(3):
        ours = changed.log_prob(every_completion(case, row))[:, row]
        assert_logs_agree(ours, made.enumerate(row).log_prob)
    again = changed.with_active(torch.ones(3, dtype=torch.bool))
    assert_logs_agree(again.log_partition, case.distribution().log_partition)


def test_tokens_taken_out_have_no_probability():
    case = random_case(9, observed="none")
    ours = case.distribution().without(torch.tensor([0, 2]))
    case.logits[..., [0, 2]] = -torch.inf
    for row in range(3):
        assert_probabilities_agree(ours.marginals[row], case.enumerate(row).marginals)
    with pytest.raises(ValueError, match="holds evidence in place of logits"):
        CASES["top 1"].distribution().without(torch.tensor([0]))


def at_two_temperatures(distribution: CoupledCategorical) -> list[CoupledCategorical]:
    if not isinstance(distribution.logits, torch.Tensor):
        return [distribution]
    other = distribution.with_temperature(0.7)
    distribution.latents.filter_with(other.latents)
    return [distribution, other]


@pytest.mark.parametrize("name", ALL)
def test_token_probs_are_the_conditionals_given_the_tokens_revealed_so_far(name):
    case, exact = ALL[name], enumerations(name)
    distributions = at_two_temperatures(case.distribution())
    first, last = distributions[0], distributions[-1]
    close = max(1e-5, *(4 * e.rounding for e in exact))
    g = torch.Generator().manual_seed(0)
    order = torch.rand(first.masked.shape, generator=g)
    left, fixed = first.masked.clone(), [{} for _ in exact]
    latents = [distribution.latents for distribution in distributions]
    known, tokens = IncrementalPosterior(latents, left), torch.zeros_like(first.tokens)
    while bool(left.any()):
        at = left.nonzero(as_tuple=True)
        probs, others = known.token_probs(0, at), known.token_probs(len(distributions) - 1, at)
        by_condition = last.condition(tokens, first.masked & ~left)
        possible = (by_condition.log_partition > -torch.inf)[at[0]]
        assert_probabilities_agree(others[possible], by_condition.marginals[at][possible], close)
        value = torch.randint(case.logits.shape[-1], at[0].shape, generator=g)
        expected = probs.gather(1, value[:, None])[:, 0]
        assert_probabilities_agree(known.prob_of(value, 0, at), expected, close)
        for law, row, i in zip(probs, *(t.tolist() for t in at), strict=True):
            expected = conditional(exact[row], i, fixed[row])
            if expected is not None:  # else drawn with a rounded-off probability
                assert_probabilities_agree(law, expected.to(law.dtype), close)

        # Some rows get a token, each at a position of its own.
        rows = (left.any(-1) & (torch.rand(len(left), generator=g) < 0.7)).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        at = rows, order.masked_fill(~left, -1).argmax(-1)[rows]
        drawn = draw_categorical(known.token_probs(0, at), torch.rand(len(rows), generator=g))
        known.reveal(at, drawn)
        tokens[at], left[at] = drawn, False
        for row, i, token in zip(*(t.tolist() for t in (*at, drawn)), strict=True):
            fixed[row][i] = token


def test_only_positions_that_are_wanted_are_kept_up_to_date():
    """What nobody asks for costs nothing, and changes nothing of what is asked for."""
    ours = random_case(3, observed="none").distribution()
    wanted = torch.tensor([[False, True, True, False]] * 3)
    rows, tokens = torch.arange(3), torch.tensor([0, 1, 2])
    known = IncrementalPosterior([ours.latents], wanted)
    known.reveal((rows, torch.full_like(rows, 2)), tokens)
    revealed = ours.condition(tokens[:, None].expand(-1, 4), wanted & (torch.arange(4) == 2))
    probs = known.token_probs(0, (rows, torch.ones_like(rows)))
    assert_probabilities_agree(probs, revealed.marginals[:, 1])
