"""Which positions the adaptive strategies commit, and what a step never falls below."""

from __future__ import annotations

import pytest
import torch
from windows import LENGTH, MASK, law, one_step, window

from codd_hf.schedulers.scheduling_codd import CoDDScheduler

OPEN = [MASK] * LENGTH
MODES = ["factorized", "latent", "marginal", "viterbi"]


@pytest.mark.parametrize("sampling", MODES)
def test_threshold_commits_every_token_that_is_sure_enough_and_at_least_one(sampling):
    for threshold in (0.0, 0.3, 0.5, 0.7, 1.0):
        output = one_step(
            OPEN, 50, steps=4, strategy="threshold", sampling=sampling, threshold=threshold
        )
        sure = output.sampled_probs >= threshold
        best = torch.nn.functional.one_hot(output.sampled_probs.argmax(-1), LENGTH).bool()
        assert torch.equal(output.transfer_index, torch.where(sure.any(-1)[:, None], sure, best))


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("sampling", ["latent", "viterbi"])
def test_joint_commits_the_longest_prefix_whose_exact_probability_stays_above(sampling, threshold):
    output = one_step(
        OPEN,
        40,
        steps=4,
        strategy="joint",
        sampling=sampling,
        threshold=threshold,
        temperature=1.0,
        evidence_temperature=0.5,
    )
    completions, joint = law(OPEN)
    lengths = set()
    for row in range(40):
        tokens, order = output.sampled_tokens[row], output.sampled_probs[row].argsort().flip(0)
        count = 0
        for n in range(1, LENGTH + 1):
            agrees = (completions[:, order[:n]] == tokens[order[:n]]).all(-1)
            if float(joint[agrees].sum()) < threshold:
                break
            count = n
        expected = torch.zeros(LENGTH, dtype=torch.bool)
        expected[order[: max(count, 1)]] = True
        assert torch.equal(output.transfer_index[row], expected)
        lengths.add(count)
    if threshold == 0.1 and sampling != "viterbi":
        assert len(lengths) > 1


def test_joint_of_a_factorized_prediction_is_the_product_of_its_tokens():
    output = one_step(
        OPEN, 30, steps=4, strategy="joint", sampling="factorized", threshold=0.2, temperature=1.0
    )
    ordered = output.sampled_probs.sort(-1, descending=True).values
    count = (ordered.cumprod(-1) >= 0.2).sum(-1).clamp(min=1)
    assert torch.equal(output.transfer_index.sum(-1), count)


def test_joint_looks_at_all_windows_of_a_row_together():
    threshold = 0.2
    scheduler = CoDDScheduler(strategy="joint", sampling="marginal", threshold=threshold)
    scheduler.set_timesteps(2 * LENGTH)
    output = scheduler.step(window(OPEN, windows=2), 1.0, torch.tensor([OPEN * 2]))
    completions, joint = law(OPEN)
    tokens, order = (
        output.sampled_tokens[0],
        output.sampled_probs[0].argsort(descending=True, stable=True),
    )
    above = 0
    for count in range(1, 2 * LENGTH + 1):
        probability = 1.0
        for first in (0, LENGTH):
            known = [int(i) - first for i in order[:count] if first <= i < first + LENGTH]
            agrees = (completions[:, known] == tokens[first : first + LENGTH][known]).all(-1)
            probability *= float(joint[agrees].sum())
        above += probability >= threshold
    assert 1 < above < 2 * LENGTH
    assert int(output.transfer_index.sum()) == above


@pytest.mark.parametrize("strategy", ["threshold", "joint"])
def test_any_order_goes_on_while_it_is_sure(strategy):
    settings = {"sampling": "any_order", "strategy": strategy, "temperature": 1.0}
    output = one_step(OPEN, 200, steps=4, threshold=0.6, **settings)
    counts = output.transfer_index.sum(-1)
    assert len(counts.unique()) > 1
    probs = output.sampled_probs.masked_fill(~output.transfer_index, 1)
    if strategy == "joint":
        assert (probs.prod(-1)[counts > 1] >= 0.6 - 1e-6).all()
    assert (output.sampled_probs[~output.transfer_index] == 0).all()
    assert (output.prev_sample[~output.transfer_index] == MASK).all()


@pytest.mark.parametrize("sampling", [*MODES, "any_order"])
@pytest.mark.parametrize("strategy", ["threshold", "joint"])
def test_adaptive_strategies_keep_the_pace_of_their_budget(strategy, sampling):
    """With two steps for four tokens, two are committed however unsure, and all in the last."""
    settings = {"strategy": strategy, "sampling": sampling, "threshold": 1.0}
    output = one_step(OPEN, 20, steps=2, **settings)
    assert (output.transfer_index.sum(-1) == 2).all()
    assert one_step(OPEN, 20, steps=1, **settings).transfer_index.all()


@pytest.mark.parametrize("sampling", [*MODES, "any_order"])
def test_left_to_right_commits_the_leftmost_positions(sampling):
    output = one_step(
        [MASK, 1, MASK, MASK], 3, steps=2, strategy="left_to_right", sampling=sampling
    )
    assert output.transfer_index.tolist() == [[True, False, True, False]] * 3
