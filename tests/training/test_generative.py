"""Promises of the generative fit: it is exact EM, it learns, and it can be interrupted."""

from __future__ import annotations

import itertools

import pytest
import torch
from hmm_cases import NO_PRIOR, counts_by_enumeration, random_hmm, sample_windows

from codd_hf.circuits.em import Counts, expected_counts, log_likelihood, maximise
from codd_hf.data.canvases import TokenizedExample
from codd_hf.training.fits.generative import (
    cluster_tokens,
    fit_generative,
    initial_potentials,
    text_windows,
)
from codd_hf.training.settings import GenerativeConfig


@pytest.mark.parametrize("tied", [True, False])
def test_expected_counts_and_likelihood_are_those_of_enumeration(tied):
    hmm = random_hmm(tied=tied)
    windows = torch.randint(3, (7, 4), generator=torch.Generator().manual_seed(1))
    counts, scores = expected_counts(hmm, windows)
    exact, exact_scores = counts_by_enumeration(hmm, windows)
    assert torch.allclose(scores.double(), exact_scores, atol=1e-5)
    for ours, theirs in zip(counts.leaves, exact.leaves, strict=True):
        assert torch.allclose(ours.double(), theirs, atol=1e-5)
    assert counts.leaves[0].sum().item() == pytest.approx(7, abs=1e-4)
    assert counts.leaves[2].sum().item() == pytest.approx(28, abs=1e-4)


def test_one_step_of_em_is_the_step_of_baum_and_welch():
    hmm = random_hmm()
    windows = torch.randint(3, (7, 4), generator=torch.Generator().manual_seed(1))
    stepped = maximise(hmm, expected_counts(hmm, windows)[0], NO_PRIOR)
    counts, _ = counts_by_enumeration(hmm, windows)
    for leaf, count in zip(stepped.leaves(), counts.leaves, strict=True):
        expected = count / count.sum(-1, keepdim=True)
        assert torch.allclose(leaf.exp().double(), expected, atol=1e-5)


def test_pseudo_counts_keep_what_was_never_seen_possible():
    hmm = random_hmm()
    prior = Counts((torch.ones(1),) * 3)
    counts, _ = expected_counts(hmm, torch.zeros(5, 4, dtype=torch.long))
    emission = maximise(hmm, counts, prior).tensors()[2]
    assert emission.isfinite().all()
    assert emission[0, :, 0].exp().min() > 0.5


def test_likelihood_never_decreases_under_em():
    windows = sample_windows(random_hmm(3, 6, 2.0), 60, 5)
    potentials, scores = random_hmm(3, 6, seed=5), []
    for _ in range(30):
        counts, score = expected_counts(potentials, windows)
        scores.append(score.sum().item())
        potentials = maximise(potentials, counts, NO_PRIOR)
    assert all(after >= before - 1e-3 for before, after in itertools.pairwise(scores))
    assert scores[-1] > scores[0] + 10


def test_fit_comes_close_to_the_circuit_that_made_the_text():
    truth = random_hmm(4, 8, sharpness=4.0, seed=7)
    train, validation = sample_windows(truth, 600, 6), sample_windows(truth, 300, 6, seed=1)
    config = GenerativeConfig(num_epochs=40, windows_per_batch=100)
    embeddings = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    clusters = cluster_tokens(embeddings, train.flatten().bincount(minlength=8), 4)
    start = initial_potentials(train, clusters, 4, config)
    fitted, history = fit_generative(train, validation, embeddings, 4, config)
    before, after, best = (
        log_likelihood(p, validation).mean().item() / 6 for p in (start, fitted, truth)
    )
    assert history[-1]["validation"] == pytest.approx(after, abs=1e-4)
    assert [entry["epoch"] for entry in history] == list(range(1, 41))
    assert after > before + 0.08
    assert after > best - 0.03


def fit(windows, folder=None, epochs: int = 4):
    config = GenerativeConfig(num_epochs=epochs, windows_per_batch=16)
    embeddings = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    return fit_generative(windows[:50], windows[50:], embeddings, 3, config, folder)


def test_run_that_stopped_ends_bit_equal_to_one_that_did_not(tmp_path):
    windows = sample_windows(random_hmm(3, 8, 2.0), 70, 5)
    whole, history = fit(windows)
    fit(windows, tmp_path, epochs=2)
    resumed, resumed_history = fit(windows, tmp_path)
    assert all(map(torch.equal, whole.leaves(), resumed.leaves()))
    assert resumed_history == history
    again, _ = fit(windows, tmp_path)
    assert all(map(torch.equal, whole.leaves(), again.leaves()))


def test_start_is_a_normalised_circuit_whose_states_are_the_clusters():
    windows = torch.tensor([[0, 3, 1, 4], [2, 5, 0, 3]])
    clusters = torch.tensor([0, 0, 0, 1, 1, 1])
    potentials = initial_potentials(windows, clusters, 2, GenerativeConfig())
    for leaf in potentials.leaves():
        total = leaf.exp().sum(-1)
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    transition, emission = (tensor[0].exp() for tensor in potentials.tensors()[1:])
    assert emission[0, :3].sum() > 0.9
    assert emission[1, 3:].sum() > 0.9
    assert transition[0, 1] > 0.75
    assert (emission > 0).all()


def test_like_embeddings_share_a_cluster():
    embeddings = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [5, 0.2]])
    clusters = cluster_tokens(embeddings, torch.tensor([3, 1, 2, 2, 0]), 2)
    assert clusters[0] == clusters[1] == clusters[4]
    assert clusters[2] == clusters[3] != clusters[0]


def test_more_latents_than_tokens_that_occur_is_an_error_that_gives_both_numbers():
    with pytest.raises(ValueError, match=r"`num_latents` \(4\) exceeds the 3 different tokens"):
        cluster_tokens(torch.randn(6, 2), torch.tensor([1, 2, 0, 0, 5, 0]), 4)


def test_windows_of_text_start_with_the_answer_and_are_filled_with_end_of_text():
    examples = [TokenizedExample([9, 9], [5, 6, 7, 1]), TokenizedExample([], [8, 1])]
    assert text_windows(examples, 3, 1).tolist() == [[5, 6, 7], [1, 1, 1], [8, 1, 1]]
