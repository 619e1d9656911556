"""Promises of the counts of EM: exact, the same however they are shared out, and anemone's."""

from __future__ import annotations

import itertools

import pytest
import torch
from accelerate import Accelerator
from hmm_cases import NO_PRIOR, counts_by_enumeration, random_hmm, sample_windows

from codd_hf.circuits.em import Counts, expected_counts, log_likelihood, maximise
from codd_hf.training.fits.counting import batch_counts, model_counts
from codd_hf.training.fits.generative import fit_generative
from codd_hf.training.settings import GenerativeConfig

LENGTH = 4


def all_windows(vocab: int = 3) -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(vocab), repeat=LENGTH)))


@pytest.mark.parametrize("tied", [True, False])
def test_own_counts_of_a_circuit_are_those_of_all_windows_by_their_probability(tied):
    hmm = random_hmm(tied=tied)
    expected = [torch.zeros_like(leaf).double() for leaf in hmm.leaves()]
    for window in all_windows():
        counts, score = counts_by_enumeration(hmm, window[None])
        for sums, leaf in zip(expected, counts.leaves, strict=True):
            sums += score.exp() * leaf
    for ours, theirs in zip(model_counts(hmm, LENGTH).leaves, expected, strict=True):
        assert torch.allclose(ours.double(), theirs, atol=1e-6)


def test_anemone_step_is_the_best_for_the_batch_less_the_distance_from_the_circuit():
    hmm, share = random_hmm(), 0.3
    windows = torch.randint(3, (5, LENGTH), generator=torch.Generator().manual_seed(1))
    counts, _ = expected_counts(hmm, windows)
    own = model_counts(hmm, LENGTH).scaled(len(windows))
    stepped = maximise(hmm, own.mixed_with(counts, share), NO_PRIOR)
    exact = counts_by_enumeration(hmm, windows)[0]
    uses = [torch.zeros_like(leaf).double() for leaf in hmm.leaves()]
    for window in all_windows():
        found, score = counts_by_enumeration(hmm, window[None])
        for sums, leaf in zip(uses, found.leaves, strict=True):
            sums += len(windows) * score.exp() * leaf

    def objective(leaves) -> torch.Tensor:
        """`share * sum counts log theta' - (1 - share) * KL`, less what does not depend on it."""
        logs = [leaf.double().log_softmax(-1) for leaf in leaves]
        data = sum((c * log).sum() for c, log in zip(exact.leaves, logs, strict=True))
        model = sum((c * log).sum() for c, log in zip(uses, logs, strict=True))
        return share * data + (1 - share) * model

    leaves = [leaf.double().requires_grad_() for leaf in stepped.leaves()]
    gradients = torch.autograd.grad(objective(leaves), leaves)
    assert all(g.abs().max() < 1e-4 for g in gradients)
    assert objective(stepped.leaves()) > objective(hmm.leaves()) + 0.02


def test_anemone_step_with_the_whole_share_is_a_step_of_em():
    hmm, windows = random_hmm(), all_windows()[::3]
    counts, _ = expected_counts(hmm, windows)
    own = model_counts(hmm, LENGTH).scaled(len(windows))
    for mine, em in zip(own.mixed_with(counts, 1.0).leaves, counts.leaves, strict=True):
        assert torch.equal(mine, em)


def test_likelihood_never_decreases_under_full_batch_anemone():
    windows = sample_windows(random_hmm(3, 6, 2.0), 60, 5)
    potentials, scores = random_hmm(3, 6, seed=5), []
    for _ in range(60):
        counts, score = expected_counts(potentials, windows)
        scores.append(score.sum().item())
        own = model_counts(potentials, 5).scaled(len(windows))
        potentials = maximise(potentials, own.mixed_with(counts, 0.4), NO_PRIOR)
    assert all(after >= before - 1e-3 for before, after in itertools.pairwise(scores))
    assert scores[-1] > scores[0] + 10


def test_fit_with_anemone_comes_close_to_the_circuit_that_made_the_text():
    truth = random_hmm(4, 8, sharpness=4.0, seed=7)
    train, validation = sample_windows(truth, 600, 6), sample_windows(truth, 300, 6, seed=1)
    embeddings = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    config = GenerativeConfig(num_epochs=40, windows_per_batch=100, update="anemone")
    _, history = fit_generative(train, validation, embeddings, 4, config)
    best = log_likelihood(truth, validation).mean().item() / 6
    assert history[-1]["validation"] > history[0]["validation"] + 0.03
    assert history[-1]["validation"] > best - 0.03


