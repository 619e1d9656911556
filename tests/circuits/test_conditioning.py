"""`condition`, `with_temperature` and `with_active` change one thing and leave the rest."""

from dataclasses import replace

import pytest
import torch
from agreement import assert_logs_agree, assert_probabilities_agree
from cases import ALL, CASES, STRUCTURES, TOP_K, random_case
from test_log_partition import every_completion

EVERYTHING = [name for name in STRUCTURES if "all of them" in name]


@pytest.mark.parametrize(
    "name",
    [
        "untied",
        "absent anywhere",
        "strong context",
        "sharp evidence",
        "inactive rows",
        "tied",
        "strong everything",
        *STRUCTURES,
        *TOP_K,
    ],
)
def test_conditioning_is_bayes_rule_on_the_joint(name):
    case = ALL[name]
    g = torch.Generator().manual_seed(0)
    batch, length, vocab = case.logits.shape
    tokens = torch.randint(vocab, (batch, length), generator=g)
    further = torch.rand(batch, length, generator=g) < 0.5
    conditioned = case.distribution().condition(tokens, further)
    for row in range(batch):
        exact = case.enumerate(row)
        agrees = torch.ones(len(exact.tokens), dtype=torch.bool)
        for k, i in enumerate(exact.positions):
            if further[row, i] and not exact.observed[k]:
                agrees &= exact.tokens[:, k] == tokens[row, i]
        joint = exact.log_prob.masked_fill(~agrees, -torch.inf)
        expected = joint - joint.logsumexp(0)
        if not exact.positions or not bool((joint > -torch.inf).any()):
            continue  # nothing is there, or the further tokens are impossible
        ours = conditioned.log_prob(every_completion(case, row))[:, row]
        assert_logs_agree(ours, expected, max(1e-5, exact.rounding))
        law = torch.nn.functional.one_hot(exact.tokens, vocab).double()
        marginals = torch.einsum("x,xnv->nv", expected.exp(), law)
        close = max(1e-5, exact.rounding)
        assert_probabilities_agree(conditioned.marginals[row, exact.positions], marginals, close)


@pytest.mark.parametrize("name", ["untied", "tied", "all masked", "inactive rows", *EVERYTHING])
def test_partial_log_prob_sums_the_other_tokens_out(name):
    case = ALL[name]
    ours = case.distribution()
    g = torch.Generator().manual_seed(1)
    batch, length, vocab = case.logits.shape
    value = torch.randint(vocab, (batch, length), generator=g)
    known = (torch.rand(batch, length, generator=g) < 0.5) & ours.masked
    partial = ours.partial_log_prob(value, known)
    for row in range(batch):
        exact = case.enumerate(row)
        at = exact.positions
        agrees = ((exact.tokens == value[row, at]) | ~known[row, at]).all(1)
        assert_logs_agree(partial[row], exact.log_prob[agrees].logsumexp(0))


def test_conditioning_in_two_steps_is_conditioning_at_once():
    case = CASES["all masked"]
    tokens = torch.tensor([[0, 1, 2, 3]] * 3)
    first = torch.tensor([[True, False, False, False]] * 3)
    second = torch.tensor([[True, False, True, False]] * 3)
    ours = case.distribution().condition(tokens, first).condition(tokens.flip(1), second)
    expected = torch.tensor([[0, 0, 1, 0]] * 3)
    assert torch.equal(ours.tokens, expected)
    at_once = case.distribution().condition(expected, first | second)
    assert_logs_agree(ours.log_partition, at_once.log_partition)


def test_tokens_observed_before_are_not_overwritten():
    case = CASES["tied"]
    before = case.distribution()
    after = before.condition(torch.full((3, 4), 3), torch.ones(3, 4, dtype=torch.bool))
    assert torch.equal(after.tokens[before.observed], before.tokens[before.observed])
    assert not after.masked.any()


def test_conditioning_leaves_the_first_distribution_as_it_was():
    ours = CASES["all masked"].distribution()
    before = ours.log_partition.clone()
    ours.condition(torch.zeros(3, 4, dtype=torch.long), torch.ones(3, 4, dtype=torch.bool))
    assert ours.masked.all()
    assert torch.equal(ours.log_partition, before)


def test_the_chain_rule_over_conditionals_gives_the_joint():
    ours = CASES["untied"].distribution()
    value = ours.sample(generator=torch.Generator().manual_seed(0))
    total = torch.zeros(3)
    now = ours
    for i in (2, 0, 3, 1):
        law = now.marginals[:, i].gather(1, value[:, i, None])[:, 0]
        total = total + law.log()
        at = torch.zeros(3, 4, dtype=torch.bool)
        at[:, i] = True
        now = now.condition(value, at)
    assert_logs_agree(total, ours.log_prob(value))


@pytest.mark.parametrize("temperature", [0.01, 0.3, 2.0])
def test_with_temperature_is_the_distribution_made_at_that_temperature(temperature):
    case = random_case(100, context=1.0, forbidden=torch.tensor([False, True, False, False]))
    made = replace(case, options=case.options | {"temperature": temperature})
    changed = case.distribution().with_temperature(temperature)
    for row in range(3):
        exact = made.enumerate(row)
        if bool((exact.log_prob > -torch.inf).any()):
            ours = changed.log_prob(every_completion(case, row))[:, row]
            assert_logs_agree(ours, exact.log_prob, max(1e-5, exact.rounding))


def test_with_active_is_factorized_in_the_other_rows():
    case = random_case(101, context=1.0)
    active = torch.tensor([True, False, True])
    changed = case.distribution().with_active(active)
    made = replace(case, options=case.options | {"active": active})
    for row in range(3):
        ours = changed.log_prob(every_completion(case, row))[:, row]
        assert_logs_agree(ours, made.enumerate(row).log_prob)
    assert_probabilities_agree(changed.marginals[1], changed.factorized_logits[1].exp())
    again = changed.with_active(torch.ones(3, dtype=torch.bool))
    assert_logs_agree(again.log_partition, case.distribution().log_partition)
