"""Promises of the generative fit: it is exact EM, it learns, and it can be interrupted."""

from __future__ import annotations

import itertools

import pytest
import torch
from fitting import untimed
from hmm_cases import NO_PRIOR, counts_by_enumeration, random_hmm, sample_windows

from codd_hf.circuits.em import expected_counts, log_likelihood, maximise
from codd_hf.data.canvases import TokenizedExample
from codd_hf.training import Checkpoints, GenerativeConfig, fit_generative
from codd_hf.training.fits.generative import text_windows
from codd_hf.training.fits.predictive_states import circuit_of_states, predictive_states

EMBEDDINGS = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_of_em_has_the_counts_of_enumeration_and_is_that_of_baum_and_welch(tied):
    hmm = random_hmm(tied=tied)
    windows = torch.randint(3, (7, 4), generator=torch.Generator().manual_seed(1))
    counts, scores = expected_counts(hmm, windows)
    exact, exact_scores = counts_by_enumeration(hmm, windows)
    assert torch.allclose(scores.double(), exact_scores, atol=1e-5)
    stepped = maximise(hmm, counts, NO_PRIOR)
    for ours, theirs, leaf in zip(counts, exact, stepped.leaves(), strict=True):
        assert torch.allclose(ours.double(), theirs, atol=1e-5)
        law = theirs / theirs.sum(-1, keepdim=True)
        assert torch.allclose(leaf.exp().double(), law, atol=1e-5)


def test_likelihood_never_decreases_under_full_batch_em_and_is_that_of_hmmlearn():
    hmm_module = pytest.importorskip("hmmlearn.hmm")
    windows = sample_windows(random_hmm(4, 12, 2.0, seed=3), 80, 8)
    potentials = start = random_hmm(4, 12, seed=9)
    ours = []
    for _ in range(25):
        counts, scores = expected_counts(potentials, windows)
        ours.append(scores.sum().item())
        potentials = maximise(potentials, counts, NO_PRIOR)
    assert all(after >= before - 1e-3 for before, after in itertools.pairwise(ours))
    peer = hmm_module.CategoricalHMM(4, n_features=12, n_iter=25, tol=-1e9, init_params="")
    laws = [tensor.double().softmax(-1).numpy() for tensor in start.tensors()]
    peer.startprob_, peer.transmat_, peer.emissionprob_ = laws[0], laws[1][0], laws[2][0]
    peer.fit(windows.reshape(-1, 1).numpy(), [8] * 80)
    assert ours == pytest.approx(list(peer.monitor_.history), rel=1e-6)
    assert ours[-1] > ours[0] + 50


def test_fit_comes_close_to_the_circuit_that_made_the_text():
    truth = random_hmm(4, 8, sharpness=4.0, seed=7)
    train, validation = sample_windows(truth, 600, 6), sample_windows(truth, 300, 6, seed=1)
    config = GenerativeConfig(num_epochs=40, windows_per_batch=100)
    fitted, history = fit_generative(train, validation, EMBEDDINGS, 4, config)
    best, after = (-log_likelihood(p, validation).mean().item() / 6 for p in (truth, fitted))
    assert history[-1]["nats"] == pytest.approx(after, abs=1e-4)
    assert [entry["step"] for entry in history] == list(range(0, 241, 6))
    assert history[0]["nats"] - 0.08 > after
    assert after < best + 0.03


def test_run_that_stopped_within_an_epoch_ends_bit_equal_to_one_that_did_not(tmp_path):
    windows = sample_windows(random_hmm(3, 8, 2.0), 70, 5)
    checkpoints = Checkpoints(tmp_path)

    def fit(checkpoints=None, stop_at=None, **changes):
        def log(step, _):
            if step == stop_at:
                raise KeyboardInterrupt

        few = {"num_epochs": 3, "windows_per_batch": 16, "checkpointing_steps": 3}
        config = GenerativeConfig(**(few | changes))
        return fit_generative(windows[:50], windows[50:], EMBEDDINGS, 3, config, checkpoints, log)

    whole, history = fit()
    with pytest.raises(KeyboardInterrupt):
        fit(checkpoints, stop_at=8)  # an epoch has four steps; the last checkpoint is at 6
    for _ in range(2):
        resumed, resumed_history = fit(checkpoints)
        assert untimed(resumed_history) == untimed(history)
        assert all(map(torch.equal, whole.leaves(), resumed.leaves()))
    with pytest.raises(ValueError, match=r"another `seed` \(0, not 1\): continue with that"):
        fit(checkpoints, seed=1)
    windows = windows.roll(1, 0)
    with pytest.raises(ValueError, match="made with another `data`"):
        fit(checkpoints)


def test_start_is_a_normalised_circuit_that_counts_the_states():
    windows = torch.tensor([[0, 3, 1, 4], [2, 5, 0, 3]])
    potentials = circuit_of_states(windows, windows // 3, 6, 2)
    for leaf in potentials.leaves():
        total = leaf.exp().sum(-1)
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    transition, emission = (tensor[0].exp() for tensor in potentials.tensors()[1:])
    assert emission[0, :3].sum() > 0.9
    assert emission[1, 3:].sum() > 0.9
    assert transition[0, 1] > 0.75
    assert (emission > 0).all()


def test_states_are_pasts_of_one_future():
    """A or B, then noise, then what follows A or B: a state remembers which, and little noise."""
    generator = torch.Generator().manual_seed(0)
    first, noise = (torch.randint(2, (500, n), generator=generator) for n in (1, 3))
    windows = torch.cat((first, 2 + noise, 4 + first), 1)
    states = predictive_states(windows, torch.eye(6), 12)
    for place in range(1, 4):
        of_first = [set(states[first[:, 0] == i, place].tolist()) for i in (0, 1)]
        assert not of_first[0] & of_first[1]
    merged = predictive_states(windows, torch.eye(6), 8)[:, 3]
    pasts = {tuple(row) for row in windows[:, :4].tolist()}
    assert len(set(merged.tolist())) < len(pasts)


def test_circuit_has_more_states_than_there_are_tokens_if_more_are_asked_for():
    """Each token is the other one than two before: two states cannot know that, four can."""
    first = torch.randint(2, (256, 2), generator=torch.Generator().manual_seed(0))
    windows = torch.cat((first, 1 - first) * 2, 1)
    config, embeddings = GenerativeConfig(num_epochs=2, windows_per_batch=64), torch.eye(3)[:, :2]
    nats = [fit_generative(windows, windows, embeddings, n, config)[1][-1]["nats"] for n in (2, 4)]
    assert nats[1] < 0.6 * nats[0]


def test_windows_of_text_start_with_the_answer_and_are_filled_with_end_of_text():
    examples = [TokenizedExample([9, 9], [5, 6, 7, 1]), TokenizedExample([], [8, 1])]
    assert text_windows(examples, 3, 1).tolist() == [[5, 6, 7], [1, 1, 1], [8, 1, 1]]