def test_fit_with_anemone_that_stopped_ends_bit_equal_to_one_that_did_not(tmp_path):
    windows = sample_windows(random_hmm(4, 8, sharpness=4.0), 100, 6)
    embeddings = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def fit(epochs: int, folder=None):
        config = GenerativeConfig(num_epochs=epochs, windows_per_batch=30, update="anemone")
        return fit_generative(windows, windows, embeddings, 4, config, folder)

    fitted, history = fit(5)
    fit(2, tmp_path)
    resumed, resumed_history = fit(5, tmp_path)
    assert resumed_history == history
    assert all(map(torch.equal, fitted.leaves(), resumed.leaves()))


def test_counts_by_chunks_are_those_of_the_batch():
    hmm = random_hmm(3, 8)
    windows = sample_windows(hmm, 50, 5)
    whole, scores = expected_counts(hmm, windows)
    for size in (7, 50, 64):
        counts, total = batch_counts(hmm, windows, size, Accelerator())
        assert total == pytest.approx(scores.sum().item(), rel=1e-6)
        for ours, theirs in zip(counts.leaves, whole.leaves, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5)


def test_run_stopped_within_an_epoch_goes_on_at_its_batch(tmp_path):
    windows = sample_windows(random_hmm(3, 8, 2.0), 70, 5)
    embeddings = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    config = GenerativeConfig(num_epochs=3, windows_per_batch=16, checkpointing_steps=3)

    def fit(folder=None, stop_at=None):
        def log(step, _):
            if step == stop_at:
                raise KeyboardInterrupt

        return fit_generative(windows[:50], windows[50:], embeddings, 3, config, folder, log=log)

    whole, history = fit()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, stop_at=8)  # two epochs have four steps each; the last checkpoint is at 6
    resumed, resumed_history = fit(tmp_path)
    assert resumed_history == history
    assert all(map(torch.equal, whole.leaves(), resumed.leaves()))


def test_checkpoint_of_another_run_is_refused_and_the_setting_named(tmp_path):
    windows = sample_windows(random_hmm(3, 8, 2.0), 70, 5)
    embeddings = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def fit(data, **changes):
        config = GenerativeConfig(**({"num_epochs": 1, "windows_per_batch": 16} | changes))
        fit_generative(data, windows[50:], embeddings, 3, config, tmp_path)

    fit(windows[:50])
    with pytest.raises(ValueError, match="made with `seed` 0, not 1: continue with that"):
        fit(windows[:50], seed=1)
    with pytest.raises(ValueError, match=r"made with other training data \(`windows`\)"):
        fit(windows[1:51])
    fit(windows[:50], num_epochs=2)


def test_log_likelihoods_of_em_are_those_of_hmmlearn_from_the_same_start():
    hmm_module = pytest.importorskip("hmmlearn.hmm")
    windows = sample_windows(random_hmm(4, 12, 2.0, seed=3), 80, 8)
    potentials = start = random_hmm(4, 12, seed=9)
    ours = []
    for _ in range(25):
        counts, scores = expected_counts(potentials, windows)
        ours.append(scores.sum().item())
        potentials = maximise(potentials, counts, Counts((torch.zeros(1),) * 3))
    peer = hmm_module.CategoricalHMM(4, n_features=12, n_iter=25, tol=-1e9, init_params="")
    laws = [tensor.double().softmax(-1).numpy() for tensor in start.tensors()]
    peer.startprob_, peer.transmat_, peer.emissionprob_ = laws[0], laws[1][0], laws[2][0]
    peer.fit(windows.reshape(-1, 1).numpy(), [8] * 80)
    theirs = list(peer.monitor_.history)
    assert len(theirs) == 25
    assert ours == pytest.approx(theirs, rel=1e-6)
    per_token = windows.numel()
    assert [x / per_token for x in ours] == pytest.approx([x / per_token for x in theirs], abs=1e-4)
    assert ours[-1] > ours[0] + 50
