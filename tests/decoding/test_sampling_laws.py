"""What each sampling mode draws, against enumeration of a small window."""

from __future__ import annotations

import pytest
import torch
from windows import LENGTH, LOGITS, MASK, VOCAB, assert_follows, law, one_step, window

ROWS = 6000
OPEN = [MASK] * LENGTH
PARTLY = [MASK, 3, MASK, MASK]
IN_ANY_ORDER = ["low_confidence", "margin", "entropy", "random", "left_to_right", "threshold"]


@pytest.mark.parametrize(("tokens", "evidence_temperature"), [(OPEN, 1.0), (PARTLY, 0.6)])
@pytest.mark.parametrize("strategy", IN_ANY_ORDER)
def test_any_order_at_temperature_one_has_the_law_of_the_joint(
    strategy, tokens, evidence_temperature
):
    settings = {"strategy": strategy, "evidence_temperature": evidence_temperature}
    output = one_step(tokens, ROWS, sampling="any_order", temperature=1.0, **settings)
    assert_follows(output.prev_sample, *law(tokens, evidence_temperature))


@pytest.mark.parametrize("evidence_temperature", [1.0, 0.6])
def test_latent_at_temperature_one_has_the_law_of_the_joint(evidence_temperature):
    settings = {"temperature": 1.0, "evidence_temperature": evidence_temperature}
    output = one_step(OPEN, ROWS, sampling="latent", **settings)
    assert_follows(output.prev_sample, *law(OPEN, evidence_temperature))


def test_marginal_draws_each_token_from_its_marginal_independently():
    completions, joint = law(PARTLY)
    marginals = torch.zeros(LENGTH, VOCAB, dtype=torch.float64)
    for i in range(LENGTH):
        marginals[i].index_add_(0, completions[:, i], joint)
    product = marginals[torch.arange(LENGTH), completions].prod(-1)
    output = one_step(PARTLY, ROWS, sampling="marginal", temperature=1.0)
    assert_follows(output.prev_sample, completions, product / product.sum())


def test_factorized_draws_each_token_from_the_backbone_independently():
    completions, _ = law(PARTLY)
    phi = LOGITS.double().index_fill(-1, torch.tensor([MASK]), -torch.inf).softmax(-1)
    product = phi[torch.arange(LENGTH), completions].prod(-1)
    output = one_step(PARTLY, ROWS, sampling="factorized", temperature=1.0)
    assert_follows(output.prev_sample, completions, product / product.sum())


def test_any_order_from_left_to_right_draws_a_part_from_its_exact_law():
    """Two of four tokens: the others are summed out, not drawn and thrown away."""
    output = one_step(
        OPEN, ROWS, steps=2, sampling="any_order", temperature=1.0, strategy="left_to_right"
    )
    assert torch.equal(output.transfer_index, torch.tensor([[True, True, False, False]] * ROWS))
    assert (output.prev_sample[:, 2:] == MASK).all()
    completions, joint = law(OPEN)
    assert_follows(output.prev_sample[:, :2], completions[:, :2], joint)


def test_any_order_goes_by_the_law_given_what_is_revealed_and_not_by_candidates():
    """The first position is the same in every row; the second depends on the first token alone."""
    output = one_step(OPEN, 400, steps=2, sampling="any_order", temperature=1.0)
    completions, joint = law(OPEN)
    marginals = torch.zeros(LENGTH, VOCAB, dtype=torch.float64)
    for i in range(LENGTH):
        marginals[i].index_add_(0, completions[:, i], joint)
    first = int(marginals.amax(-1).argmax())
    assert output.transfer_index[:, first].all()
    for token in output.prev_sample[:, first].unique().tolist():
        given = joint * (completions[:, first] == token)
        laws = torch.zeros(LENGTH, VOCAB, dtype=torch.float64)
        for i in range(LENGTH):
            laws[i].index_add_(0, completions[:, i], given / given.sum())
        best = laws.amax(-1)
        best[first] = -1
        rows = output.prev_sample[:, first] == token
        assert output.transfer_index[rows][:, int(best.argmax())].all()


@pytest.mark.parametrize("strategy", [*IN_ANY_ORDER, "joint"])
def test_any_order_reports_each_probability_given_the_tokens_before(strategy):
    """Their product is the probability of the completion, also where drawing is sharpened."""
    output = one_step(
        OPEN, 40, sampling="any_order", temperature=1.0, evidence_temperature=0.5, strategy=strategy
    )
    completions, joint = law(OPEN)
    for row in range(40):
        at = (completions == output.prev_sample[row]).all(-1)
        total = output.sampled_probs[row].double().log().sum()
        torch.testing.assert_close(total, joint[at].log()[0], atol=1e-4, rtol=1e-4)


def test_any_order_at_temperature_zero_takes_the_likeliest_token_of_each_conditional():
    output = one_step(OPEN, sampling="any_order", strategy="left_to_right")
    completions, joint = law(OPEN)
    for i in range(LENGTH):
        mass = torch.zeros(VOCAB, dtype=torch.float64).index_add(0, completions[:, i], joint)
        assert int(output.prev_sample[0, i]) == int(mass.argmax())
        joint = joint * (completions[:, i] == output.prev_sample[0, i])


def test_viterbi_takes_the_best_path_of_latents_and_tokens_without_randomness():
    best = window(PARTLY).viterbi()
    for temperature in (0.0, 1.0):
        output = one_step(PARTLY, 3, sampling="viterbi", temperature=temperature)
        assert torch.equal(output.prev_sample, best.tokens.expand(3, -1))
    state = torch.random.get_rng_state()
    one_step(PARTLY, sampling="viterbi", temperature=1.0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_viterbi_candidates_are_ranked_as_those_of_other_modes():
    output = one_step(OPEN, sampling="viterbi")
    best = window(OPEN).viterbi()
    expected = window(OPEN).marginals.gather(-1, best.tokens[..., None])[..., 0]
    torch.testing.assert_close(output.sampled_probs, expected)
