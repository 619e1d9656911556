"""Lists whose rest is spread group by group: the law they stand for, and what it is worth."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_logs_agree
from cases import random_case

from codd_hf.circuits import DenseEmission, DenseEvidence, GroupedEvidence, TopKEvidence
from codd_hf.circuits.evidence.dense import summarise
from codd_hf.circuits.evidence.grouped import SMALLEST_PART, group_tokens

STATES, VOCAB, BATCH = 5, 40, 6
POSITIONS = torch.zeros(BATCH, dtype=torch.long)


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(k, *, logits=None, marginal=None, forbidden=None, temperature=1.0, emission=None):
    """A list, its emission and its law."""
    emission = normal(1, STATES, VOCAB, seed=1, scale=2.0) if emission is None else emission
    emission = DenseEmission(emission)
    marginal = normal(1, VOCAB, seed=2) if marginal is None else marginal
    if forbidden is not None:
        marginal = marginal.masked_fill(forbidden, -torch.inf)
    law = marginal.log_softmax(-1)
    groups = group_tokens(emission, law, summarise(emission))
    logits = normal(BATCH, VOCAB, scale=3.0) if logits is None else logits
    listed = GroupedEvidence.from_logits(logits, k, temperature, forbidden, groups=groups)
    return listed, emission, law


@pytest.mark.parametrize("k", [1, 4, 20])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_group_keeps_its_mass_and_spreads_it_by_the_marginal(k, temperature):
    forbidden = torch.arange(VOCAB) == 7
    listed, emission, law = made(k, forbidden=forbidden, temperature=temperature)
    logits = normal(BATCH, VOCAB, scale=3.0).masked_fill(forbidden, -torch.inf)
    exact = (logits / temperature).softmax(-1)
    group = emission.log_potential[0].argmax(0)
    found = listed.dense().exp()
    torch.testing.assert_close(found.sum(-1), torch.ones(BATCH))
    for row in range(BATCH):
        chosen = exact[row].topk(k).indices
        torch.testing.assert_close(found[row, chosen], exact[row, chosen])
        rest = torch.ones(VOCAB, dtype=torch.bool)
        rest[chosen] = False
        for c in range(STATES):
            part = rest & (group == c)
            share = law[0, part].softmax(0) if part.any() else law[0, part]
            torch.testing.assert_close(
                found[row, part], exact[row, part].sum() * share, rtol=1e-4, atol=1e-6
            )
    tokens = torch.arange(VOCAB)[:, None].expand(-1, BATCH)
    assert_logs_agree(listed.log_prob_of(tokens), listed.dense().T)


def test_no_token_that_the_marginal_allows_is_ruled_out():
    logits = normal(BATCH, VOCAB, scale=3.0)
    emission = normal(1, STATES, VOCAB, seed=1, scale=2.0)
    group = emission[0].argmax(0)
    logits[:, group == 2] = -300.0  # underflows beside the others
    logits[:, group == 3] = -torch.inf
    listed, _, law = made(3, logits=logits)
    found = listed.dense()
    assert (found[:, law[0] > -torch.inf] > -torch.inf).all()
    assert found[:, (group == 2) | (group == 3)].exp().sum() < 1e-5


@torch.no_grad()
def test_where_nearly_all_of_a_group_is_listed_evidence_stays_accurate():
    emission = normal(1, STATES, VOCAB, seed=1, scale=2.0)
    group = emission[0].argmax(0)
    first = int((group == 1).nonzero()[0])
    marginal = normal(1, VOCAB, seed=2)
    marginal[0, first] = 10.0  # the rest of its group has far less than `SMALLEST_PART`
    logits = normal(BATCH, VOCAB, scale=1.0)
    logits[:, first] = 9.0
    listed, emission, law = made(2, logits=logits, marginal=marginal)
    others = (group == 1) & (torch.arange(VOCAB) != first)
    assert others.any()
    assert law[0, others].exp().sum() < SMALLEST_PART * law[0, group == 1].exp().sum()
    total = listed.dense().exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(BATCH), rtol=1e-4, atol=0)
    summary = summarise(emission, law)
    found = listed.soft_evidence(emission, POSITIONS, summary)
    expected = DenseEvidence(listed.dense()).soft_evidence(emission, POSITIONS, summary)
    assert_logs_agree(found, expected, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 4, 16])
def test_groups_bring_evidence_closer_to_that_of_all_tokens(k):
    """Where states have their own kinds of tokens, and predictions favour some of these kinds."""
    kinds = torch.arange(VOCAB) % STATES
    frequency = normal(1, 1, VOCAB, seed=2)
    others = 3.0 * (kinds != torch.arange(STATES)[:, None])
    emission = frequency - others + normal(1, STATES, VOCAB, seed=3, scale=0.3)
    logits = normal(BATCH, STATES, scale=2.0)[:, kinds] + normal(BATCH, VOCAB, seed=4)
    listed, emission, law = made(k, logits=logits, emission=emission, marginal=frequency[0])
    exact = DenseEvidence.from_logits(logits)
    expected = exact.soft_evidence(emission, POSITIONS).softmax(-1)
    plain = TopKEvidence.from_logits(logits, k).spread_by_law(law)

    def error(evidence):
        found = evidence.soft_evidence(emission, POSITIONS, summarise(emission, law)).softmax(-1)
        return float((found - expected).abs().sum(-1).mean())

    assert error(listed) < 0.5 * error(plain)


def test_gradients_are_those_of_finite_differences():
    listed, emission, _ = made(3)
    groups = listed.groups
    matrix = emission.log_potential.double().requires_grad_()
    logits = normal(BATCH, VOCAB, scale=3.0).double().requires_grad_()

    def function(logits, matrix):
        evidence = GroupedEvidence.from_logits(logits, 3, 0.8, groups=groups)
        return evidence.soft_evidence(DenseEmission(matrix), POSITIONS)

    assert torch.autograd.gradcheck(function, (logits, matrix))


def test_emissions_that_differ_between_positions_are_an_error_that_says_what_to_do():
    case = random_case(500, tied_emission=False, top_k=2)
    with pytest.raises(ValueError, match="leave `evidence_groups` off"):
        _ = case.circuit().token_groups
    case = random_case(500, top_k=2, untied_marginal=True)
    with pytest.raises(ValueError, match="leave `evidence_groups` off"):
        _ = case.circuit().token_groups


@pytest.mark.parametrize("shape", [(0,), (), (2, 3), (0, 3)])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("vocab", [VOCAB, 2048, 2050])
def test_lists_are_made_of_any_shape_of_predictions(shape, grouped, vocab):
    logits = normal(*shape, vocab)
    emission, law = DenseEmission(normal(1, STATES, vocab)), normal(1, vocab).log_softmax(-1)
    if grouped:
        groups = group_tokens(emission, law, summarise(emission))
        listed = GroupedEvidence.from_logits(logits, 3, groups=groups)
        assert listed.log_shares.shape == (*shape, STATES)
    else:
        listed = TopKEvidence.from_logits(logits, 3).spread_by_law(law)
    assert listed.indices.shape == (*shape, 3)
    assert listed.batch_shape == shape
    assert listed.dense().shape == (*shape, vocab)
    exact = logits.softmax(-1).topk(3, -1).values
    torch.testing.assert_close(listed.log_probs.exp(), exact)


def test_a_law_that_the_groups_do_not_have_is_an_error_that_says_what_to_do():
    listed, *_ = made(3)
    with pytest.raises(ValueError, match="`group_tokens`"):
        listed.spread_by(torch.zeros(VOCAB))
    forbidden = torch.arange(VOCAB) == 7
    with pytest.raises(ValueError, match=r"`Potentials\.law_of_rest`"):
        GroupedEvidence.from_logits(normal(2, VOCAB), 3, forbidden=forbidden, groups=listed.groups)
